"""The verdict in a sentence: what a run gained, how far from its start, what stands out; which setting ends highest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rlhf_ppo.runtime.diagnosis.advice import Advice, advise_on
from rlhf_ppo.runtime.diagnosis.symptoms import FEWEST_UPDATES
from rlhf_ppo.runtime.report.axes import short
from rlhf_ppo.runtime.report.curves import Group
from rlhf_ppo.runtime.report.run_files import RunFiles
from rlhf_ppo.runtime.report.samples import paired_rows
from rlhf_ppo.runtime.statistics import differences, interval

Level = Literal["good", "look", "bad", "unknown", "compare"]
UNFINISHED = "not finished"


@dataclass(frozen=True)
class Verdict:
    """What a reader should know first."""

    level: Level
    headline: str
    """In a few words."""
    sentence: str
    findings: list[Advice] = field(default_factory=list)
    """What stands out, the most serious first."""


@dataclass(frozen=True)
class Gain:
    """How a run's score or return changed."""

    what: str
    before: float
    after: float
    sure: bool
    """The change is beyond its noise."""
    interval: str = ""
    turned: str = ""
    """What to call a run whose halves changed against its ends: it went one way, and back."""


def judge(run: RunFiles) -> Verdict:
    """Judge a run by its folder."""
    progress = _progress(run)
    if not run.updates:
        return Verdict("unknown", "Nothing was learned yet", f"No update is in this folder. {progress}".strip())
    findings = _findings(run)
    serious = [found for found in findings if found.rule.name != UNFINISHED]
    gain = measure_gain(run)
    if gain is None:
        if len(run.updates) >= FEWEST_UPDATES:
            return Verdict("unknown", "No verdict", f"It logged no score or return. {progress}".strip(), findings)
        sentence = f"It has {len(run.updates)} of the {FEWEST_UPDATES} updates that a judgement takes."
        return Verdict("unknown", "Too early to tell", f"{sentence} {progress}".strip(), findings)
    verb = "rose" if gain.after > gain.before else "fell"
    change = f"{gain.what} {verb} from {short(gain.before)} to {short(gain.after)}{gain.interval}"
    change += _evaluated(run)
    kl = run.last("eval/kl_nats_per_response") or run.last("kl/reference_nats_per_response")
    distance = "" if kl is None else f", {short(kl)} nats per response from the reference"
    noise = "" if gain.sure or gain.turned else ", a change within its noise"
    sentence = f"{change}{distance}{noise}. {_what_stands_out(serious, findings)} {progress}".strip()
    if gain.turned:
        return Verdict("look", gain.turned, sentence, findings)
    if not gain.sure:
        return Verdict("look", "No clear change", sentence, findings)
    if gain.after < gain.before:
        return Verdict("bad", "It got worse", sentence, findings)
    return Verdict("look" if serious else "good", "It learned", sentence, findings)


def compare(groups: Sequence[Group]) -> Verdict:
    """Say which of several settings ends highest."""
    ends: list[tuple[float, Group]] = []
    for group in groups:
        key = "episode/return_mean" if group.runs[0].kind == "control" else "score/mean"
        finals = [end for run in group.runs if (end := run.metrics.late(key)) is not None]
        ends += [(sum(finals) / len(finals), group)] if finals else []
    if len({group.runs[0].kind for group in groups}) > 1:
        return Verdict(
            "compare", "Runs of both frontends", "They have different tasks, so only their health can be compared."
        )
    if len(groups) == 1 and ends:
        seeds = f"One setting, {len(groups[0].runs)} seeds"
        return Verdict("compare", seeds, f"Over the second half, {_unit(groups[0])} is {short(ends[0][0])} on average.")
    if len(ends) < 2:
        return Verdict("compare", "Too early to compare", "Fewer than two of these runs have updates.")
    ranked = sorted(ends, key=lambda end: -end[0])
    listed = ", then ".join(f"{group.label} with {short(end)}" for end, group in ranked[:6])
    alone = any(len(group.runs) == 1 for group in groups)
    doubt = " A setting with one seed may be lucky: repeat it with others before you trust the order." if alone else ""
    sentence = f"Over the second half of each run, {_unit(groups[0])} is highest for {listed}.{doubt}"
    return Verdict("compare", f"{ranked[0][1].label} ends highest", sentence)


def _unit(group: Group) -> str:
    return "the mean return" if group.runs[0].kind == "control" else "the mean score"


def _evaluated(run: RunFiles) -> str:
    """Return what a control task's final policy reaches."""
    mean, std = run.last("eval/mean_return"), run.last("eval/std_return")
    if mean is None:
        return ""
    return f"; evaluated at the end, it returns {short(mean)}" + ("" if std is None else f" ± {short(std)} (std)")


def measure_gain(run: RunFiles) -> Gain | None:
    """Return the change on held-out prompts, or else of the training score or return; None if it is too early."""
    pairs = [(a["score"], b["score"]) for a, b in paired_rows(run) if a["score"] is not None and b["score"] is not None]
    if len(pairs) > 1:
        before, after = ([pair[side] for pair in pairs] for side in (0, 1))
        change = interval(differences(after, before))
        mean, half = change["mean"] or 0.0, change["half_width"] or 0.0
        said = f" ({mean:+.3g} ± {half:.2g})"
        what = f"The mean score on {len(pairs)} held-out prompts"
        return Gain(what, sum(before) / len(pairs), sum(after) / len(pairs), abs(mean) > half, said)
    metrics = run.metrics
    for key, what in (
        ("score/mean", "The score in training"),
        ("episode/return_mean", "The mean return of 100 episodes"),
    ):
        if (ends := metrics.ends(key)) is not None:
            rises, falls = metrics.rises(), metrics.falls()
            if ends[1] > ends[0]:
                return Gain(what, *ends, sure=rises, turned="It rose and fell back" if falls else "")
            return Gain(what, *ends, sure=falls, turned="It fell and came back" if rises else "")
    return None


def _findings(run: RunFiles) -> list[Advice]:
    if len(run.metrics.rows) < FEWEST_UPDATES:
        return []
    try:
        return advise_on(run.metrics)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # settings that a damaged run.json holds
        run.problems.append(f"The run could not be judged by its settings ({error!r}).")
        return []


def _what_stands_out(serious: list[Advice], findings: list[Advice]) -> str:
    rising = "It was still rising at the end, so a longer run may gain more." if findings and not serious else ""
    if not serious:
        return rising or "Nothing stands out in its metrics."
    names = ", ".join(found.rule.name for found in serious)
    return f"{'One thing stands' if len(serious) == 1 else f'{len(serious)} things stand'} out: {names}."


def _progress(run: RunFiles) -> str:
    if run.planned is None:
        return "It is still running." if run.running else ""
    done, whole = run.planned
    unit = "environment steps" if run.kind == "control" else "responses"
    so_far = f"{done:,.0f} of {whole:,.0f} {unit}"
    if run.running:
        return f"It is still running: {so_far}."
    return "" if run.finished else f"It ended early, after {so_far}."
