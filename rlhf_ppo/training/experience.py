"""Experience: from a scored rollout to rewards, advantages and returns, and what to log about them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import (
    Experience,
    explained_variance,
    kl_estimate,
    kl_penalized_rewards,
    masked_mean,
    masked_var,
    masked_whiten,
    truncated_importance_weights,
)
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.training.advantages import comparable, estimate_advantages
from rlhf_ppo.training.rewards import ScoreStatistics, shape_scores


class Credit(NamedTuple):
    """What a rollout's tokens earned, and what an update is to learn from them."""

    experience: Experience
    """[B, T] the update's fixed facts."""
    rewards: Tensor
    """[B, T] shaped scores minus the KL cost."""
    advantages: Tensor
    """[B, T] before whitening."""
    shaping: dict[str, float]
    """Metrics of the score shaping."""


def estimate_credit(
    rollout: Rollout, args: RLHFConfig, *, kl_coef: float, score_statistics: ScoreStatistics | None = None
) -> Credit:
    """Rewards, advantages and returns of a rollout; arguments and errors are those of :func:`estimate`."""
    if rollout.scores is None or rollout.scored is None or rollout.ref_logprobs is None:
        raise ValueError("this rollout has no scores or reference log-probs; make it with trainer.rollout(prompts)")
    # A response that could not be scored is left out as though it had not been sampled.
    mask = rollout.mask & rollout.scored[:, None]
    shaped = shape_scores(rollout, mask, args, score_statistics)
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, args.kl_estimator)
    rewards = kl_penalized_rewards(shaped.rewards, kl, mask, kl_coef)
    # Nor does one learn from a response that has nothing to be compared with.
    mask = mask & comparable(rollout.scored, args)[:, None]
    advantages, returns = estimate_advantages(rewards, rollout.values, mask, args, turns=rollout.turns)
    # grpo's are already over the spread of their own group.
    whiten = args.normalize_advantages and args.advantage_estimator != "grpo"
    old = Experience(
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
    return Credit(old, rewards, advantages, shaped.metrics)


def estimate(
    rollout: Rollout, args: RLHFConfig, *, kl_coef: float, score_statistics: ScoreStatistics | None = None
) -> tuple[Experience, dict[str, float]]:
    """Rewards, advantages and returns of a rollout as the update's fixed facts, and what to log about them.

    Args:
        rollout: scored, with reference log-probs.
        args: KL estimator, score shaping, advantage estimator, gamma, lambdas, normalisation, importance weights.
        kl_coef: weight of the KL penalty now.
        score_statistics: for ``normalize_scores``, this rollout taken in.
    Returns:
        (experience [B, T], metrics).
    Raises:
        ValueError: the rollout was not scored.
    """
    old, rewards, advantages, shaping = estimate_credit(
        rollout, args, kl_coef=kl_coef, score_statistics=score_statistics
    )
    assert rollout.scored is not None and rollout.ref_logprobs is not None
    mask, returns = old.mask, old.returns
    reference_kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1").sum(dim=1).mean()
    metrics: dict[str, float] = {
        **score_metrics(rollout),
        **shaping,
        "reward/mean_per_response": float(rewards.sum() / rollout.scored.sum()),
        "kl/reference_nats_per_response": float(reference_kl),
        "kl/coef": kl_coef,
        "response/length_tokens": float(rollout.lengths.float().mean()),
        "response/eos_fraction": float(rollout.finished.float().mean()),
        **_turn_metrics(rollout),
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
    if old.weights is not None:
        capped = old.weights >= (args.importance_weight_cap or 0.0)
        metrics["policy/importance_weight_mean"] = float(masked_mean(old.weights, mask))
        metrics["policy/importance_capped_fraction"] = float(masked_mean(capped.float(), mask))
    return old, metrics


def _importance_weights(rollout: Rollout, cap: float | None) -> Tensor | None:
    """[B, T] weights of the recomputed log-probs against the sampler's, or None without a cap."""
    if cap is None:
        return None
    if rollout.sampled_logprobs is None:
        raise ValueError(
            f"importance_weight_cap={cap} needs the sampler's own log-probs, which this rollout lacks: make it with "
            "trainer.rollout(prompts) under recompute_logprobs=True"
        )
    return truncated_importance_weights(rollout.logprobs, rollout.sampled_logprobs, cap=cap)


def _turn_metrics(rollout: Rollout) -> dict[str, float]:
    if rollout.turns is None or rollout.context_full is None:
        return {}
    return {
        "response/turns": float((rollout.turns.amax(dim=1) + 1).float().mean()),
        "response/context_full_fraction": float(rollout.context_full.float().mean()),
    }


def score_metrics(rollout: Rollout) -> dict[str, float]:
    """Mean and spread of a rollout's scores, and each reward function's own mean."""
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


def describe(rollout: Rollout) -> list[dict[str, Any]]:
    """One row per response: prompt, completion, score (None where unscored), KL in nats, surprise, tokens, finished."""
    assert rollout.ref_logprobs is not None and rollout.scores is not None and rollout.scored is not None
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1").sum(dim=1).tolist()
    surprise = (-rollout.ref_logprobs.sum(dim=1) / rollout.lengths).tolist()
    scored, scores = rollout.scored.tolist(), rollout.scores.tolist()
    lengths, finished = rollout.lengths.tolist(), rollout.finished.tolist()
    return [
        {
            "prompt": prompt,
            "completion": completion,
            "score": scores[i] if scored[i] else None,
            "kl_nats": kl[i],
            "reference_nats_per_token": surprise[i],
            "tokens": lengths[i],
            "finished": finished[i],
            **({} if rollout.turns is None else {"turns": int(rollout.turns[i].max()) + 1}),
        }
        for i, (prompt, completion) in enumerate(zip(rollout.prompts, rollout.completions, strict=True))
    ]
