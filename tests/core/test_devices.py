"""Proves on torch's meta device, so without a GPU, that no function puts a tensor of its own on the CPU."""

import pytest
import torch

from rlhf_ppo.core import (
    Experience,
    PolicyOutput,
    PPOConfig,
    aggregate_loss,
    compute_gae,
    dpo_loss,
    entropy_from_logits,
    explained_variance,
    group_normalized_advantages,
    importance_weights,
    kl_estimate,
    kl_from_logits,
    kl_penalized_rewards,
    leave_one_out_advantages,
    linear_kl,
    linear_logprobs,
    masked_whiten,
    pool_old_logprobs,
    ppo_diagnostics,
    ppo_loss,
    token_logprobs,
    truncated_importance_weights,
)

X = torch.zeros(4, 6, device="meta")
MASK = torch.zeros(4, 6, device="meta", dtype=torch.bool)
TOKENS = torch.zeros(4, device="meta", dtype=torch.long)
OLD = Experience(X, X, X, X, MASK)
CONFIG = PPOConfig(ent_coef=0.1, clip_range_vf=0.2)


TURNS = torch.zeros(4, 6, device="meta", dtype=torch.long)
EVERYTHING = Experience(X, X, X, X, MASK, weights=X, ref_logprobs=X, turns=TURNS, positive=MASK)
SWITCHED = PPOConfig(objective="cispo", ratio_level="turn", kl_loss_coef=0.1, positive_loss_coef=0.1)

CALLS = {
    "importance_weights": lambda: [importance_weights(X, X, MASK, cap=2.0, level="sequence", mode="mask")],
    "dpo_loss": lambda: [dpo_loss(X, X, X, X)],
    "kl_from_logits": lambda: [kl_from_logits(X, X)],
    "linear_kl": lambda: [linear_kl(X, X, X, X)],
    "linear_logprobs": lambda: linear_logprobs(X, X, TOKENS, return_entropy=True),
    "pool_old_logprobs": lambda: [pool_old_logprobs(X, X, MASK, level="sequence")],
    "truncated_importance_weights": lambda: [truncated_importance_weights(X, X, cap=2.0)],
    "leave_one_out, masked": lambda: [leave_one_out_advantages(X[:, 0], 2, mask=MASK[:, 0])],
    "ppo_loss, switched": lambda: vars(ppo_loss(PolicyOutput(X, X, X, X), EVERYTHING, SWITCHED)).values(),
    "ppo_diagnostics, switched": lambda: ppo_diagnostics(PolicyOutput(X), EVERYTHING, SWITCHED).values(),
    "masked_whiten": lambda: [masked_whiten(X, MASK)],
    "compute_gae": lambda: compute_gae(X, X, X, MASK, MASK, gamma=0.9, gae_lambda=0.9),
    "compute_gae, masked": lambda: compute_gae(X, X, X, MASK, MASK, gamma=torch.tensor(0.9), gae_lambda=1, mask=MASK),
    "leave_one_out": lambda: [leave_one_out_advantages(X[:, 0], 2)],
    "group_normalized": lambda: [group_normalized_advantages(X[:, 0], 2)],
    "kl_estimate": lambda: [kl_estimate(X, X, "k3")],
    "kl_penalized_rewards": lambda: [kl_penalized_rewards(X[:, 0], X, MASK, 0.1)],
    "kl_penalized_rewards, empty": lambda: [kl_penalized_rewards(X[:, 0], X[:, :0], MASK[:, :0], 0.1)],
    "aggregate_loss": lambda: [aggregate_loss(X, MASK, "sequence_mean")],
    "aggregate_loss, denominator": lambda: [aggregate_loss(X, MASK, denominator=4)],
    "ppo_loss": lambda: vars(ppo_loss(PolicyOutput(X, X, X), OLD, CONFIG)).values(),
    "ppo_diagnostics": lambda: ppo_diagnostics(PolicyOutput(X, X, X), OLD).values(),
    "explained_variance": lambda: [explained_variance(X, X)],
    "token_logprobs": lambda: [token_logprobs(X, TOKENS)],
    "entropy_from_logits": lambda: [entropy_from_logits(X)],
}


@pytest.mark.parametrize("name", CALLS)
def test_everything_stays_where_the_inputs_are(name):
    for out in CALLS[name]():
        assert out.device.type == "meta"
