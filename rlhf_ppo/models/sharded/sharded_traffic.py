"""Traffic of sharded models: count what a process contributes when weights are gathered and gradients summed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule


class _Counted:
    """One of FSDP's two collectives, as torch runs it by default, with its bytes counted."""

    def __init__(self, count: Callable[[int], object], *, repeated: bool) -> None:
        """Call ``count`` with the bytes of each call; ``repeated``: results are also summed between machines."""
        self.count, self.repeated = count, repeated

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate a buffer."""
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Counted):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        self.count(input_tensor.nbytes)
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


class _Sum(_Counted):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        self.count(input_tensor.nbytes + (output_tensor.nbytes if self.repeated else 0))
        return dist.reduce_scatter_tensor(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def count_traffic(module: FSDPModule, count: Callable[[int], object], *, repeated: bool) -> None:
    """Call ``count`` with the bytes of each collective of a sharded module."""
    module.set_custom_all_gather(cast(Any, _Gather(count, repeated=repeated)))
    module.set_custom_reduce_scatter(cast(Any, _Sum(count, repeated=repeated)))
