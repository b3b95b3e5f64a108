"""Advantages: from a critic, the other responses to the same prompt, or nothing; a token's, or a whole turn's."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import compute_gae, group_normalized_advantages, leave_one_out_advantages
from rlhf_ppo.core.masked import last_true


def estimate_advantages(
    rewards: Tensor, values: Tensor | None, mask: Tensor, args: RLHFConfig, turns: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Compute advantages [B, T] before whitening, and the critic's targets [B, T] (None without a critic).

    Args:
        rewards: [B, T] minus the KL's cost, 0 outside ``mask``.
        values: [B, T] the critic's, or None without one.
        mask: [B, T] bool, all False for an unscored response: its group is compared without it.
        args: estimator, num_generations, credit by token or turn, discounts, lambdas.
        turns: [B, T] the turn of each token; read if credit goes to turns.
    """
    if args.advantage_estimator in ("rloo", "grpo"):
        returns, scored = rewards.sum(dim=1), mask.any(dim=1)
        if args.advantage_estimator == "rloo":
            advantages = leave_one_out_advantages(returns, args.num_generations, mask=scored)
        else:
            advantages = group_normalized_advantages(
                returns, args.num_generations, scale_by_std=args.normalize_advantages, mask=scored
            )
        return advantages[:, None] * mask, None
    baseline = torch.zeros_like(rewards) if values is None else values
    if args.turn_credit == "turn" and turns is not None:
        by_turn = _over_time(*to_turns(rewards, baseline, turns, mask), args, gamma=args.gamma_turn)
        advantages, returns = (to_tokens(x, turns, mask) for x in by_turn)
    else:
        advantages, returns = _over_time(rewards, baseline, mask, args, gamma=args.gamma)
    return advantages, None if values is None else returns


def _over_time(
    rewards: Tensor, values: Tensor, mask: Tensor, args: RLHFConfig, *, gamma: float
) -> tuple[Tensor, Tensor]:
    """Compute advantages and returns over steps (tokens or turns): by GAE, or plain returns without a critic."""
    if not args.has_critic:
        return gae(rewards, values, mask, gamma=gamma, gae_lambda=1.0)
    gae_lambda = args.gae_lambda
    if args.adaptive_lambda_alpha is not None:
        gae_lambda = adaptive_lambda(mask.sum(dim=1, keepdim=True), args.adaptive_lambda_alpha)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    if args.gae_lambda_value is not None or args.adaptive_lambda_alpha is not None:
        critics = args.gae_lambda if args.gae_lambda_value is None else args.gae_lambda_value
        _, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=critics)
    return advantages, returns


def comparable(scored: Tensor, args: RLHFConfig) -> Tensor:
    """Return [B] bool: False for an unscored response and, under rloo and grpo, for the only scored one of its group.

    Raises:
        ValueError: the responses are not whole groups of num_generations.
    """
    if args.advantage_estimator not in ("rloo", "grpo"):
        return scored
    groups = _in_groups(scored, args.num_generations)
    return (groups & (groups.sum(dim=1, keepdim=True) > 1)).flatten()


def with_signal(scores: Tensor, scored: Tensor, num_generations: int) -> Tensor:
    """Return [B] bool: whether two scored responses to the same prompt have different scores.

    Args:
        scores: [B].
        scored: [B] bool.
        num_generations: responses per prompt, side by side.
    Raises:
        ValueError: the responses are not whole groups.
    """
    scores, scored = _in_groups(scores, num_generations), _in_groups(scored, num_generations)
    infinity = torch.full_like(scores, torch.inf)
    lowest = torch.where(scored, scores, infinity).amin(dim=1, keepdim=True)
    highest = torch.where(scored, scores, -infinity).amax(dim=1, keepdim=True)
    return (lowest < highest).expand_as(scores).flatten()


def _in_groups(x: Tensor, num_generations: int) -> Tensor:
    """Return [B] as [groups, num_generations]."""
    if len(x) % num_generations:
        raise ValueError(
            f"{len(x)} responses are not whole groups of num_generations={num_generations}: make the rollout with "
            "trainer.rollout(prompts)"
        )
    return x.view(-1, num_generations)


def adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """Compute lambda as ``1 - 1 / (alpha * length)``, at least 0: the trace spans a fixed share of any response.

    Source: Yue et al., "VAPO" (2025), section 4.2, with alpha 0.05.
    """
    return (1 - 1 / (alpha * lengths.clamp(min=1))).clamp(min=0.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Compute advantages and returns [B, T] of episodes that end at their last True step."""
    next_values, terminated = next_decisions(values, mask)
    truncated = torch.zeros_like(terminated)
    return compute_gae(
        rewards, values, next_values, terminated, truncated, gamma=gamma, gae_lambda=gae_lambda, mask=mask
    )


def next_decisions(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return V at each True step's next True step, and ``terminated`` at the last one: both [B, T].

    The last True step closes the episode, whether a stop token or the length limit ended it, so its own entry is 0.
    """
    length = mask.shape[1]
    steps = torch.arange(length, device=mask.device).expand_as(mask)
    here_or_later = torch.where(mask, steps, length).flip(1).cummin(dim=1).values.flip(1)
    following = torch.nn.functional.pad(here_or_later[:, 1:], (0, 1), value=length)
    next_values = torch.nn.functional.pad(values, (0, 1)).gather(1, following)
    return next_values, last_true(mask)


def to_turns(rewards: Tensor, values: Tensor, turns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce rewards, values and mask of tokens [B, T] to those of turns [B, K].

    A turn's reward is the sum of its tokens' rewards; its value is the critic's before its first token, where the whole
    turn is still to be decided.

    Args:
        turns: [B, T] long, the number of each token's turn, from 0.
        mask: [B, T] bool, True on tokens that the policy chose.
    Source: the turn-level MDP of Li et al., "Turn-PPO" (2025). Reading the token critic at a turn's first token is our
    choice.
    """
    number, count = torch.where(mask, turns, 0), int(turns.max()) + 1
    zeros = torch.zeros_like(rewards[:, :1]).expand(-1, count)
    summed = zeros.scatter_add(1, number, torch.where(mask, rewards, 0))
    steps = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    beyond = torch.full_like(number[:, :1], mask.shape[1]).expand(-1, count)
    first = beyond.scatter_reduce(1, number, torch.where(mask, steps, mask.shape[1]), "amin")
    taken = first < mask.shape[1]
    before = values.gather(1, torch.where(taken, first, 0))
    return summed, torch.where(taken, before, 0), taken


def to_tokens(x: Tensor, turns: Tensor, mask: Tensor) -> Tensor:
    """Give every token [B, T] the number of its turn [B, K]; 0 outside ``mask``."""
    return torch.where(mask, x.gather(1, torch.where(mask, turns, 0)), 0)
