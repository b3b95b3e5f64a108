"""Experience: from a scored rollout to rewards, advantages and returns, and what to log about them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_ppo.config import RLHFConfig
from rlhf_ppo.core import (
    Experience,
    compute_gae,
    explained_variance,
    kl_estimate,
    kl_penalized_rewards,
    masked_mean,
    masked_var,
    masked_whiten,
)
from rlhf_ppo.rollout import Rollout
from rlhf_ppo.turn_credit import to_tokens, to_turns


def estimate(rollout: Rollout, args: RLHFConfig, *, kl_coef: float) -> tuple[Experience, dict[str, float]]:
    """Rewards, advantages and returns of a rollout as the update's fixed facts, and what to log about them.

    Args:
        rollout: scored, with reference log-probs.
        args: KL estimator, penalties, gamma, lambda, normalisation.
        kl_coef: weight of the KL penalty now.
    Returns:
        (experience [B, T], metrics).
    Raises:
        ValueError: the rollout was not scored.
    """
    if rollout.scores is None or rollout.scored is None or rollout.ref_logprobs is None:
        raise ValueError("this rollout has no scores or reference log-probs; make it with trainer.rollout(prompts)")
    # A response that could not be scored is left out as though it had not been sampled.
    mask = rollout.mask & rollout.scored[:, None]
    scores = rollout.scores - (args.missing_eos_penalty or 0.0) * (~rollout.finished).float()
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, args.kl_estimator)
    rewards = kl_penalized_rewards(scores, kl, mask, kl_coef)
    values = torch.zeros_like(rewards) if rollout.values is None else rollout.values
    gae_lambda = 1.0 if args.objective == "reinforce" else args.gae_lambda
    if args.turn_credit == "turn" and rollout.turns is not None:
        steps = to_turns(rewards, values, rollout.turns, mask)
        by_turn = _gae(*steps, gamma=args.gamma_turn, gae_lambda=gae_lambda)
        advantages, returns = (to_tokens(x, rollout.turns, mask) for x in by_turn)
    else:
        advantages, returns = _gae(rewards, values, mask, gamma=args.gamma, gae_lambda=gae_lambda)
    old = Experience(
        logprobs=rollout.logprobs,
        values=rollout.values,
        advantages=masked_whiten(advantages, mask) if args.normalize_advantages else advantages,
        returns=None if rollout.values is None else returns,
        mask=mask,
    )
    reference_kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1").sum(dim=1).mean()
    metrics: dict[str, float] = {
        **score_metrics(rollout),
        "reward/mean_per_response": float(rewards.sum() / rollout.scored.sum()),
        "kl/reference_nats_per_response": float(reference_kl),
        "kl/coef": kl_coef,
        "response/length_tokens": float(rollout.lengths.float().mean()),
        "response/eos_fraction": float(rollout.finished.float().mean()),
        **_turn_metrics(rollout),
        "policy/entropy": float(masked_mean(rollout.entropy, mask)),
        "advantage/std": float(masked_var(advantages, mask).sqrt()),
    }
    if rollout.values is not None:
        metrics["value/explained_variance"] = float(explained_variance(values, returns, mask))
        metrics["value/mean"] = float(masked_mean(values, mask))
        metrics["value/return_mean"] = float(masked_mean(returns, mask))
    if rollout.decode_gap is not None:
        metrics["policy/decode_gap_max_nats"] = rollout.decode_gap
    return old, metrics


def _gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, T] of episodes that end with their last True step."""
    next_values, terminated = next_decisions(values, mask)
    going_on = torch.zeros_like(terminated)
    return compute_gae(
        rewards, values, next_values, terminated, going_on, gamma=gamma, gae_lambda=gae_lambda, mask=mask
    )


def next_decisions(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """V at each True step's next True step, and the flag of the last one: both [B, T].

    The last True step closes the episode, whether a stop token or the length limit ended it, so its own entry is 0.
    """
    length = mask.shape[1]
    steps = torch.arange(length, device=mask.device).expand_as(mask)
    here_or_later = torch.where(mask, steps, length).flip(1).cummin(dim=1).values.flip(1)
    following = torch.nn.functional.pad(here_or_later[:, 1:], (0, 1), value=length)
    next_values = torch.nn.functional.pad(values, (0, 1)).gather(1, following)
    return next_values, mask & (following == length)


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
