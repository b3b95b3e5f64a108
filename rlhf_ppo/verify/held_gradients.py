"""Held gradients: what a loss detaches on purpose, held fixed while finite differences move its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Held(TorchFunctionMode):
    """Record what is detached from the gradient, and give the same numbers back when the loss is computed again.

    A loss may stop a gradient on purpose (a ratio as a weight): its derivative is the one with that number held.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Any] = []
        self.place: int | None = None
        """Where to read; None while recording."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        stops = getattr(func, "__name__", "") in ("detach", "detach_", "item") or func == Tensor.data.__get__  # pyright: ignore
        if not stops and torch.is_grad_enabled():
            return result
        if self.place is None:
            self.held.append(result.clone() if isinstance(result, Tensor) else result)
            return result
        self.place += 1
        return self.held[self.place - 1]
