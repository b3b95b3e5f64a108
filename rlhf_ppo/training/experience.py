"""Experience: what an update learns from, estimated from a rollout and its rewards, and what to log about it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_ppo.config.groups import RolloutSettings
from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import (
    Experience,
    explained_variance,
    kl_estimate,
    masked_mean,
    masked_var,
    masked_whiten,
    truncated_importance_weights,
)
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.training.advantages import comparable, estimate_advantages
from rlhf_ppo.training.rewards import Rewards


class Estimates(NamedTuple):
    """What was estimated about a rollout."""

    experience: Experience
    """[B, T] what the update learns from."""
    advantages: Tensor
    """[B, T] before whitening."""
    rewards: Rewards
    metrics: dict[str, float]

    @property
    def nonfinite(self) -> dict[str, float]:
        """The non-finite metrics: a sign that advantages are, or were divided by something that is."""
        return {name: value for name, value in self.metrics.items() if not math.isfinite(value)}


def estimate(rollout: Rollout, rewards: Rewards, args: RLHFConfig) -> Estimates:
    """Estimate advantages and returns of a rollout.

    Args:
        rollout: scored, with reference log-probs.
        rewards: its rewards (:func:`rlhf_ppo.training.rewards.shape_rewards`).
        args: advantage estimator, gamma, lambdas, normalisation, importance weights.
    """
    assert rollout.scored is not None
    # A response without another to compare it with teaches nothing either.
    mask = rewards.mask & comparable(rollout.scored, args)[:, None]
    advantages, returns = estimate_advantages(rewards.per_token, rollout.values, mask, args, turns=rollout.turns)
    # grpo's are already divided by the spread of their own group.
    whiten = args.normalize_advantages and args.advantage_estimator != "grpo"
    experience = Experience(
        logprobs=rollout.logprobs,
        values=rollout.values,
        advantages=masked_whiten(advantages, mask) if whiten else advantages,
        returns=returns,
        mask=mask,
        weights=_importance_weights(rollout, args.importance_weight_cap),
        ref_logprobs=rollout.ref_logprobs,
        # Without an environment a response is one turn.
        turns=torch.zeros_like(mask, dtype=torch.long) if rollout.turns is None else rollout.turns,
    )
    metrics = {**_rollout_metrics(rollout, rewards), **_estimate_metrics(rollout, experience, advantages, args)}
    return Estimates(experience, advantages, rewards, metrics)


def _rollout_metrics(rollout: Rollout, rewards: Rewards) -> dict[str, float]:
    assert rollout.scored is not None and rollout.ref_logprobs is not None
    reference_kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1").sum(dim=1).mean()
    metrics = {
        **_score_metrics(rollout),
        **rewards.metrics,
        "reward/mean_per_response": float(rewards.per_token.sum() / rollout.scored.sum()),
        "kl/reference_nats_per_response": float(reference_kl),
        "kl/coef": rewards.kl_coef,
        "response/length_tokens": float(rollout.lengths.float().mean()),
        "response/eos_fraction": float(rollout.finished.float().mean()),
    }
    if rollout.turns is not None and rollout.context_full is not None:
        metrics["response/turns"] = float((rollout.turns.amax(dim=1) + 1).float().mean())
        metrics["response/context_full_fraction"] = float(rollout.context_full.float().mean())
    return metrics


def _score_metrics(rollout: Rollout) -> dict[str, float]:
    assert rollout.scores is not None and rollout.scored is not None
    scores = rollout.scores[rollout.scored]
    metrics = {
        "score/mean": float(scores.mean()),
        "score/std": float(scores.std(correction=0)),
        "score/unscored_fraction": float((~rollout.scored).float().mean()),
    }
    for name, part in rollout.score_parts.items():
        metrics[f"score/part/{name}"] = float(np.mean([value for value in part if value is not None]))
    return metrics


def _estimate_metrics(
    rollout: Rollout, experience: Experience, advantages: Tensor, args: RolloutSettings
) -> dict[str, float]:
    mask, returns, weights = experience.mask, experience.returns, experience.weights
    metrics = {
        "policy/entropy": float(masked_mean(rollout.entropy, mask)),
        "advantage/std": float(masked_var(advantages, mask).sqrt()),
    }
    if rollout.values is not None and returns is not None:
        metrics["value/explained_variance"] = float(explained_variance(rollout.values, returns, mask))
        metrics["value/mean"] = float(masked_mean(rollout.values, mask))
        metrics["value/return_mean"] = float(masked_mean(returns, mask))
    if rollout.cache_hit_fraction is not None:
        metrics["score/cache_hit_fraction"] = rollout.cache_hit_fraction
    if rollout.decode_gap is not None:
        metrics["policy/decode_gap_max_nats"] = rollout.decode_gap
    if weights is not None:
        capped = weights >= (args.importance_weight_cap or 0.0)
        metrics["policy/importance_weight_mean"] = float(masked_mean(weights, mask))
        metrics["policy/importance_capped_fraction"] = float(masked_mean(capped.float(), mask))
    return metrics


def _importance_weights(rollout: Rollout, cap: float | None) -> Tensor | None:
    """Compute weights [B, T] of the recomputed log-probs against the sampler's; None without a cap."""
    if cap is None:
        return None
    if rollout.sampled_logprobs is None:
        raise ValueError(
            f"importance_weight_cap={cap} needs the sampler's own log-probs, which this rollout lacks: make it with "
            "trainer.rollout(prompts) under recompute_logprobs=True"
        )
    return truncated_importance_weights(rollout.logprobs, rollout.sampled_logprobs, cap=cap)
