"""Load and call the user's own code: functions by name, callbacks checked before a run, calls with a time limit."""

from __future__ import annotations

import asyncio
import concurrent.futures
import difflib
import importlib
import importlib.util
import inspect
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_ppo.runtime.machine.signals import stop_if_asked

FAILURES = (Exception, SystemExit, asyncio.CancelledError)
"""What counts as a failure of user code: sys.exit() in it must not end a run as if it had succeeded."""

_POLL_S = 0.25
"""Seconds between two checks for a signal while waiting for a call."""


def load_function(source: str, what: str) -> Callable[..., Any]:
    """Load the function that ``source`` names. A file runs once, unless it changes, so that its functions share state.

    A class is instantiated without arguments, and its instance must be callable.

    Args:
        source: ``file.py:function`` or ``module:function``.
        what: its name in messages, such as "reward".
    Raises:
        ValueError: the file, module or function does not exist (suggests the closest), or running it failed.
    """
    function = load_factory(source, what)
    return _instance(function, f"{what} {source!r}") if isinstance(function, type) else function


def load_factory(source: str, what: str) -> Callable[..., Any]:
    """Load the class or function that ``source`` names, which makes something; see :func:`load_function`."""
    module_name, _, name = source.rpartition(":")
    if not module_name:
        raise ValueError(f"{what} {source!r} names no function: write file.py:function or module:function")
    module = _load_module(module_name, what)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{what} {source!r}: {module_name} has no function {name!r}{_closest(name, module)}")
    return function


def load_functions(sources: Sequence[str], what: str) -> list[Callable[..., Any]]:
    """Load the functions that ``sources`` name.

    Args:
        sources: ``file.py:f,g`` or ``module:f,g``, or ``file.py`` for all of its own public functions with a docstring.
        what: their name in messages, such as "tools".
    Raises:
        ValueError: see :func:`load_function`; or a file has no such function.
    """
    found: list[Callable[..., Any]] = []
    for source in sources:
        module_name, _, names = source.rpartition(":")
        if module_name:
            found += [load_function(f"{module_name}:{name.strip()}", what) for name in names.split(",")]
            continue
        if not source.endswith(".py"):
            raise ValueError(f"{what} {source!r} names no function: write file.py, file.py:f,g or module:f,g")
        module = _load_module(source, what)
        own = [function for name, function in vars(module).items() if not name.startswith("_")]
        own = [f for f in own if inspect.isfunction(f) and f.__module__ == module.__name__ and f.__doc__]
        if not own:
            raise ValueError(f"{what} file {source} has no public function with a docstring: write one, or name it")
        found += own
    return found


def _load_module(module_name: str, what: str) -> ModuleType:
    if module_name.endswith(".py"):
        if not Path(module_name).is_file():
            raise ValueError(f"{what} file {module_name} does not exist (working folder: {Path.cwd()})")
        try:
            return _run(Path(module_name).resolve(), Path(module_name).stat().st_mtime_ns)
        except FAILURES as error:
            raise ValueError(f"{what} file {module_name}{_where(error)}") from error
    else:
        try:
            return importlib.import_module(module_name)
        except FAILURES as error:
            raise ValueError(f"{what} module {module_name!r} cannot be imported{_where(error)}") from error


def _instance(cls: type, where: str) -> Any:
    try:
        made = cls()
    except FAILURES as error:
        raise ValueError(
            f"{where}: {cls.__name__}() failed{_where(error)}; a class is instantiated without arguments: give its "
            "parameters defaults, or name a function that instantiates it"
        ) from error
    if not callable(made):
        raise ValueError(f"{where}: {cls.__name__} has no __call__, so its instance cannot be called: add one")
    return made


def _closest(name: str, module: ModuleType) -> str:
    """Suggest what could have been meant instead of ``name``, as the end of a message."""
    own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if close := difflib.get_close_matches(name, own, n=1):
        return f"; did you mean {close[0]!r}?"
    return f"; it has {', '.join(sorted(own)[:12])}" if own else "; it defines none"


def _where(error: BaseException) -> str:
    """Describe the error that a module raised, with its line."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f": {error.msg} ({Path(error.filename).name}, line {error.lineno})"
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = (
        "" if last.filename.startswith("<frozen importlib") else f" ({Path(last.filename).name}, line {last.lineno})"
    )
    return f": {type(error).__name__}: {error}{place}"


@cache
def _run(file: Path, changed: int) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Callbacks


def require_callbacks(callbacks: Any, arguments: str) -> list[Any]:
    """Check that callbacks can be called with their arguments; returns them as a list.

    Args:
        callbacks: as the user passed them; None: none.
        arguments: what they are called with, such as "trainer, metrics".
    Raises:
        ValueError: it is not a list, or one of them cannot be called like that; names it.
    """
    if callbacks is not None and (isinstance(callbacks, (str, Mapping)) or not isinstance(callbacks, Iterable)):
        raise ValueError(f"callbacks must be a list of functions of ({arguments}), got {callbacks!r}")
    found = [] if callbacks is None else list(callbacks)
    for i, callback in enumerate(found):
        if isinstance(callback, type) or not callable(callback):
            raise ValueError(f"callbacks[{i}] must be a function of ({arguments}), got {callback!r}")
        try:
            signature = inspect.signature(callback)
        except ValueError:  # some functions written in C have no signature
            continue
        try:
            signature.bind(*arguments.split(", "))
        except TypeError as error:
            raise ValueError(f"callbacks[{i}] is called with ({arguments}), but takes {signature}: {error}") from None
    return found


def callback_name(callback: Any) -> str:
    """Return a callback's name for messages."""
    return getattr(callback, "__name__", type(callback).__name__)


# Time limits


def start(call: Callable[[], Any], timeout_s: float | None) -> Future[Any]:
    """Run ``call`` in a daemon thread, which can be abandoned if it hangs and does not keep the process alive.

    Without a time limit it runs at once in the caller's thread.
    """
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    if timeout_s is None:
        run()
    else:
        threading.Thread(target=run, daemon=True).start()
    return future


def has_ended(future: Future[Any], wait_s: float | None) -> bool:
    """Wait at most ``wait_s`` seconds for a call to end; raises :class:`Interrupted` if a signal arrives meanwhile.

    Waiting is separate from reading the result, because the call may raise a TimeoutError of its own.
    """
    end = None if wait_s is None else time.monotonic() + wait_s
    while True:
        left = _POLL_S if end is None else min(_POLL_S, max(0.0, end - time.monotonic()))
        done = concurrent.futures.wait([future], timeout=left).done
        # Checked first: Ctrl-C also ends processes that a reward has started, which would look like its failure.
        stop_if_asked()
        if done:
            return True
        if end is not None and time.monotonic() >= end:
            return False
