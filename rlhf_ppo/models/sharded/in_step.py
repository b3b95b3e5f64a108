"""In step: processes that share a model's weights call it equally often, however often each of them needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@contextmanager
def taking_part(
    owner: nn.Module,
    method: str,
    idle: Callable[[], object],
    computing_together: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[None]:
    """Let processes call a sharded model's method as often as each needs: all gather its weights until none calls.

    A process that an error has made leave the block still takes part, and raises the error in the end.

    Args:
        owner: has the method.
        method: its name.
        idle: calls the method for nothing; made by a process that has left the block while another still calls.
        computing_together: entered wherever processes wait for each other. An error in there is raised at once.
    """
    call, flag = getattr(owner, method), torch.zeros(1, device=next(owner.parameters()).device)
    broken = False

    @contextmanager
    def in_step() -> Iterator[None]:
        nonlocal broken
        with computing_together():
            broken = True
            yield
            broken = False

    def any_calls(*, this: bool) -> bool:
        flag.fill_(this)
        dist.all_reduce(flag)
        return bool(flag)

    def together(*args: Any, **kwargs: Any) -> Any:
        with in_step():
            any_calls(this=True)
            return call(*args, **kwargs)

    setattr(owner, method, together)
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        if broken:
            raise
        error = raised
    finally:
        setattr(owner, method, call)
    with in_step():
        while any_calls(this=False):
            idle()
    if error is not None:
        raise error


def most_anywhere(count: int, device: torch.device) -> int:
    """Return the largest of the counts that the processes call with."""
    largest = torch.tensor(count, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
