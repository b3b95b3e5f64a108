"""Learning rates: chosen by the model's size, by adapter or full weights, where the settings leave them open."""

from __future__ import annotations

import dataclasses
from typing import Any

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.runtime.logs.progress import count_parameters, short_count

ADAPTER_MULTIPLE = 10
"""An adapter's learning rate, as a multiple of the one that fits all weights."""

CRITIC_MULTIPLE = 10
"""The critic's, as a multiple of the one that fits all of the policy's weights."""

MAX_VALUE_RATE = 1e-3
"""The critic's is at most this, but never below the policy's."""


def policy_rate(parameters: int, *, adapter: bool) -> float:
    """Choose a policy's peak learning rate by the number of the model's parameters.

    All weights learn at 1e-4 with 2.5 million parameters or fewer, and above that at a rate that falls with the square
    root of their number, rounded to one digit: 4e-5 with 15 million, 1e-5 with 135 million, 5e-6 with a billion, 2e-6
    with 7 billion. An adapter learns at 10 times that rate, whatever its rank.

    Source: measured on 2 and 15 million parameters, tried on 135 million (docs/models.md). Above that, published PPO
    runs: 3e-6 with 1 to 7 billion (Huang et al., "The N+ Implementation Details of RLHF with PPO", 2024), 5e-7 with 8
    billion (OpenRLHF's example, whose critic learns 18 times as fast). The adapter's factor: Schulman et al., "LoRA
    Without Regret" (2025).
    """
    rate = 1e-4 * min(1.0, (2.5e6 / parameters) ** 0.5)
    return _rounded(rate * (ADAPTER_MULTIPLE if adapter else 1), 1)


def critic_rate(policy: float, *, adapter: bool) -> float:
    """Choose the critic's peak learning rate from the policy's.

    It is 10 times the one that fits all of the policy's weights, because a critic fits numbers, as in supervised
    training, and a head starts at 0. So it equals an adapter's own. It is at most 1e-3, but never below the policy's.
    """
    return max(policy, min(_rounded(policy * (1 if adapter else CRITIC_MULTIPLE), 6), MAX_VALUE_RATE))


def model_size(policy: Any) -> tuple[int, bool]:
    """Return the number of a policy's parameters without those of its adapter, and whether it has one."""
    adapter = hasattr(policy, "peft_config")
    # What an adapter trains is not the model's size.
    return count_parameters(p for p in policy.parameters() if not (adapter and p.requires_grad)), adapter


def _rounded(number: float, digits: int) -> float:
    return float(f"{number:.{digits}g}")


def resolve_learning_rates(args: RLHFConfig, model: ActorCritic) -> tuple[RLHFConfig, str]:
    """Fill in the learning rates that the settings leave open.

    Returns:
        (the settings, the rates in words with the reason for each that was chosen).
    """
    size, adapter = model_size(model.policy)
    policy, critic = args.learning_rate, args.value_learning_rate
    why_policy = why_critic = ""
    if policy is None:
        policy = policy_rate(size, adapter=adapter)
        why_policy = f" (chosen: {short_count(size)} parameters, {'adapter' if adapter else 'full weights'})"
    if args.has_critic and args.vf_coef > 0 and critic is None:
        critic = critic_rate(policy, adapter=adapter)
        why_critic = f" (chosen: {f'{critic / policy:.3g} times' if critic > policy else 'as'} the policy's)"
    words = f"{_written(policy)} policy{why_policy}"
    if critic is not None:
        words += f", {_written(critic)} critic{why_critic}"
    return dataclasses.replace(args, learning_rate=policy, value_learning_rate=critic), words


def _written(rate: float) -> str:
    """Write a rate as people do: 1e-4."""
    mantissa, _, exponent = f"{rate:.5e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if rate else "0"
