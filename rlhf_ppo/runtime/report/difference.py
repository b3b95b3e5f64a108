"""The first rollout in which two runs differ, and in what: the place to look when a run cannot be repeated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_ppo.runtime.report.run_files import RunFiles, setting_differences
from rlhf_ppo.runtime.report.samples import Sample, facts, read_text, whole_rows
from rlhf_ppo.runtime.texts import mark_differences

SAMPLED = ("score/mean", "kl/reference_nats_per_response", "response/length_tokens", "policy/entropy", "episode/count")
"""Metrics of what was sampled, before the update changed anything."""


@dataclass
class Difference:
    """Where two runs part."""

    one: str
    other: str
    iteration: int | None
    """The first rollout in which they differ; None: in none that both have."""
    sentences: list[str] = field(default_factory=list)
    metrics: list[tuple[str, float, float]] = field(default_factory=list)
    """(metric, value in one, in the other) of that rollout."""
    prompt: str | None = None
    samples: tuple[Sample, Sample] | None = None
    """The first responses that differ, to the same prompt."""
    settings: dict[str, list[Any]] = field(default_factory=dict)


def first_difference(one: RunFiles, other: RunFiles) -> Difference:
    """Compare two runs rollout by rollout."""
    found = Difference(one.name, other.name, None, settings=setting_differences([one, other]))
    if one.kind != other.kind:
        found.sentences.append(
            "One trains a language model, the other plays a control task: there is nothing to compare."
        )
        return found
    key = "progress/iteration"
    rows = [{int(row[key]): row for row in run.updates if key in row} for run in (one, other)]
    common = sorted(rows[0].keys() & rows[1].keys())
    if not common:
        found.sentences.append("They have no rollout in common.")
        return found
    for iteration in common:
        a, b = rows[0][iteration], rows[1][iteration]
        found.metrics = [(key, a[key], b[key]) for key in a if key in b and a[key] != b[key]]
        if found.metrics:
            found.iteration = iteration
            break
    _say(found, common)
    _compare_samples(found, one, other)
    return found


def _say(found: Difference, common: list[int]) -> None:
    if found.iteration is None:
        span = f"all {len(common)} rollouts" if len(common) > 1 else "the one rollout"
        found.sentences.append(f"They are the same in {span} that both have, to the last digit of every metric.")
        return
    keys = {key for key, _, _ in found.metrics}
    before = f"Rollouts {common[0]} to {found.iteration - 1} are the same. " if found.iteration > common[0] else ""
    if keys & set(SAMPLED):
        found.sentences.append(f"{before}They first differ in rollout {found.iteration}, in what was sampled.")
    else:
        found.sentences.append(
            f"{before}They first differ in rollout {found.iteration}: what was sampled is the same, but not the update."
        )
    if not before and "seed" in found.settings:
        found.sentences.append("Their seeds differ, so nothing after the start is expected to agree.")


def _compare_samples(found: Difference, one: RunFiles, other: RunFiles) -> None:
    """Find the first recorded responses that differ."""
    sides = [_by_iteration(run) for run in (one, other)]
    for iteration in sorted(sides[0].keys() & sides[1].keys()):
        for a, b in zip(sides[0][iteration], sides[1][iteration], strict=False):
            if a["prompt"] != b["prompt"]:
                found.sentences.append(f"From rollout {iteration} on, they were given other prompts.")
                return
            if a["completion"] != b["completion"]:
                texts = [read_text(row["completion"]) for row in (a, b)]
                pieces = mark_differences(*texts)
                found.prompt = read_text(a["prompt"])
                found.samples = (Sample(pieces[0], facts(a)), Sample(pieces[1], facts(b)))
                shared = next((i for i, (x, y) in enumerate(zip(*texts, strict=False)) if x != y), min(map(len, texts)))
                found.sentences.append(
                    f"The first recorded responses that differ are in rollout {iteration}; they part after "
                    f"{shared} characters."
                )
                return


def _by_iteration(run: RunFiles) -> Mapping[int, list[Mapping[str, Any]]]:
    found: dict[int, list[Mapping[str, Any]]] = {}
    for row in whole_rows(run.samples):
        found.setdefault(row["iteration"], []).append(row)
    return found
