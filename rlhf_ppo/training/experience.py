"""Experience: what an update learns from, estimated from a rollout and its rewards, and what to log about it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_ppo.config.groups import CriticSettings, RolloutSettings
from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import (
    Experience,
    ValueScale,
    explained_variance,
    importance_weights,
    kl_estimate,
    masked_mean,
    masked_var,
    masked_whiten,
    update_value_scale,
)
from rlhf_ppo.core.masked import keep
from rlhf_ppo.generation.repetition import distinct_fraction, repeated_fraction
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.runtime.machine.device import exact_dtype
from rlhf_ppo.training.advantages import comparable, estimate_advantages, with_signal
from rlhf_ppo.training.rewards import Rewards


class Estimates(NamedTuple):
    """What was estimated about a rollout."""

    experience: Experience
    """[B, T] what the update learns from."""
    advantages: Tensor
    """[B, T] before whitening, in the reward's units."""
    values: Tensor | None
    """[B, T] the critic's, in the reward's units."""
    value_scale: ValueScale | None
    """The units of the values and returns in ``experience``; the critic's, once the update begins."""
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
    taught = comparable(rollout.scored, args)
    if args.zero_signal_prompts != "keep":
        taught = taught & with_signal(rewards.scores, rewards.mask.any(dim=1), args.num_generations)
    mask = rewards.mask & taught[:, None]
    scale, values, normal, whole = ValueScale(), rollout.values, rollout.values, None
    if rollout.values is not None:
        whole = _whole_returns(rollout, rewards, mask, args)
        scale = _next_scale(rollout.value_scale, whole, mask, rewards.kl_coef, args)
        # A fresh head's values are the mean of these returns, which 0 is in the new units.
        fresh = rollout.value_scale is None
        normal = keep(rollout.values if fresh else scale.normalize(rollout.values), mask)
        values = keep(scale.denormalize(normal.to(rewards.per_token.dtype)), mask)
    advantages, returns = estimate_advantages(rewards.per_token, values, mask, args, turns=rollout.turns)
    # grpo's are already divided by the spread of their own group.
    whiten = args.normalize_advantages and args.advantage_estimator != "grpo"
    dtype = rollout.logprobs.dtype
    experience = Experience(
        logprobs=rollout.logprobs,
        values=None if normal is None else normal.to(dtype),
        # In units of the returns' spread, so that whitening's epsilon means the same for every reward.
        advantages=(masked_whiten(advantages / scale.std, mask) if whiten else advantages).to(dtype),
        returns=None if returns is None else keep(scale.normalize(returns), mask).to(dtype),
        mask=mask,
        weights=_importance_weights(rollout, mask, args),
        ref_logprobs=rollout.ref_logprobs,
        # Without an environment a response is one turn.
        turns=torch.zeros_like(mask, dtype=torch.long) if rollout.turns is None else rollout.turns,
        sampled_logprobs=rollout.sampled_logprobs if args.objective == "dis" else None,
        positive=_positive_examples(rollout, mask, args),
    )
    metrics = {
        **_rollout_metrics(rollout, rewards),
        **_signal_metrics(rewards, args),
        **_estimate_metrics(rollout, experience, advantages, scale, args),
        **_value_metrics(values, whole, mask, scale, args),
    }
    return Estimates(experience, advantages, values, None if values is None else scale, rewards, metrics)


def _whole_returns(rollout: Rollout, rewards: Rewards, mask: Tensor, args: RLHFConfig) -> Tensor:
    """Compute Monte Carlo returns [B, T]: what really followed each token, whatever the critic predicted."""
    whole = dataclasses.replace(args, gae_lambda=1.0, gae_lambda_value=None, adaptive_lambda_alpha=None)
    _, returns = estimate_advantages(
        rewards.per_token, torch.zeros_like(rewards.per_token), mask, whole, turns=rollout.turns
    )
    assert returns is not None
    return returns


def _next_scale(
    scale: ValueScale | None, returns: Tensor, mask: Tensor, kl_coef: float, args: CriticSettings
) -> ValueScale:
    """Return the critic's scale with this rollout's whole returns."""
    if not args.normalize_values:
        return scale or ValueScale()
    # Where all scores are equal, what is left is the KL of a policy that has not moved: rounding, not a unit.
    return update_value_scale(scale, returns, mask, min_std=kl_coef)


def _rollout_metrics(rollout: Rollout, rewards: Rewards) -> dict[str, float]:
    assert rollout.scored is not None and rollout.ref_logprobs is not None
    reference_kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1").sum(dim=1).mean()
    metrics = {
        **_score_metrics(rollout),
        **_writing_metrics(rollout),
        **rewards.metrics,
        "reward/mean_per_response": float(rewards.per_token.sum() / rollout.scored.sum()),
        "kl/reference_nats_per_response": float(reference_kl),
        "kl/coef": rewards.kl_coef,
        "response/length_tokens": float(rollout.lengths.float().mean()),
        "response/eos_fraction": float(rollout.finished.float().mean()),
    }
    metrics |= {f"reward/logged/{name}": value for name, value in rollout.logged_metrics.items()}
    if rollout.turns is not None and rollout.context_full is not None:
        metrics["response/turns"] = float((rollout.turns.amax(dim=1) + 1).float().mean())
        metrics["response/context_full_fraction"] = float(rollout.context_full.float().mean())
    if rollout.tool_counts is not None:
        metrics |= _tool_metrics(rollout.tool_counts)
    return metrics


def _tool_metrics(counts: Sequence[Mapping[str, int]]) -> dict[str, float]:
    calls, malformed, errors = (sum(row[name] for row in counts) for name in ("calls", "malformed", "errors"))
    return {
        "tools/calls_per_response": calls / len(counts),
        "tools/malformed_fraction": malformed / max(1, calls),
        "tools/error_fraction": errors / max(1, calls),
    }


def _writing_metrics(rollout: Rollout) -> dict[str, float]:
    """Measure repetition, diversity, and whether longer responses score higher."""
    assert rollout.scores is not None and rollout.scored is not None
    ids, mask, scored = rollout.response_ids, rollout.mask, rollout.scored
    metrics = {
        "response/repeated_fraction": float(repeated_fraction(ids, mask).mean()),
        "response/distinct_1": distinct_fraction(ids, mask, 1),
        "response/distinct_2": distinct_fraction(ids, mask, 2),
    }
    dtype = exact_dtype(mask.device)
    pairs = torch.stack([rollout.scores[scored].to(dtype), rollout.lengths[scored].to(dtype)])
    if pairs.shape[1] > 1 and bool((pairs.std(dim=1) > 1e-9).all()):
        metrics["score/length_correlation"] = float(torch.corrcoef(pairs)[0, 1])
    return metrics


def _score_metrics(rollout: Rollout) -> dict[str, float]:
    assert rollout.scores is not None and rollout.scored is not None
    scores = rollout.scores[rollout.scored]
    metrics = {
        "score/mean": float(scores.mean()),
        "score/std": float(scores.std(correction=0)),
        "score/unscored_fraction": float((~rollout.scored).float().mean()),
    }
    if rollout.token_scores is not None:
        taught = rollout.mask & rollout.scored[:, None]
        metrics["score/token_std"] = float(rollout.token_scores[taught].std(correction=0))
    for name, part in rollout.score_parts.items():
        metrics[f"score/part/{name}"] = float(np.mean([value for value in part if value is not None]))
    return metrics


def _signal_metrics(rewards: Rewards, args: RLHFConfig) -> dict[str, float]:
    """Measure how many prompts have responses that all score alike."""
    size = args.num_generations
    if size < 2 or len(rewards.scores) % size:
        return {}
    silent = ~with_signal(rewards.scores, rewards.mask.any(dim=1), size)[::size]
    dropped = {} if args.zero_signal_prompts == "keep" else {"score/dropped_prompts": float(silent.sum())}
    return {"score/zero_signal_fraction": float(silent.float().mean()), **dropped}


def _estimate_metrics(
    rollout: Rollout, experience: Experience, advantages: Tensor, scale: ValueScale, args: RolloutSettings
) -> dict[str, float]:
    mask, weights = experience.mask, experience.weights
    metrics = {
        "policy/entropy": float(masked_mean(rollout.entropy, mask)),
        # In float32, so that a return which whitening would leave the others advantages of 0 beside shows as infinite.
        "advantage/std": float(masked_var((advantages / scale.std).float(), mask).sqrt()) * scale.std,
    }
    if experience.positive is not None and rollout.scored is not None:
        metrics["score/positive_fraction"] = float(experience.positive.any(dim=1).sum() / rollout.scored.sum())
    if rollout.cache_hit_fraction is not None:
        metrics["score/cache_hit_fraction"] = rollout.cache_hit_fraction
    if rollout.decode_gap is not None:
        metrics["policy/decode_gap_max_nats"] = rollout.decode_gap
    if rollout.foreign and rollout.sampled_logprobs is not None:
        gaps = (rollout.logprobs - rollout.sampled_logprobs).abs()
        metrics["policy/sampler_gap_mean_nats"] = float(masked_mean(gaps, rollout.mask))
    if rollout.staleness is not None:
        metrics["policy/staleness_updates"] = float(rollout.staleness.float().mean())
    if weights is not None:
        capped = (weights >= (args.importance_weight_cap or 2.0)) | (weights == 0)  # truncated, or masked
        metrics["policy/importance_weight_mean"] = float(masked_mean(weights, mask))
        metrics["policy/importance_capped_fraction"] = float(masked_mean(capped.float(), mask))
    return metrics


def _value_metrics(
    values: Tensor | None, returns: Tensor | None, mask: Tensor, scale: ValueScale, args: CriticSettings
) -> dict[str, float]:
    """Measure the critic on whole returns: the targets under lambda below 1 hold its own predictions."""
    if values is None or returns is None:
        return {}
    metrics = {
        "value/explained_variance": float(explained_variance(values, returns, mask)),
        "value/mean": float(masked_mean(values, mask)),
        "value/return_mean": float(masked_mean(returns, mask)),
        "value/return_std": scale.std,
    }
    if args.clip_range_vf is not None:
        metrics["value/clip_range"] = args.clip_range_vf * scale.std
    return metrics


def _positive_examples(rollout: Rollout, mask: Tensor, args: RLHFConfig) -> Tensor | None:
    """Return [B, T] bool, True on the actions of responses that scored above the bound; None without such a loss."""
    if args.positive_loss_coef == 0:
        return None
    assert rollout.scores is not None and rollout.scored is not None
    # A response is imitated also where no other is compared with it, but not one that is left out with its prompt.
    considered = rollout.mask if args.zero_signal_prompts == "keep" else mask
    return considered & (rollout.scored & (rollout.scores > args.positive_score_above))[:, None]


def _importance_weights(rollout: Rollout, mask: Tensor, args: RLHFConfig) -> Tensor | None:
    """Compute weights [B, T] of the recomputed log-probs against the sampler's; None where settings want none."""
    level = args.importance_level(foreign=rollout.foreign)
    if level == "none":
        return None
    if rollout.sampled_logprobs is None:
        name = "importance_weights" if args.importance_weight_cap is None else "importance_weight_cap"
        raise ValueError(
            f"{name}={getattr(args, name)!r} needs the sampler's own log-probs, which this rollout lacks: make it with "
            "trainer.rollout(prompts) under recompute_logprobs=True"
        )
    cap, mode = args.importance_weight_cap or 2.0, args.importance_weight_mode
    return importance_weights(rollout.logprobs, rollout.sampled_logprobs, mask, cap=cap, level=level, mode=mode)
