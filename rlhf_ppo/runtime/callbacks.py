"""Callbacks: that what a run will call after each update can be called, found out before it begins."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any


def require_callbacks(callbacks: Any, arguments: str) -> list[Any]:
    """The callbacks as a list.

    Args:
        callbacks: what the user gave; None: none.
        arguments: what they are called with, for messages, such as "trainer, metrics".
    Raises:
        ValueError: it is no list, or one of them cannot be called like that; says which.
    """
    if callbacks is not None and (isinstance(callbacks, (str, Mapping)) or not isinstance(callbacks, Iterable)):
        raise ValueError(f"callbacks must be a list of functions of ({arguments}), got {callbacks!r}")
    found = [] if callbacks is None else list(callbacks)
    for i, callback in enumerate(found):
        if isinstance(callback, type) or not callable(callback):
            raise ValueError(f"callbacks[{i}] must be a function of ({arguments}), got {callback!r}")
        try:
            signature = inspect.signature(callback)
        except ValueError:  # some functions written in C do not tell
            continue
        try:
            signature.bind(*arguments.split(", "))
        except TypeError as error:
            raise ValueError(f"callbacks[{i}] is called with ({arguments}), but takes {signature}: {error}") from None
    return found


def callback_name(callback: Any) -> str:
    """What a callback is called in messages."""
    return getattr(callback, "__name__", type(callback).__name__)
