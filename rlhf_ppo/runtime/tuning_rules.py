"""The tuning guide as rules: what can go wrong in a run, how its metrics show it, and which settings to change.

Longer than other files: each rule is a function and an entry of one table.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

FEWEST_UPDATES = 6
"""Fewest updates from which a run is judged."""


class RunMetrics:
    """The metrics of a run's updates, averaged over parts of the run."""

    def __init__(self, rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> None:
        """Keep the updates among ``rows`` of metrics.jsonl; ``settings``: name -> value."""
        first = settings.get("critic_warmup_rollouts") or 0  # the policy does not learn during the warm-up
        self.rows = [row for row in rows if "policy/loss" in row and row["progress/iteration"] > first]
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
        """Return its means over the first and the last tenth, at least three updates each; None if there are fewer."""
        values = self.values(key)
        part = max(len(values) // 10, 3)
        return (statistics.fmean(values[:part]), statistics.fmean(values[-part:])) if len(values) >= 2 * part else None

    def rises(self, *, within: float = 1.0) -> bool:
        """Whether score or return improved beyond its noise over the last part of the run (1: the whole)."""
        values = self.values("score/mean") or self.values("episode/return_mean")
        values = values[-max(int(within * len(values)), FEWEST_UPDATES) :]
        half = len(values) // 2
        if half < 2:
            return False
        before, after = values[:half], values[-half:]
        noise = (statistics.variance(before) / half + statistics.variance(after) / half) ** 0.5
        return statistics.fmean(after) - statistics.fmean(before) > 2 * noise


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


@dataclass(frozen=True)
class Move:
    """One setting to change."""

    setting: str
    how: str
    """The change in words, for the page."""
    change: Callable[[Any], Any]
    """Current value -> value to try; None: leave it."""


def times(setting: str, factor: float) -> Move:
    """Multiply a number (whole numbers stay whole, and at least 1)."""

    def change(value: Any) -> Any:
        if not value:
            return None
        return max(round(value * factor), 1) if isinstance(value, int) else float(f"{value * factor:.2g}")

    return Move(setting, f"`{setting}` x {factor:.2g}" if factor > 1 else f"`{setting}` / {1 / factor:.2g}", change)


def becomes(setting: str, value: Any) -> Move:
    """Switch on a setting that is off (None, False or 0)."""
    return Move(setting, f"`{setting}` {value}, if it is off", lambda now: None if now else value)


@dataclass(frozen=True)
class Rule:
    """One thing that can go wrong in a run."""

    name: str
    healthy: str
    """What a healthy run shows."""
    seen: Callable[[RunMetrics], str | None]
    """The symptom with its numbers, or None if the run does not show it."""
    meaning: str
    moves: tuple[Move, ...]


def _above(figure: float | None, limit: float) -> bool:
    return figure is not None and figure > limit


def _skipped(run: RunMetrics) -> str | None:
    total = sum(run.values("optim/skipped_steps"))
    return f"{total:.0f} optimizer steps were skipped" if total else None


def _disagree(run: RunMetrics) -> str | None:
    gap = max(run.values("policy/first_minibatch_max_abs_log_ratio"), default=0.0)
    return f"log-ratios of up to {gap:.2g} nats before any step" if gap > (0.5 if run.bf16 else 0.1) else None


def _rounding(run: RunMetrics) -> str | None:
    gap, clip = run.late("policy/first_minibatch_max_abs_log_ratio"), run.settings.get("clip_range") or 0.2
    if not run.bf16 or not _above(gap, clip) or _disagree(run) is not None:
        return None
    return f"bf16 rounding alone makes log-ratios of up to {gap:.2g} nats, and clip_range is {clip:g}"


def _no_signal(run: RunMetrics) -> str | None:
    spread = run.late("score/std")
    return f"scores differ by {spread:.2g} within a rollout" if spread is not None and spread < 1e-6 else None


def _too_fast(run: RunMetrics) -> str | None:
    clipped, kl = run.late("policy/clip_fraction"), run.late("policy/approx_kl")
    if not _above(clipped, 0.3) and not _above(kl, 0.05):
        return None
    return f"clip fraction {clipped or 0:.2f}, KL(old || new) {kl or 0:.3f} nats per action"


def _too_timid(run: RunMetrics) -> str | None:
    clipped, kl = run.whole("policy/clip_fraction"), run.whole("policy/approx_kl")
    if clipped is None or kl is None or clipped >= 0.01 or kl >= 1e-3:
        return None
    return f"clip fraction {clipped:.4f}, KL(old || new) {kl:.1e} nats per action"


def _cut_short(run: RunMetrics) -> str | None:
    epochs, asked = run.late("optim/epochs"), run.settings.get("num_epochs")
    if epochs is None or not asked or epochs >= 0.75 * asked:
        return None
    return f"target_kl stops updates after {epochs:.1f} of {asked} epochs"


def _deterministic(run: RunMetrics) -> str | None:
    values, ends = run.values("policy/entropy"), run.ends("policy/entropy")
    if ends is None:
        return None
    middle = statistics.median(values[: len(values) // 2][-3:])
    if ends[0] <= 0 or middle >= 0.1 * ends[0]:
        return None
    return f"entropy from {ends[0]:.3g} to {middle:.3g} nats per action by the middle of the run"


def _random(run: RunMetrics) -> str | None:
    ends = run.ends("policy/entropy")
    if ends is None or ends[1] < 0.95 * ends[0] or run.rises() or not run.settings.get("ent_coef"):
        return None
    return f"entropy still {ends[1] / ends[0]:.0%} of its start, and the score did not rise"


def _blind_critic(run: RunMetrics) -> str | None:
    explained, spread = run.late("value/explained_variance"), run.late("advantage/std")
    if explained is None or spread is None or explained >= -0.05:
        return None
    # Returns that are all alike leave nothing to explain.
    return f"explained variance {explained:.2f}" if spread > 0.02 * abs(run.late("value/return_mean") or 0) else None


def _scale(run: RunMetrics) -> str | None:
    level, spread = run.late("value/return_mean"), run.late("advantage/std")
    if not _above(abs(level or 0.0), 100) and not _above(spread, 100):
        return None
    return f"returns around {level or 0:.3g}, advantages of {spread or 0:.3g}"


def _gradient(run: RunMetrics) -> str | None:
    norm, limit = run.late("optim/grad_norm"), run.settings.get("max_grad_norm")
    if norm is None or not limit or norm <= 50 * limit:
        return None
    return f"gradient norm {norm:.3g}, clipped to {limit:g}"


def _drift(run: RunMetrics) -> str | None:
    kl, length = run.ends("kl/reference_nats_per_response"), run.ends("response/length_tokens")
    if kl is None or length is None or kl[1] <= 0.25 * length[1]:
        return None
    return f"{kl[1]:.1f} nats from the reference in {length[1]:.0f} tokens"


def _held_back(run: RunMetrics) -> str | None:
    kl = run.ends("kl/reference_nats_per_response")
    if kl is None or kl[1] > 0.1 or run.rises() or not run.settings.get("kl_coef"):
        return None
    return f"{kl[1]:.2f} nats from the reference, and the score did not rise"


def _never_stops(run: RunMetrics) -> str | None:
    ends = run.ends("response/eos_fraction")
    if ends is None or ends[0] < 0.2 or ends[1] > 0.5 * ends[0]:
        return None
    return f"responses that end with a stop token fell from {ends[0]:.0%} to {ends[1]:.0%}"


def _unfinished(run: RunMetrics) -> str | None:
    return "the score rose until the end" if run.rises(within=0.3) else None


CLIPPING = ("clip", "adaptive_clip", "dual_clip", "cispo")
"""Objectives that read clip_range."""

_SCALED = (becomes("normalize_rewards", True), becomes("normalize_scores", True))

_FP32 = Move("precision", "`precision` fp32", lambda now: None if now == "fp32" else "fp32")

RULES = (
    Rule(
        "non-finite numbers",
        "no skipped steps",
        _skipped,
        "Losses or gradients overflowed.",
        (times("learning_rate", 1 / 3), *_SCALED),
    ),
    Rule(
        "sampling and training disagree",
        "ratios of 1 before the first step, up to rounding: 0.1 nats in fp32, 0.5 in bf16",
        _disagree,
        "Log-probs recorded while decoding differ from those of a full forward pass, so clipping acts on noise.",
        (becomes("recompute_logprobs", True), _FP32),
    ),
    Rule(
        "rounding as large as the clip range",
        "log-ratios below clip_range before the first step",
        _rounding,
        "Some tokens are clipped before anything was learned from them. That costs signal, not correctness.",
        (_FP32, becomes("recompute_logprobs", True)),
    ),
    Rule(
        "no signal",
        "scores that vary within a rollout",
        _no_signal,
        "The reward is the same for every response, so all advantages are 0: check samples.jsonl and the reward.",
        (),
    ),
    Rule(
        "updates too large",
        "clip fraction below 0.3, KL(old || new) below 0.05 nats per action",
        _too_fast,
        "The policy moves further than its rollout supports. A larger max_grad_norm would make it worse.",
        (
            times("learning_rate", 1 / 3),
            times("num_epochs", 1 / 2),
            times("clip_range", 1 / 2),
            becomes("target_kl", 0.02),
        ),
    ),
    Rule(
        "updates too small",
        "clip fraction above 0.01, or KL(old || new) above 0.001 nats per action",
        _too_timid,
        "The rollouts are underused. Clipping is rare because the steps are small, not because all is well.",
        (times("learning_rate", 3), times("num_epochs", 2)),
    ),
    Rule(
        "updates stopped early",
        "at least three quarters of the epochs",
        _cut_short,
        "The first epochs use up what target_kl allows; the later ones never run.",
        (times("learning_rate", 1 / 2), times("num_epochs", 1 / 2)),
    ),
    Rule(
        "a deterministic policy early on",
        "at least a tenth of the initial entropy half-way",
        _deterministic,
        "Exploration has ended: what has not been tried by now will not be. If the task is solved, that is fine.",
        (becomes("ent_coef", 0.01), times("ent_coef", 3), times("learning_rate", 1 / 2), times("kl_coef", 2)),
    ),
    Rule(
        "a policy that stays random",
        "entropy falls as the score rises",
        _random,
        "The entropy bonus outweighs the reward.",
        (times("ent_coef", 1 / 3), times("learning_rate", 2)),
    ),
    Rule(
        "a critic worse than a constant",
        "explained variance above 0",
        _blind_critic,
        "Its values add noise to the advantages. With gae_lambda closer to 1 they matter less.",
        (
            becomes("critic_warmup_rollouts", 5),
            times("vf_coef", 2),
            Move("gae_lambda", "`gae_lambda` 0.99, if it is lower", lambda now: 0.99 if now and now < 0.99 else None),
            becomes("normalize_rewards", True),
        ),
    ),
    Rule(
        "large returns",
        "returns and advantages below 100",
        _scale,
        "The value loss grows with their square and dominates the gradient that policy and critic share.",
        _SCALED,
    ),
    Rule(
        "every gradient is clipped",
        "gradient norm below 50 times max_grad_norm",
        _gradient,
        "Only the direction is left, mostly the value loss's. A larger max_grad_norm would remove the protection.",
        (*_SCALED, times("vf_coef", 1 / 5)),
    ),
    Rule(
        "drift from the reference",
        "KL to the reference below 0.25 nats per token",
        _drift,
        "The policy leaves the language it started from, often to exploit the reward: read samples.jsonl.",
        (becomes("kl_coef", 0.05), times("kl_coef", 3)),
    ),
    Rule(
        "held back by the reference",
        "some KL to the reference, or a rising score",
        _held_back,
        "The KL penalty outweighs the reward.",
        (times("kl_coef", 1 / 3), times("learning_rate", 3)),
    ),
    Rule(
        "responses that no longer end",
        "as many stop tokens as at the start",
        _never_stops,
        "The reward favours length, or responses without an end.",
        (becomes("missing_eos_penalty", 1.0),),
    ),
    Rule(
        "not finished",
        "no rise of the score over the last third",
        _unfinished,
        "The score was still rising at the end.",
        (times("total_timesteps", 2), times("total_episodes", 2)),
    ),
)
