"""Transfers between host and device that do not wait for the device's queue: on CUDA through pinned memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def indices_on(device: torch.device, indices: Sequence[int]) -> Tensor:
    """Copy indices to a device; a CUDA device takes them in its turn, and the host goes on at once."""
    return from_host(torch.tensor(indices, dtype=torch.long), device)


def from_host(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor on the host to a device; a CUDA device takes it in its turn, and the host goes on at once."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class Reading:
    """A tensor on its way to the host.

    To read a CUDA tensor the plain way is to wait for all work queued so far; the device then has nothing to do until
    the host has queued more. This copy is queued when it is made: ``wait`` waits for the work before it, while the
    device goes on with the work behind it.
    """

    def __init__(self, x: Tensor) -> None:
        """Queue the copy of ``x``."""
        on_cuda = x.device.type == "cuda"
        self._host = x.detach().to("cpu", non_blocking=on_cuda)  # into pinned memory
        self._copied = torch.cuda.Event() if on_cuda else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(x.device))

    def wait(self) -> Tensor:
        """Return the tensor on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host
