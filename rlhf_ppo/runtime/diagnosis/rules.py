"""Rules: what can go wrong in a run, what it means, and which settings to change; each is one entry of RULES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf_ppo.runtime.diagnosis import symptoms
from rlhf_ppo.runtime.diagnosis.symptoms import RunMetrics


@dataclass(frozen=True)
class Move:
    """One setting to change."""

    setting: str
    how: str
    """The change in words, for the page."""
    change: Callable[[Any], Any]
    """Current value -> value to try; None: leave it."""


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
    watched: str | None = None
    """Its name in ``stop_on``, one of :data:`rlhf_ppo.runtime.diagnosis.symptoms.WATCHED`; None: only runs that have
    ended, or whose user asks, are judged by it."""
    after: int = 10
    """Updates of a watched run before it is judged by this."""


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


CLIPPING = ("clip", "adaptive_clip", "dual_clip", "cispo", "dis")
"""Objectives that read clip_range."""

_SCALED = (
    becomes("normalize_values", True),
    becomes("normalize_rewards", True),
    becomes("normalize_scores", True),
)

_STRONGER_KL = (becomes("kl_coef", 0.05), times("kl_coef", 3))

_FP32 = Move("precision", "`precision` fp32", lambda now: None if now == "fp32" else "fp32")

RULES = (
    Rule(
        "non-finite numbers",
        "no skipped steps",
        symptoms.skipped,
        "Losses or gradients overflowed.",
        (times("learning_rate", 1 / 3), *_SCALED),
    ),
    Rule(
        "sampling and training disagree",
        "ratios of 1 before the first step, up to rounding: 0.1 nats in fp32, 0.5 in bf16",
        symptoms.disagree,
        "Log-probs recorded while decoding differ from those of a full forward pass, so clipping acts on noise.",
        (becomes("recompute_logprobs", True), _FP32),
    ),
    Rule(
        "rounding as large as the clip range",
        "log-ratios below clip_range before the first step",
        symptoms.rounding,
        "Some tokens are clipped before anything was learned from them. That costs signal, not correctness.",
        (_FP32, becomes("recompute_logprobs", True)),
    ),
    Rule(
        "no signal",
        "scores that vary within a rollout",
        symptoms.no_signal,
        "The reward is the same for every response, so all advantages are 0: check samples.jsonl and the reward.",
        (),
        watched="no_signal",
    ),
    Rule(
        "updates too large",
        "clip fraction below 0.3, KL(old || new) below 0.05 nats per action",
        symptoms.too_fast,
        "The policy moves further than its rollout supports. A larger max_grad_norm would make it worse.",
        (
            times("learning_rate", 1 / 3),
            times("num_epochs", 1 / 2),
            times("clip_range", 1 / 2),
            becomes("target_kl", 0.02),
        ),
        watched="too_fast",
    ),
    Rule(
        "updates too small",
        "clip fraction above 0.01, or KL(old || new) above 0.001 nats per action",
        symptoms.too_timid,
        "The rollouts are underused. Clipping is rare because the steps are small, not because all is well.",
        (times("learning_rate", 3), times("num_epochs", 2)),
    ),
    Rule(
        "updates stopped early",
        "at least three quarters of the epochs",
        symptoms.cut_short,
        "The first epochs use up what target_kl allows; the later ones never run.",
        (times("learning_rate", 1 / 2), times("num_epochs", 1 / 2)),
    ),
    Rule(
        "a deterministic policy",
        "at least a tenth of the initial entropy: of text throughout, of an agent half-way",
        symptoms.collapse,
        "Exploration has ended: what has not been tried by now will not be. If the task is solved, that is fine.",
        (becomes("ent_coef", 0.01), times("ent_coef", 3), times("learning_rate", 1 / 2), times("kl_coef", 2)),
        watched="collapse",
    ),
    Rule(
        "a policy that stays random",
        "entropy falls as the score rises",
        symptoms.random,
        "The entropy bonus outweighs the reward.",
        (times("ent_coef", 1 / 3), times("learning_rate", 2)),
    ),
    Rule(
        "a critic worse than a constant",
        "explained variance above 0",
        symptoms.blind_critic,
        "Its values add noise to the advantages. With gae_lambda closer to 1 they matter less.",
        (
            becomes("critic_warmup_rollouts", 5),
            times("vf_coef", 2),
            Move("gae_lambda", "`gae_lambda` 0.99, if it is lower", lambda now: 0.99 if now and now < 0.99 else None),
            becomes("normalize_rewards", True),
        ),
        watched="critic",
        after=20,
    ),
    Rule(
        "large returns",
        "returns and advantages below 100, or a critic in units of the returns' spread",
        symptoms.scale,
        "The value loss grows with their square and dominates the gradient that policy and critic share.",
        _SCALED,
    ),
    Rule(
        "every gradient is clipped",
        "gradient norm below 50 times max_grad_norm",
        symptoms.gradient,
        "Only the direction is left, mostly the value loss's. A larger max_grad_norm would remove the protection.",
        (*_SCALED, times("vf_coef", 1 / 5)),
    ),
    Rule(
        "drift from the reference",
        "KL to the reference below 0.25 nats per token",
        symptoms.drift,
        "The policy leaves the language it started from, often to exploit the reward: read samples.jsonl.",
        _STRONGER_KL,
        watched="kl",
    ),
    Rule(
        "KL above its target",
        "KL to the reference below twice kl_target",
        symptoms.off_target,
        "The controller cannot hold the policy back fast enough.",
        (times("kl_coef", 3), times("kl_horizon", 1 / 2), times("learning_rate", 1 / 2)),
        watched="kl",
    ),
    Rule(
        "KL below zero",
        "KL to the reference of 0 or more, but for noise",
        symptoms.below_zero,
        "The responses are not sampled from the policy whose log-probs are read: sampling and training disagree.",
        (becomes("recompute_logprobs", True), _FP32),
        watched="kl",
    ),
    Rule(
        "held back by the reference",
        "some KL to the reference, or a rising score",
        symptoms.held_back,
        "The KL penalty outweighs the reward.",
        (times("kl_coef", 1 / 3), times("learning_rate", 3)),
    ),
    Rule(
        "responses that no longer end",
        "as many stop tokens as at the start",
        symptoms.endless,
        "The reward favours length, or responses without an end.",
        (becomes("missing_eos_penalty", 1.0),),
        watched="endless",
    ),
    Rule(
        "length that runs away",
        "responses between half and twice their first length",
        symptoms.length,
        "If the reward is not about length, it pays for it by the way: look at score against length in samples.jsonl.",
        _STRONGER_KL,
        watched="length",
    ),
    Rule(
        "responses that repeat themselves",
        "as much repetition as at the start",
        symptoms.repeats,
        "The policy says again what the reward liked: read samples.jsonl.",
        _STRONGER_KL,
        watched="repetition",
    ),
    Rule(
        "a judge that disagrees",
        "a held-out judge's score that does not fall while the reward rises",
        symptoms.judge_disagrees,
        "The policy has found what the reward likes and the judge does not: the rest of the run may only widen this.",
        (times("total_episodes", 1 / 2), *_STRONGER_KL),
        watched="judge",
    ),
    Rule(
        "not finished",
        "no rise of the score over the last third",
        symptoms.unfinished,
        "The score was still rising at the end.",
        (times("total_timesteps", 2), times("total_episodes", 2)),
    ),
)
