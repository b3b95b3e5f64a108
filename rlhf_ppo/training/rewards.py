"""Score shaping: from the scores as they were given to the ones that are learned from.

Each step is off by default. In this order:

1. ``normalize_scores``: each reward function's score s becomes (s - mean) / std over all its scores so far;
2. the weighted sum over the functions (``reward_weights``);
3. ``score_clip``: into [-score_clip, score_clip];
4. ``missing_eos_penalty``, for a response that no stop token of the run ended: subtracted, or its negative replaces the
   score (``missing_eos_mode``).

Rewards of single tokens take part with their sum. They are multiplied where the sum is multiplied (1 and 2); whatever
else happens to the sum lands on the response's last token, so that a response's rewards add up to its shaped score.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import masked_mean, masked_var
from rlhf_ppo.generation.rollout import Rollout


@dataclass
class RunningMoments:
    """Count, mean and spread of all numbers so far, in double precision."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of the squared distances from the mean."""

    def add(self, values: Iterable[float]) -> None:
        """Take numbers in. Source: Welford, "Note on a Method for Calculating Corrected Sums" (1962)."""
        for value in values:
            self.count += 1
            distance = value - self.mean
            self.mean += distance / self.count
            self.squares += distance * (value - self.mean)

    @property
    def std(self) -> float:
        """Population standard deviation; 1 while it is not to be had: fewer than two numbers, or all the same."""
        std = math.sqrt(self.squares / self.count) if self.count else 0.0
        return std if std > 1e-8 else 1.0


@dataclass
class ScoreStatistics:
    """Running moments of each reward function's scores over the rollouts that were trained on."""

    moments: dict[str, RunningMoments] = field(default_factory=dict)

    def add(self, rollout: Rollout) -> None:
        """Take a rollout's scores in, without those of responses that are left out (None, or dropped as not finite)."""
        assert rollout.scored is not None
        for name, part in rollout.score_parts.items():
            kept = [float(s) for s, ok in zip(part, rollout.scored.tolist(), strict=True) if ok and s is not None]
            self.moments.setdefault(name, RunningMoments()).add(kept)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: dataclasses.asdict(moments) for name, moments in self.moments.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.moments = {name: RunningMoments(**moments) for name, moments in state.items()}


class ShapedScores(NamedTuple):
    """Scores to learn from."""

    scores: Tensor
    """[B] one a response."""
    rewards: Tensor
    """[B] the same, or [B, T] the same spread over tokens where a reward function scored tokens."""
    metrics: dict[str, float]


def shape_scores(
    rollout: Rollout, mask: Tensor, args: RLHFConfig, statistics: ScoreStatistics | None = None
) -> ShapedScores:
    """Shape a rollout's scores as the settings say (the order is this module's first text).

    Args:
        rollout: scored.
        mask: [B, T] bool, the tokens that are trained on; its rows without any are left out of the metrics.
        args: clip and penalties.
        statistics: the running moments for ``normalize_scores``, this rollout taken in; None: no normalisation.
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


def _normalized(rollout: Rollout, args: RLHFConfig, statistics: ScoreStatistics) -> tuple[Tensor, Tensor | None]:
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
    """Rewards [B, T] that sum to the scores: those of the tokens, and what is left on the last True step."""
    last = mask & (mask.flip(1).cumsum(dim=1).flip(1) == 1)
    return tokens + last * (scores - tokens.sum(dim=1))[:, None]
