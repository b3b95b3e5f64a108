"""Parts of a report that are drawn from one kind of file: score against KL and length, diversity, pictures, times."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from rlhf_ppo.runtime.report.axes import short
from rlhf_ppo.runtime.report.charts import Line, line_chart, plane_chart, share_bar, thin
from rlhf_ppo.runtime.report.curves import Group
from rlhf_ppo.runtime.report.heat import split_rows
from rlhf_ppo.runtime.report.run_files import RunFiles
from rlhf_ppo.runtime.report.samples import paired_rows, read_text
from rlhf_ppo.runtime.texts import distinct

LARGEST_STILL = 1_000_000
"""Bytes of a picture that is taken into the page."""
NO_PHASE = ("iteration", "generated_tokens", "exchanged_bytes")
"""Numbers of a line of timings.jsonl that are no seconds of a phase."""


def frontier(groups: Sequence[Group]) -> Markup | None:
    lines = []
    for group in groups:
        for run in group.runs:
            pairs = [
                (row["kl/reference_nats_per_response"], row["score/mean"])
                for row in run.updates
                if "kl/reference_nats_per_response" in row and "score/mean" in row
            ]
            if len(pairs) > 1:
                lines.append(Line(group.label, *thin(pairs, 16), look=group.look))
    if not lines:
        return None
    said = "; ".join(f"{x.label}: score {short(x.ys[-1])} at {short(x.xs[-1])} nats" for x in lines[:6])
    labels = {"x_label": "nats per response", "y_label": "score"}
    return plane_chart(lines, **labels, summary=f"Score over KL to the reference. At the end: {said}.", joined=True)


def scatter(run: RunFiles) -> Markup | None:
    recorded = run.recorded("responses")
    lines = []
    for look, (label, number) in enumerate(
        (("first", recorded[0]), ("last", recorded[-1])) if len(recorded) > 1 else ()
    ):
        columns = run.table("responses", number)
        if columns is not None:
            pairs = [
                (float(x), float(y)) for x, y in zip(columns["tokens"], columns["score"], strict=True) if y is not None
            ]
            if pairs:
                lines.append(Line(label, [x for x, _ in pairs[:300]], [y for _, y in pairs[:300]], look))
    if not lines:
        return None
    summary = "Score over length in tokens of the responses of the first and the last recorded rollout."
    return plane_chart(lines, x_label="tokens", y_label="score", summary=summary)


def diversity(run: RunFiles) -> dict[str, Any] | None:
    pairs = paired_rows(run)
    if not pairs:
        return None
    texts = [[read_text(row["completion"]) for row in side] for side in zip(*pairs, strict=True)]
    values = [f"{distinct(said, n):.2f}" for n in (1, 2) for said in texts]
    for side in zip(*pairs, strict=True):
        lengths = [row["tokens"] for row in side if isinstance(row.get("tokens"), int)]
        values.append(f"{sum(lengths) / len(lengths):.0f}" if lengths else "-")
    return {"label": run.name, "values": values}


def still(run: RunFiles) -> dict[str, Any] | None:
    file = run.path / "still.png"
    if not file.is_file():
        return None
    content = file.read_bytes()
    if not content.startswith(b"\x89PNG\r\n\x1a\n") or len(content) > LARGEST_STILL:
        run.problems.append(f"still.png is no PNG of at most {LARGEST_STILL / 1e6:g} MB, so it is left out.")
        return None
    return {
        "label": run.facts.get("env_id") or run.name,
        "data": f"data:image/png;base64,{base64.b64encode(content).decode()}",
    }


def timings(run: RunFiles, several: bool) -> dict[str, Any] | None:
    # Of the first iteration much is set-up.
    rows = run.timings[1:] or run.timings
    phases = dict.fromkeys(name for row in rows for name in row if name not in NO_PHASE)
    seconds = {phase: [row[phase] for row in rows if isinstance(row.get(phase), (int, float))] for phase in phases}
    means = {phase: sum(found) / len(rows) for phase, found in seconds.items() if found}
    whole = sum(means.values())
    if not whole:
        return None
    peaks: dict[str, float] = {}
    for row in run.timings:
        for phase, peak in row["peak_bytes"].items() if isinstance(row.get("peak_bytes"), dict) else ():
            if isinstance(peak, (int, float)):
                peaks[phase] = max(peaks.get(phase, 0.0), peak)
    tokens = [row["generated_tokens"] for row in rows if isinstance(row.get("generated_tokens"), (int, float))]
    rate = f", {sum(tokens) / len(rows) / whole:,.0f} generated tokens a second over all phases" if tokens else ""
    table = [
        {
            "phase": phase,
            "seconds": short(mean),
            "share": f"{mean / whole:.0%}",
            "peak": f"{peaks[phase] / 1e9:.2f}" if phase in peaks else "-",
        }
        for phase, mean in means.items()
    ]
    bar = share_bar(
        [
            (row["phase"], mean, f"{row['seconds']} s, {row['share']}")
            for row, mean in zip(table, means.values(), strict=True)
        ],
        "Share of each phase: " + ", ".join(f"{row['phase']} {row['share']}" for row in table),
    )
    sentence = f"An iteration took {short(whole)} seconds{rate}."
    return {
        "label": run.name if several else "",
        "sentence": sentence,
        "bar": bar,
        "rows": table,
        "memory": bool(peaks),
    }


def steps_chart(run: RunFiles) -> Markup | None:
    """Draw what the first copy's steps of the last update earned: value, advantage and reward."""
    recorded = run.recorded("steps")
    if not recorded or (columns := run.table("steps", recorded[-1])) is None:
        return None
    rows = next(iter(split_rows(columns, "copy").values()), [])
    lines = []
    for look, name in enumerate(("value", "advantage", "reward")):
        points = [(float(row["step"]), float(row[name])) for row in rows if row[name] is not None]
        if points:
            lines.append(Line(name, *thin(points, 240), look=look))
    if not lines:
        return None
    ends = sum(bool(row["ended"]) for row in rows)
    return line_chart(
        lines, x_label="step", summary=f"Value, advantage and reward of {len(rows)} steps; {ends} episodes end."
    )
