"""Symptoms of an unhealthy run, each found in its metrics; :mod:`rlhf_ppo.runtime.diagnosis.rules` says the remedy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rlhf_ppo.runtime.diagnosis import healthy

FEWEST_UPDATES = 6
"""Fewest updates from which a run is judged."""

WATCHED = ("no_signal", "too_fast", "collapse", "critic", "kl", "length", "endless", "repetition", "judge")
"""Names, in ``stop_on``, of the symptoms that a run is watched for while it trains."""


class RunMetrics:
    """The metrics of a run's updates, averaged over parts of the run."""

    def __init__(self, rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> None:
        """Keep the updates among ``rows`` of metrics.jsonl; ``settings``: name -> value."""
        first = settings.get("critic_warmup_rollouts")  # the policy does not learn during the warm-up
        first = first if isinstance(first, (int, float)) else 0  # a damaged run.json may hold anything
        self.rows = [row for row in rows if "policy/loss" in row and row.get("progress/iteration", 0) > first]
        self.settings = settings

    @property
    def bf16(self) -> bool:
        """Whether the run computed, or may have, in bf16, which rounds differently in decoding and training."""
        computed = self.settings.get("fingerprints", {}).get("bf16")
        return self.settings.get("precision", "fp32") != "fp32" if computed is None else computed

    def values(self, key: str) -> list[float]:
        """Return a metric's values, in order, from the updates that logged it."""
        return [row[key] for row in self.rows if key in row]

    def whole(self, key: str) -> float | None:
        """Return its mean over the run, or None if it was never logged."""
        return _mean(self.values(key))

    def late(self, key: str) -> float | None:
        """Return its mean over the second half."""
        values = self.values(key)
        return _mean(values[len(values) // 2 :])

    def ends(self, key: str) -> tuple[float, float] | None:
        """Return its means over the first and the last tenth, 3 to 5 updates at least; None if there are fewer."""
        values = self.values(key)
        part = max(len(values) // 10, 3, min(len(values) // 4, 5))
        return (statistics.fmean(values[:part]), statistics.fmean(values[-part:])) if len(values) >= 2 * part else None

    def until(self, key: str, part: float) -> list[float]:
        """Return a metric's values in the first part of the run, as it is planned (1: the whole)."""
        counted = (("progress/episodes", "total_episodes"), ("progress/env_steps", "total_timesteps"))
        for done, total in counted:
            if self.settings.get(total) and all(done in row for row in self.rows):
                end = part * self.settings[total]
                return [row[key] for row in self.rows if key in row and row[done] <= end]
        values = self.values(key)
        return values[: int(part * len(values))]

    def change(self, key: str, *, within: float = 1.0) -> tuple[float, float]:
        """Return a metric's change between the halves of the last part of the run (1: the whole), and its noise.

        The noise is the change's standard error; infinite where there are too few updates.
        """
        values = self.values(key)
        values = values[-max(int(within * len(values)), FEWEST_UPDATES) :]
        half = len(values) // 2
        if half < 2:
            return 0.0, float("inf")
        before, after = values[:half], values[-half:]
        noise = (statistics.variance(before) / half + statistics.variance(after) / half) ** 0.5
        return statistics.fmean(after) - statistics.fmean(before), noise

    def rises(self, *, within: float = 1.0) -> bool:
        """Whether score or return improved beyond its noise over the last part of the run (1: the whole)."""
        change, noise = self.change("score/mean" if self.values("score/mean") else "episode/return_mean", within=within)
        return change > 2 * noise

    def falls(self) -> bool:
        """Whether it fell beyond its noise over the run."""
        change, noise = self.change("score/mean" if self.values("score/mean") else "episode/return_mean")
        return change < -2 * noise


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _above(figure: float | None, limit: float) -> bool:
    return figure is not None and figure > limit


# Symptoms: each says what it sees, with its numbers, or returns None.


def skipped(run: RunMetrics) -> str | None:
    total = sum(run.values("optim/skipped_steps"))
    return f"{total:.0f} optimizer steps were skipped" if total else None


def disagree(run: RunMetrics) -> str | None:
    gap = max(run.values("policy/first_minibatch_max_abs_log_ratio"), default=0.0)
    return (
        f"log-ratios of up to {gap:.2g} nats before any step" if gap > healthy.log_ratio_bound(bf16=run.bf16) else None
    )


def rounding(run: RunMetrics) -> str | None:
    gap, clip = run.late("policy/first_minibatch_max_abs_log_ratio"), run.settings.get("clip_range") or 0.2
    if not run.bf16 or not _above(gap, clip) or disagree(run) is not None:
        return None
    return f"bf16 rounding alone makes log-ratios of up to {gap:.2g} nats, and clip_range is {clip:g}"


def no_signal(run: RunMetrics) -> str | None:
    if run.settings.get("rollout_batch_size") == 1:  # a single score has no spread
        scores = run.values("score/mean")
        scores = scores[len(scores) // 2 :]
        alike = len(scores) > 1 and max(scores) - min(scores) < 1e-6 and not _above(run.late("score/token_std"), 1e-6)
        return f"the scores of {len(scores)} updates differ by {max(scores) - min(scores):.2g}" if alike else None
    spread, advantages = run.late("score/std"), run.late("advantage/std")
    if _above(run.late("score/token_std"), 1e-6):
        spread = None  # alike in sum, but not in place
    if spread is not None and spread < 1e-6:
        return f"scores differ by {spread:.2g} within a rollout"
    return f"advantages differ by {advantages:.2g}" if advantages is not None and advantages < 1e-8 else None


def too_fast(run: RunMetrics) -> str | None:
    clipped, kl = run.late("policy/clip_fraction"), run.late("policy/approx_kl")
    if not _above(clipped, healthy.CLIP_FRACTION[1]) and not _above(kl, healthy.APPROX_KL[1]):
        return None
    return f"clip fraction {clipped or 0:.2f}, KL(old || new) {kl or 0:.3f} nats per action"


def too_timid(run: RunMetrics) -> str | None:
    clipped, kl = run.whole("policy/clip_fraction"), run.whole("policy/approx_kl")
    if clipped is None or kl is None or clipped >= healthy.CLIP_FRACTION[0] or kl >= healthy.APPROX_KL[0]:
        return None
    return f"clip fraction {clipped:.4f}, KL(old || new) {kl:.1e} nats per action"


def cut_short(run: RunMetrics) -> str | None:
    epochs, asked = run.late("optim/epochs"), run.settings.get("num_epochs")
    if epochs is None or not asked or epochs >= healthy.EPOCHS * asked:
        return None
    return f"target_kl stops updates after {epochs:.1f} of {asked} epochs"


def collapse(run: RunMetrics) -> str | None:
    ends = run.ends("policy/entropy")
    # An agent that has solved its task may be deterministic at the end; text should not be.
    values = run.until("policy/entropy", 1.0 if run.values("score/mean") else 0.5)
    if ends is None or ends[0] <= 0 or len(values) < FEWEST_UPDATES // 2:
        return None
    last = statistics.median(values[-3:])
    return (
        f"entropy from {ends[0]:.3g} to {last:.3g} nats per action" if last < healthy.ENTROPY_LEFT * ends[0] else None
    )


def random(run: RunMetrics) -> str | None:
    ends = run.ends("policy/entropy")
    if ends is None or ends[1] < 0.95 * ends[0] or run.rises() or not run.settings.get("ent_coef"):
        return None
    return f"entropy still {ends[1] / ends[0]:.0%} of its start, and the score did not rise"


def blind_critic(run: RunMetrics) -> str | None:
    explained, spread = run.late("value/explained_variance"), run.late("advantage/std")
    if explained is None or spread is None or explained >= healthy.EXPLAINED_VARIANCE:
        return None
    # Returns that are all alike leave nothing to explain.
    return f"explained variance {explained:.2f}" if spread > 0.02 * abs(run.late("value/return_mean") or 0) else None


def scale(run: RunMetrics) -> str | None:
    if run.settings.get("normalize_values"):
        return None
    level, spread = run.late("value/return_mean"), run.late("advantage/std")
    if not _above(abs(level or 0.0), healthy.LARGE) and not _above(spread, healthy.LARGE):
        return None
    return f"returns around {level or 0:.3g}, advantages of {spread or 0:.3g}"


def gradient(run: RunMetrics) -> str | None:
    norm, limit = run.late("optim/grad_norm"), run.settings.get("max_grad_norm")
    if norm is None or not limit or norm <= healthy.GRADIENT * limit:
        return None
    return f"gradient norm {norm:.3g}, clipped to {limit:g}"


def drift(run: RunMetrics) -> str | None:
    kl, length = run.ends("kl/reference_nats_per_response"), run.ends("response/length_tokens")
    if kl is None or length is None or kl[1] <= healthy.KL_PER_TOKEN * length[1]:
        return None
    return f"{kl[1]:.1f} nats from the reference in {length[1]:.0f} tokens"


def off_target(run: RunMetrics) -> str | None:
    target, kl = run.settings.get("kl_target"), run.late("kl/reference_nats_per_response")
    if not target or kl is None or kl <= 2 * target:
        return None
    return f"KL to the reference {kl:.3g} nats per response, with kl_target={target:g}"


def below_zero(run: RunMetrics) -> str | None:
    kl, length = run.late("kl/reference_nats_per_response"), run.late("response/length_tokens")
    if kl is None or length is None or kl >= min(-1.0, -0.02 * length):
        return None
    return f"KL to the reference {kl:.3g} nats per response"


def held_back(run: RunMetrics) -> str | None:
    kl = run.ends("kl/reference_nats_per_response")
    if kl is None or kl[1] > 0.1 or run.rises() or not run.settings.get("kl_coef"):
        return None
    return f"{kl[1]:.2f} nats from the reference, and the score did not rise"


def endless(run: RunMetrics) -> str | None:
    ends = run.ends("response/eos_fraction")
    if ends is None or ends[0] < 0.2 or ends[1] > 0.5 * ends[0]:
        return None
    return f"responses that end with a stop token fell from {ends[0]:.0%} to {ends[1]:.0%}"


def length(run: RunMetrics) -> str | None:
    ends = run.ends("response/length_tokens")
    if ends is None or min(ends) > 0.5 * max(ends) or abs(ends[1] - ends[0]) < 8:
        return None
    return f"responses went from {ends[0]:.0f} to {ends[1]:.0f} tokens"


def repeats(run: RunMetrics) -> str | None:
    ends = run.ends("response/repeated_fraction")
    if ends is None or ends[1] < ends[0] + 0.2:
        return None
    return f"the share of four-token runs that a response repeats went from {ends[0]:.0%} to {ends[1]:.0%}"


def judge_disagrees(run: RunMetrics) -> str | None:
    change, noise = run.change("judge/score_mean")
    if not run.rises() or change >= -2 * noise:
        return None
    return f"the judge's score changed by {change:.3g} while the reward rose by {run.change('score/mean')[0]:.3g}"


def unfinished(run: RunMetrics) -> str | None:
    return "the score rose until the end" if run.rises(within=0.3) else None
