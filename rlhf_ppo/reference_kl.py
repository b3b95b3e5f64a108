"""Exact KL to the reference: two models' distributions at the same tokens, over the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ppo.core import kl_from_logits, linear_kl
from rlhf_ppo.limits import bar
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
    free, held = (~policy.held).nonzero().squeeze(-1), policy.held.nonzero().squeeze(-1)
    shut = bar(torch.zeros_like(policy.head.weight[:, 0]), policy.barred)
    parts = [_of_rows(policy, reference, *part, temperature) for part in ((free, None), (held, shut))]
    return torch.cat(parts)[torch.cat([free, held]).argsort()]


def _of_rows(
    policy: Outputs, reference: Outputs, rows: Tensor | slice, shut: Tensor | None, temperature: float
) -> Tensor:
    assert policy.head is not None and policy.states is not None
    assert reference.head is not None and reference.states is not None
    biases = [head.bias if shut is None else _sum(head.bias, shut) for head in (policy.head, reference.head)]
    return linear_kl(
        policy.states[rows],
        policy.head.weight,
        reference.states[rows],
        reference.head.weight,
        bias=biases[0],
        ref_bias=biases[1],
        temperature=temperature,
    )


def _sum(bias: Tensor | None, shut: Tensor) -> Tensor:
    return shut if bias is None else bias + shut
