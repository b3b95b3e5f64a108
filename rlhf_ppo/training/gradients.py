"""Gradients: accumulated without waste, clipped and applied in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def accumulate_gradients(model: nn.Module) -> Iterator[None]:
    """While this lasts, backward passes add up in ``.grad``; afterwards every gradient is dense.

    An embedding's gradient is zero in all rows but those it read. On CPU only these rows are added to the gradient that
    the output layer leaves there (tied weights), or to one that is kept allocated, instead of a [V, O] of zeros each
    time.
    """
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    rows_only = [m for m in embeddings if m.weight.requires_grad and m.weight.device.type == "cpu" and not m.sparse]
    weights = [module.weight for module in rows_only]
    for module, weight in zip(rows_only, weights, strict=True):
        # A leaf of its own on the same memory: autograd copies a dense gradient before it adds rows to it.
        module.weight = nn.Parameter(weight.detach())
        module.sparse = True
    try:
        yield
    finally:
        for module, weight in zip(rows_only, weights, strict=True):
            rows, module.weight, module.sparse = module.weight.grad, weight, False
            if rows is not None and weight.grad is None:
                weight.grad = rows.to_dense()
            elif rows is not None and weight.grad is not None:
                weight.grad.add_(rows)


def clear_gradients(model: nn.Module) -> None:
    """Forget all gradients; those of embeddings that no output layer shares stay allocated, as zeros."""
    modules = list(model.modules())
    heads = {id(module.weight) for module in modules if isinstance(module, nn.Linear)}
    kept = {id(m.weight) for m in modules if isinstance(m, nn.Embedding) and id(m.weight) not in heads}
    for parameter in model.parameters():
        if parameter.grad is not None and id(parameter) in kept:
            parameter.grad.zero_()
        else:
            parameter.grad = None


def clip_and_step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], max_norm: float
) -> tuple[Tensor, Tensor]:
    """Clip the gradient to a global norm and step, unless it is not finite.

    The fused optimizer divides by ``grad_scale`` and stays still under ``found_inf`` on its own: no pass over the
    gradients is spent on clipping, and nothing waits for the device.

    Args:
        optimizer: fused.
        parameters: those that it moves.
        max_norm: largest global norm of the gradient that is used.
    Returns:
        (norm before clipping [], whether it was finite [] bool).
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    finite = torch.isfinite(norm)
    fused: Any = optimizer
    fused.grad_scale = (norm / max_norm).clamp(min=1.0)
    fused.found_inf = (~finite).float()
    fused.step()
    return norm, finite
