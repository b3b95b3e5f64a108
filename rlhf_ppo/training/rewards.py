"""Rewards: scores of whole responses become rewards per token, shaped as the settings say, minus the KL's cost.

Score shaping is off by default. In this order:

1. ``normalize_scores``: each reward function's score s becomes (s - mean) / std over all its scores so far;
2. the weighted sum over the functions (``reward_weights``);
3. ``score_clip``: clipped to [-score_clip, score_clip];
4. ``missing_eos_penalty``, where no stop token ended the response: subtracted, or its negative replaces the score
   (``missing_eos_mode``).

Per-token rewards enter by their sum and are scaled where it is scaled (1 and 2); what else changes the sum is added on
the response's last token, so that a response's rewards add up to its shaped score.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_ppo.config.groups import RewardSettings
from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import kl_estimate, kl_penalized_rewards, masked_mean, masked_var
from rlhf_ppo.core.rewards import on_last_step
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.rewards.scoring import total_score
from rlhf_ppo.rewards.validation import Score
from rlhf_ppo.runtime.machine.device import exact_dtype


@dataclass
class RunningMoments:
    """Count, mean and spread of all numbers so far, in float64."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of the squared distances from the mean."""

    def add(self, values: Iterable[float]) -> None:
        """Add numbers. Source: Welford, "Note on a Method for Calculating Corrected Sums" (1962)."""
        for value in values:
            self.count += 1
            distance = value - self.mean
            self.mean += distance / self.count
            self.squares += distance * (value - self.mean)

    @property
    def std(self) -> float:
        """Population standard deviation; 1 where it is undefined or 0."""
        std = math.sqrt(self.squares / self.count) if self.count else 0.0
        return std if std > 1e-8 else 1.0


@dataclass
class ScoreStatistics:
    """Running moments of each reward function's scores over the rollouts that were trained on."""

    moments: dict[str, RunningMoments] = field(default_factory=dict)

    def add(self, rollout: Rollout) -> None:
        """Add a rollout's scores, except those of unscored responses (None, or dropped as non-finite)."""
        assert rollout.scored is not None
        for name, part in rollout.score_parts.items():
            kept = [float(s) for s, ok in zip(part, rollout.scored.tolist(), strict=True) if ok and s is not None]
            self.moments.setdefault(name, RunningMoments()).add(kept)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {name: dataclasses.asdict(moments) for name, moments in self.moments.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        self.moments = {name: RunningMoments(**moments) for name, moments in state.items()}


class ShapedScores(NamedTuple):
    """Scores after shaping."""

    scores: Tensor
    """[B] one per response."""
    rewards: Tensor
    """[B] the same, or [B, T] spread over tokens where a reward function scored tokens."""
    metrics: dict[str, float]


class Rewards(NamedTuple):
    """Rewards of a rollout's tokens."""

    per_token: Tensor
    """[B, T] shaped scores minus the KL's cost; 0 outside ``mask``."""
    mask: Tensor
    """[B, T] bool, the policy's tokens in scored responses."""
    scores: Tensor
    """[B] after shaping, before the KL's cost."""
    kl_coef: float
    score_statistics: ScoreStatistics
    """The running statistics with this rollout's scores; the state's, once the update has been accepted."""
    metrics: dict[str, float]
    """What score shaping reports."""


def shape_rewards(
    rollout: Rollout, args: RLHFConfig, kl_coef: float, score_statistics: ScoreStatistics | None = None
) -> Rewards:
    """Shape a rollout's scores and charge the KL to the reference.

    Args:
        rollout: scored, with reference log-probs.
        args: score shaping, KL estimator.
        kl_coef: weight of the KL now.
        score_statistics: the running statistics of the rollouts before this one, for ``normalize_scores``.
    Raises:
        ValueError: the rollout was not scored.
    """
    if rollout.scores is None or rollout.scored is None or rollout.ref_logprobs is None:
        raise ValueError("this rollout has no scores or reference log-probs; make it with trainer.rollout(prompts)")
    statistics = copy.deepcopy(score_statistics) or ScoreStatistics()
    if args.normalize_scores:
        statistics.add(rollout)
    # An unscored response is left out as though it had not been sampled.
    mask = rollout.mask & rollout.scored[:, None]
    shaped = shape_scores(rollout, mask, args, statistics if args.normalize_scores else None)
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, args.kl_estimator)
    per_token = kl_penalized_rewards(shaped.rewards, kl.to(shaped.rewards.dtype), mask, kl_coef)
    return Rewards(per_token, mask, shaped.scores, kl_coef, statistics, shaped.metrics)


def with_scores(rollout: Rollout, parts: dict[str, list[Score]], weights: Sequence[float]) -> Rollout:
    """Add the weighted sum of the scores, per response and, where a function scored tokens, per token.

    Args:
        rollout: B responses.
        parts: name -> [B] scores of one reward function.
        weights: one per function.
    """
    device, dtype = rollout.mask.device, exact_dtype(rollout.mask.device)
    score_parts = {name: [total_score(value) for value in part] for name, part in parts.items()}
    rows = list(zip(*score_parts.values(), strict=True))
    scored = torch.tensor([None not in row for row in rows], device=device)
    totals = [
        0.0 if None in row else sum(w * float(s or 0.0) for w, s in zip(weights, row, strict=True)) for row in rows
    ]
    token_parts: dict[str, Tensor] = {}
    for name, part in parts.items():
        if any(isinstance(value, list) for value in part):
            token_parts[name] = torch.zeros(rollout.mask.shape, dtype=dtype, device=device)
            for i, value in enumerate(part):
                if isinstance(value, list) and scored[i]:
                    token_parts[name][i, rollout.mask[i]] = torch.tensor(value, dtype=dtype, device=device)
    token_scores = [w * token_parts[name] for w, name in zip(weights, parts, strict=True) if name in token_parts]
    return dataclasses.replace(
        rollout,
        scores=torch.tensor(totals, dtype=dtype, device=device),
        scored=scored,
        score_parts=score_parts,
        token_score_parts=token_parts,
        token_scores=torch.stack(token_scores).sum(dim=0) if token_scores else None,
    )


def shape_scores(
    rollout: Rollout, mask: Tensor, args: RewardSettings, statistics: ScoreStatistics | None = None
) -> ShapedScores:
    """Shape a rollout's scores, in the order that this module's docstring lists.

    Args:
        rollout: scored.
        mask: [B, T] bool, the tokens to train on; rows without any are left out of the metrics.
        args: clip and penalty.
        statistics: the running statistics for ``normalize_scores``, this rollout's scores included; None: scores are
            not normalised.
    """
    assert rollout.scores is not None
    scores, tokens, metrics = rollout.scores, rollout.token_scores, {}
    if statistics is not None:
        scores, tokens = _normalized(rollout, args, statistics)
        for name, moments in statistics.moments.items():
            metrics[f"score/running_mean/{name}"] = moments.mean
            metrics[f"score/running_std/{name}"] = moments.std
    scored = mask.any(dim=1)
    if args.score_clip is not None:
        metrics["score/clipped_fraction"] = float(masked_mean((scores.abs() > args.score_clip).float(), scored))
        scores = scores.clamp(-args.score_clip, args.score_clip)
    if args.missing_eos_penalty is not None:
        # `finished` was recorded while sampling, with the stop tokens of this run.
        if args.missing_eos_mode == "replace":
            scores = torch.where(rollout.finished, scores, torch.full_like(scores, -args.missing_eos_penalty))
            tokens = None if tokens is None else tokens * rollout.finished[:, None]
        else:
            scores = scores - args.missing_eos_penalty * (~rollout.finished).to(scores.dtype)
    metrics["score/shaped_mean"] = float(masked_mean(scores, scored))
    metrics["score/shaped_std"] = float(masked_var(scores, scored).sqrt())
    return ShapedScores(scores, scores if tokens is None else _on_tokens(scores, tokens, mask), metrics)


def _normalized(rollout: Rollout, args: RewardSettings, statistics: ScoreStatistics) -> tuple[Tensor, Tensor | None]:
    assert rollout.scores is not None
    weights = args.reward_weights or (1.0,) * len(rollout.score_parts)
    scores = torch.zeros_like(rollout.scores)
    tokens = None if rollout.token_scores is None else torch.zeros_like(rollout.token_scores)
    for (name, part), weight in zip(rollout.score_parts.items(), weights, strict=True):
        moments = statistics.moments[name]
        normal = [0.0 if score is None else weight * (score - moments.mean) / moments.std for score in part]
        scores += torch.tensor(normal, dtype=scores.dtype, device=scores.device)
        if tokens is not None and name in rollout.token_score_parts:
            tokens += weight / moments.std * rollout.token_score_parts[name]
    return scores, tokens


def _on_tokens(scores: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return rewards [B, T] that sum to the scores: those of the tokens, and the remainder on the last True step."""
    return tokens + on_last_step(scores - tokens.sum(dim=1), mask)
