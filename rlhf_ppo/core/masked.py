"""Masked statistics: over the True entries of a mask; entries outside it, NaN included, never count."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_ppo.core.types import compute_dtype, require_bool, require_same_shape, result_dtype

EPS = 1e-8

Dim = int | tuple[int, ...] | None


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """Zero ``x`` outside ``mask``. Applied to inputs, so that no NaN reaches the backward pass either."""
    # On a CPU this check is cheaper than where(); on a GPU it would synchronise at every call.
    if mask.device.type == "cpu" and mask.all():
        return x
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def _check(x: Tensor, mask: Tensor) -> None:
    require_same_shape(mask=mask, x=x)
    require_bool(mask=mask)


def _sum(x: Tensor, dim: Dim, keepdim: bool = False) -> Tensor:
    return x.sum() if dim is None else x.sum(dim=dim, keepdim=keepdim)


def _mean(x: Tensor, mask: Tensor, dim: Dim, keepdim: bool = False) -> Tensor:
    count = _sum(mask.to(x.dtype), dim, keepdim).clamp(min=1)
    return _sum(keep(x, mask), dim, keepdim) / count


def _centred(x: Tensor, mask: Tensor, dim: Dim) -> Tensor:
    # The rounded mean of equal values can miss them by a few units in the last place, which whitening would blow up to
    # 1; a second pass removes that remainder.
    centred = x - _mean(x, mask, dim, keepdim=True)
    return centred - _mean(centred, mask, dim, keepdim=True)


def _var(x: Tensor, mask: Tensor, dim: Dim) -> Tensor:
    return _mean(_centred(x, mask, dim).square(), mask, dim)


def masked_mean(x: Tensor, mask: Tensor, dim: Dim = None) -> Tensor:
    """Compute the mean of ``x`` over the True entries of ``mask``.

    Args:
        x: [*] values.
        mask: [*] bool.
        dim: axis or axes to reduce; None reduces all of them.
    Returns:
        ``x`` without ``dim``; 0 where no entry is True.
    Raises:
        ValueError: shapes differ, or the mask is not bool.
    """
    _check(x, mask)
    return _mean(x.to(compute_dtype(x)), mask, dim).to(result_dtype(x))


def masked_var(x: Tensor, mask: Tensor, dim: Dim = None) -> Tensor:
    """Compute the population variance (over n, not n - 1) of ``x`` over the True entries of ``mask``.

    Args, returns and errors are those of :func:`masked_mean`.
    """
    _check(x, mask)
    return _var(keep(x.to(compute_dtype(x)), mask), mask, dim).to(result_dtype(x))


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Whiten: ``(x - mean) / sqrt(var + 1e-8)`` over the True entries.

    Args:
        x: [*] values.
        mask: [*] bool.
        shift_mean: False adds the mean back, so that only the scale changes.
    Returns:
        [*] whitened values, 0 outside the mask. One value, or equal values, whiten to 0.
    Raises:
        ValueError: shapes differ, or the mask is not bool.
    """
    _check(x, mask)
    values = keep(x.to(compute_dtype(x)), mask)
    whitened = _centred(values, mask, None) * torch.rsqrt(_var(values, mask, None) + EPS)
    if not shift_mean:
        whitened = whitened + _mean(values, mask, None)
    return keep(whitened, mask).to(result_dtype(x))


def last_true(mask: Tensor) -> Tensor:
    """Return [B, T] bool, True on each row's last True step: where a response's score is added and its episode ends."""
    return mask & (mask.flip(1).cumsum(dim=1).flip(1) == 1)
