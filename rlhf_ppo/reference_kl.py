"""Exact KL to the reference: two models' distributions at the same tokens, over the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ppo.core import kl_from_logits, linear_kl
from rlhf_ppo.limits import bar, free_and_barred, with_bias
from rlhf_ppo.reading import Outputs


def exact_kl(policy: Outputs, reference: Outputs, *, temperature: float) -> Tensor:
    """[n] KL(policy || reference) in nats at each token, with gradients to the policy.

    [n, V] logits exist only if an output layer is not plain. Tokens that could not be drawn have no part in either.
    """
    if policy.head is None or reference.head is None:
        logits, ref_logits = policy.all_logits().float(), reference.all_logits().float()
        return kl_from_logits(logits, ref_logits, temperature=temperature)
    if policy.held is None:
        return _of_rows(policy, reference, slice(None), None, temperature)
    shut = bar(torch.zeros_like(policy.head.weight[:, 0]), policy.barred)
    (kl,) = free_and_barred(
        policy.held, shut, lambda rows, shut: (_of_rows(policy, reference, rows, shut, temperature),)
    )
    return kl


def _of_rows(
    policy: Outputs, reference: Outputs, rows: Tensor | slice, shut: Tensor | None, temperature: float
) -> Tensor:
    assert policy.head is not None and policy.states is not None
    assert reference.head is not None and reference.states is not None
    return linear_kl(
        policy.states[rows],
        policy.head.weight,
        reference.states[rows],
        reference.head.weight,
        bias=with_bias(policy.head.bias, shut),
        ref_bias=with_bias(reference.head.bias, shut),
        temperature=temperature,
    )
