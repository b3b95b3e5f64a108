"""KL to the frozen reference: estimates per action, and the exact KL from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ppo.core.types import compute_dtype, require_same_shape, require_temperature, result_dtype

KL_ESTIMATORS = ("k1", "k2", "k3")

# exp(20) is 4.9e8: far outside any trust region, and its square is still finite in float32.
MAX_LOG_RATIO = 20.0


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Estimate KL(pi || pi_ref) per action, in nats.

    k1 = log pi - log pi_ref: unbiased, single terms may be negative.
    k2 = 0.5 * (log pi - log pi_ref)^2: biased, never negative; as a loss its gradient is the exact KL's.
    k3 = pi_ref/pi - 1 - log(pi_ref/pi): unbiased, never negative; log(pi_ref/pi) is clamped at 20, so it stays finite.

    Args:
        logprobs: [*] log pi(a|s) of actions sampled from pi.
        ref_logprobs: [*] the same actions under the frozen reference.
        estimator: k1, k2 or k3.
    Returns:
        [*] nats per action.
    Raises:
        ValueError: shapes differ, or the estimator is unknown.
    Source: Schulman, "Approximating KL Divergence" (2020).
    """
    require_same_shape(ref_logprobs=ref_logprobs, logprobs=logprobs)
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"unknown KL estimator {estimator!r}; known: {', '.join(KL_ESTIMATORS)}")
    dtype = compute_dtype(logprobs)
    log_ratio = logprobs.to(dtype) - ref_logprobs.to(dtype)
    if estimator == "k1":
        kl = log_ratio
    elif estimator == "k2":
        kl = 0.5 * log_ratio.square()
    else:
        # Both terms are clamped: the linear one alone would push the policy further away beyond the clamp.
        exponent = (-log_ratio).clamp(max=MAX_LOG_RATIO)
        kl = torch.expm1(exponent) - exponent
    return kl.to(result_dtype(logprobs))


def kl_from_logits(logits: Tensor, ref_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute the exact ``KL(pi || ref) = sum_v p_v (log p_v - log q_v)`` of two softmax distributions.

    Args:
        logits: [*, V] the policy's, with gradients; -inf bans a token, which then adds nothing.
        ref_logits: [*, V] the reference's.
        temperature: divides both.
    Returns:
        [*] nats; infinite where the reference bans a token that the policy does not.
    Raises:
        ValueError: shapes differ, or temperature is not positive.
    """
    require_same_shape(logits=logits, ref_logits=ref_logits)
    require_temperature(temperature)
    dtype = compute_dtype(logits)
    log_p, log_q = ((x.to(dtype) / temperature).log_softmax(dim=-1) for x in (logits, ref_logits))
    # A banned token has probability 0; what it would multiply must not be infinite, forward or backward.
    banned = log_p == -torch.inf
    difference = log_p.masked_fill(banned, 0.0) - log_q.masked_fill(banned, 0.0)
    return (log_p.exp() * difference).sum(dim=-1).to(result_dtype(logits))
