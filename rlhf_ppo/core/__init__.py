"""The mathematics of PPO: pure functions over tensors, with torch and the standard library alone."""

from typing import TYPE_CHECKING

from rlhf_ppo.core.lazy import lazy_names

if TYPE_CHECKING:
    from rlhf_ppo.core.advantages import compute_gae, group_normalized_advantages, leave_one_out_advantages
    from rlhf_ppo.core.config import PPOConfig
    from rlhf_ppo.core.controllers import adapt_clip_range, adapt_kl_coef, adapt_penalty_beta
    from rlhf_ppo.core.diagnostics import explained_variance, ppo_diagnostics
    from rlhf_ppo.core.dpo import dpo_loss
    from rlhf_ppo.core.kernels.linear_kl import linear_kl
    from rlhf_ppo.core.kernels.linear_logprobs import linear_logprobs
    from rlhf_ppo.core.kl import kl_estimate, kl_from_logits
    from rlhf_ppo.core.logprobs import entropy_from_logits, token_logprobs
    from rlhf_ppo.core.losses import aggregate_loss, clipped_value_loss, loss_denominator, ppo_loss
    from rlhf_ppo.core.masked import masked_mean, masked_var, masked_whiten
    from rlhf_ppo.core.minibatches import minibatch_indices
    from rlhf_ppo.core.policy_losses import (
        cispo_policy_loss,
        clipped_policy_loss,
        dis_policy_loss,
        k2_loss,
        penalty_policy_loss,
        policy_gradient_loss,
    )
    from rlhf_ppo.core.ratios import (
        importance_weights,
        pool_old_logprobs,
        probability_ratio,
        truncated_importance_weights,
    )
    from rlhf_ppo.core.rewards import kl_penalized_rewards
    from rlhf_ppo.core.types import Ban, BannedTokens, Experience, PolicyOutput, PPOLoss
    from rlhf_ppo.core.value_scale import ValueScale, rescaled_head, update_value_scale

__all__ = [
    "Ban",
    "BannedTokens",
    "Experience",
    "PPOConfig",
    "PPOLoss",
    "PolicyOutput",
    "ValueScale",
    "adapt_clip_range",
    "adapt_kl_coef",
    "adapt_penalty_beta",
    "aggregate_loss",
    "cispo_policy_loss",
    "clipped_policy_loss",
    "clipped_value_loss",
    "compute_gae",
    "dis_policy_loss",
    "dpo_loss",
    "entropy_from_logits",
    "explained_variance",
    "group_normalized_advantages",
    "importance_weights",
    "k2_loss",
    "kl_estimate",
    "kl_from_logits",
    "kl_penalized_rewards",
    "leave_one_out_advantages",
    "linear_kl",
    "linear_logprobs",
    "loss_denominator",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "minibatch_indices",
    "penalty_policy_loss",
    "policy_gradient_loss",
    "pool_old_logprobs",
    "ppo_diagnostics",
    "ppo_loss",
    "probability_ratio",
    "rescaled_head",
    "token_logprobs",
    "truncated_importance_weights",
    "update_value_scale",
]

_NAMES = {
    "advantages": "compute_gae group_normalized_advantages leave_one_out_advantages",
    "config": "PPOConfig",
    "controllers": "adapt_clip_range adapt_kl_coef adapt_penalty_beta",
    "diagnostics": "explained_variance ppo_diagnostics",
    "dpo": "dpo_loss",
    "kernels.linear_kl": "linear_kl",
    "kernels.linear_logprobs": "linear_logprobs",
    "kl": "kl_estimate kl_from_logits",
    "logprobs": "entropy_from_logits token_logprobs",
    "losses": "aggregate_loss clipped_value_loss loss_denominator ppo_loss",
    "masked": "masked_mean masked_var masked_whiten",
    "minibatches": "minibatch_indices",
    "policy_losses": "cispo_policy_loss clipped_policy_loss dis_policy_loss k2_loss penalty_policy_loss "
    "policy_gradient_loss",
    "ratios": "importance_weights pool_old_logprobs probability_ratio truncated_importance_weights",
    "rewards": "kl_penalized_rewards",
    "types": "Ban BannedTokens Experience PolicyOutput PPOLoss",
    "value_scale": "ValueScale rescaled_head update_value_scale",
}

__getattr__ = lazy_names(
    __name__,
    {name: f"{__name__}.{home}" for home, names in _NAMES.items() for name in names.split()},
    modules="advantages config diagnostics kl logprobs losses masked policy_losses ratios types",
)


def __dir__() -> list[str]:
    return __all__
