"""Exact KL to the reference: two models' distributions at the same tokens, over the whole vocabulary."""

from __future__ import annotations

from torch import Tensor

from rlhf_ppo.core import kl_from_logits, linear_kl
from rlhf_ppo.models.forward import Outputs


def exact_kl(policy: Outputs, reference: Outputs, *, temperature: float) -> Tensor:
    """[n] KL(policy || reference) in nats at each token, with gradients to the policy.

    [n, V] logits exist only if an output layer is not plain. Tokens that could not be drawn have no part in either.
    """
    if policy.head is None or policy.states is None or reference.head is None or reference.states is None:
        logits, ref_logits = policy.all_logits().float(), reference.all_logits().float()
        return kl_from_logits(logits, ref_logits, temperature=temperature)
    return linear_kl(
        policy.states,
        policy.head.weight,
        reference.states,
        reference.head.weight,
        bias=policy.head.bias,
        ref_bias=reference.head.bias,
        temperature=temperature,
        ban=policy.ban,
    )
