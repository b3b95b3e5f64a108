"""What is checked of a loss: the function, a batch of random data, and its answer, a loss with its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Loss = Callable[..., Tensor]
"""``fn(logprobs, old_logprobs, advantages, mask, denominator) -> scalar``: [B, T] each, mask bool, denominator []."""


class Batch(NamedTuple):
    """The arguments of a loss but for the denominator, [B, T] each."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor

    def rows(self, rows: Sequence[int]) -> Batch:
        return Batch(*(x[list(rows)] for x in self))


class Answer(NamedTuple):
    """A loss [] and its gradient [B, T] with respect to the log-probs."""

    loss: Tensor
    gradient: Tensor


class LossSubject:
    """A loss function and the batch on which it is checked."""

    def __init__(self, fn: Loss, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths, width = torch.tensor([9, 2, 5, 7, 1, 4]), 9

        def normal() -> Tensor:
            return torch.randn(len(lengths), width, generator=generator, dtype=torch.float64)

        self.fn = fn
        self.mask = torch.arange(width) < lengths[:, None]
        old = -1.5 - normal().abs()
        # Ratios from about 0.5 to 1.8, so that some are clipped on either side.
        self.batch = Batch(old + 0.3 * normal(), old, normal(), self.mask)
        self.tokens, self.sequences = self.mask.sum(), self.mask.any(dim=1).sum()

    def answer(self, batch: Batch, denominator: Tensor | None = None) -> Answer:
        """Compute loss and gradient of a batch; by default divided by its number of tokens."""
        logprobs = batch.logprobs.detach().clone().requires_grad_()
        _, *others = (x.clone() for x in batch)  # a loss may change them in place
        loss = self.fn(logprobs, *others, batch.mask.sum() if denominator is None else denominator)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss must be one number as a tensor, got {shape}")
        (gradient,) = torch.autograd.grad(loss.sum(), logprobs, allow_unused=True)
        return Answer(loss.detach(), torch.zeros_like(logprobs) if gradient is None else gradient)
