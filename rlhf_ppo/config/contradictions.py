"""Contradictions: settings that exclude each other, and settings that nothing would read beside the others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlhf_ppo.core.validation import is_changed

if TYPE_CHECKING:
    from rlhf_ppo.config.rlhf import RLHFConfig


def refuse_contradictions(args: RLHFConfig) -> None:
    """Check settings against each other; each by itself is fine.

    Raises:
        ValueError: two of them contradict each other; names both and what to do.
    """
    _whole_groups(args)
    _decoding(args)
    _turns(args)
    _unread(args)
    _critic(args)
    _estimator(args)
    _shaping(args)
    _controller(args)
    _schedule(args)


def _decoding(args: RLHFConfig) -> None:
    if args.min_new_tokens > args.max_new_tokens:
        raise ValueError(
            f"min_new_tokens={args.min_new_tokens} is above max_new_tokens={args.max_new_tokens}: lower the first "
            "or raise the second"
        )
    if isinstance(args.stop_strings, str) or not all(args.stop_strings):
        raise ValueError(f"stop_strings must be a tuple of texts that are not empty, got {args.stop_strings!r}")
    if args.generation == "static":
        for name, default in (("max_turns", 1), ("min_new_tokens", 0), ("stop_strings", ())):
            if (value := getattr(args, name)) != default:
                raise ValueError(
                    f"generation={args.generation!r} cannot do {name}={value!r}: set generation='dynamic' (or "
                    f"'auto'), or leave {name} at {default!r}"
                )


_CRITICS = (
    "vf_coef",
    "clip_range_vf",
    "gae_lambda",
    "gae_lambda_value",
    "adaptive_lambda_alpha",
    "critic",
    "value_head_from",
    "value_learning_rate",
    "critic_warmup_rollouts",
)
"""Settings of a critic, or of advantages against one."""


def _unread(args: RLHFConfig) -> None:
    """A setting that was changed must be read."""
    for names, why in _never_read(args):
        for name in names:
            if is_changed(args, name):
                value = getattr(args, name)
                raise ValueError(f"{name}={value!r} has no effect: {why}. Leave it out, or change the other")


def _never_read(args: RLHFConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Names of settings that the others leave without effect, and why."""
    objective = f"objective={args.objective!r}"
    if not args.has_critic:
        yield _CRITICS, f"it is about a critic, and {args.critic_free} has none"
    elif args.vf_coef == 0:
        yield ("clip_range_vf", "value_learning_rate", "gae_lambda_value"), "vf_coef=0 leaves the critic no loss"
        if args.value_head_from is None:
            yield ("critic",), "under vf_coef=0 its values stay 0, wherever they come from"
        if args.adaptive_lambda_alpha is not None:
            both = f"adaptive_lambda_alpha={args.adaptive_lambda_alpha} stands in for it in the policy's part"
            yield ("gae_lambda",), f"{both}, and vf_coef=0 leaves the critic no loss"
    if args.adaptive_lambda_alpha is not None and args.gae_lambda_value is not None:
        both = f"adaptive_lambda_alpha={args.adaptive_lambda_alpha} and gae_lambda_value={args.gae_lambda_value}"
        yield ("gae_lambda",), f"{both} stand in for it in the policy's and in the critic's part"
    if args.objective in ("penalty", "a2c", "reinforce"):
        yield ("clip_range", "clip_range_high"), f"{objective} clips no ratio"
    if args.objective == "cispo" and args.clip_range_high is not None:
        yield ("clip_range",), f"{objective} reads clip_range_high={args.clip_range_high} alone"
    if args.objective != "dual_clip":
        yield ("dual_clip",), f"{objective} has no bound of that kind"
    if args.objective != "penalty":
        yield ("penalty_beta",), f"{objective} has no such penalty"
    if args.kl_target is None:
        yield ("kl_horizon",), "kl_target=None keeps kl_coef fixed"
    if args.kl_coef == 0:
        yield ("kl_estimator",), "kl_coef=0 leaves no KL in the rewards"
    if args.eval_every == 0:
        yield ("save_best",), "it is about evaluations during training, and eval_every=0 makes none"
    if args.max_turns == 1:
        yield ("respond_timeout_s",), "it is about respond, which max_turns=1 never asks"


def _turns(args: RLHFConfig) -> None:
    if args.turn_credit == "turn" and args.max_turns == 1:
        raise ValueError("turn_credit='turn' tells turns apart, but max_turns=1 allows one: raise max_turns")
    if args.turn_credit == "turn" and args.gamma != 1:
        raise ValueError(
            f"turn_credit='turn' discounts turns, not tokens: set gamma_turn instead of gamma={args.gamma}"
        )
    if args.turn_credit == "token" and args.gamma_turn != 1:
        raise ValueError(f"gamma_turn={args.gamma_turn} has no effect under turn_credit='token': set gamma")


def _critic(args: RLHFConfig) -> None:
    warmup = args.critic_warmup_rollouts
    if warmup and args.vf_coef == 0:
        raise ValueError(f"critic_warmup_rollouts={warmup} trains the critic, but vf_coef=0 leaves it no loss")
    if warmup and warmup >= args.num_rollouts:
        raise ValueError(
            f"critic_warmup_rollouts={warmup} leaves none of the {args.num_rollouts} rollouts of total_episodes="
            f"{args.total_episodes} to train the policy on"
        )


def _shaping(args: RLHFConfig) -> None:
    if args.missing_eos_mode == "replace" and args.missing_eos_penalty is None:
        raise ValueError("missing_eos_mode='replace' needs a missing_eos_penalty, but missing_eos_penalty is None")
    if args.length_penalty_from and not args.length_penalty:
        raise ValueError(
            f"length_penalty_from={args.length_penalty_from} changes nothing while length_penalty=0: set both"
        )
    if args.length_penalty and args.max_turns == 1 and args.length_penalty_from >= args.max_new_tokens:
        raise ValueError(
            f"length_penalty_from={args.length_penalty_from} is never passed with max_new_tokens="
            f"{args.max_new_tokens}: lower the first or raise the second"
        )


def _whole_groups(args: RLHFConfig) -> None:
    batch, parts, group = args.rollout_batch_size, args.num_minibatches, args.num_generations
    both = math.lcm(parts, group)
    if batch % both == 0:
        return
    below, above = batch // both * both, math.ceil(batch / both) * both
    sizes = " or ".join(str(size) for size in (below, above) if size)
    if batch % group:
        problem = f"whole groups of num_generations={group} responses"
    else:
        problem = f"num_minibatches={parts} whole minibatches"
    raise ValueError(
        f"rollout_batch_size={batch} does not divide into {problem}; the nearest valid rollout_batch_size is {sizes}"
    )


def _estimator(args: RLHFConfig) -> None:
    estimator = f"advantage_estimator={args.advantage_estimator!r}"
    if args.advantage_estimator in ("rloo", "grpo"):
        if args.num_generations < 2:
            raise ValueError(
                f"{estimator} compares responses to one prompt, but num_generations={args.num_generations} gives "
                "each only one: set num_generations to 2 or more"
            )
        if args.gamma != 1:
            raise ValueError(
                f"{estimator} compares whole responses without a discount, but gamma={args.gamma}: set gamma to 1"
            )
        if args.turn_credit == "turn":
            raise ValueError(f"{estimator} compares whole responses, but turn_credit='turn': drop one of them")
    if args.importance_weight_cap is not None and not args.recompute_logprobs:
        raise ValueError(
            f"importance_weight_cap={args.importance_weight_cap} compares log-probs recorded while decoding with "
            "recomputed ones, but recompute_logprobs=False: set recompute_logprobs"
        )


def _controller(args: RLHFConfig) -> None:
    if args.kl_target is not None and args.kl_coef == 0:
        raise ValueError(
            f"kl_target={args.kl_target} adapts kl_coef by a factor, but kl_coef=0 stays 0: set kl_coef above 0"
        )
    if args.kl_target is not None and args.kl_horizon < args.rollout_batch_size:
        raise ValueError(
            f"kl_horizon={args.kl_horizon} must be at least rollout_batch_size={args.rollout_batch_size}, "
            "or the controller overshoots"
        )


def _schedule(args: RLHFConfig) -> None:
    if args.warmup_steps > args.num_optimizer_steps:
        raise ValueError(
            f"warmup_steps={args.warmup_steps} is longer than the run: total_episodes={args.total_episodes} makes "
            f"{args.num_optimizer_steps} optimizer steps, so learning_rate would never be reached. Lower the first or "
            "raise the second"
        )
