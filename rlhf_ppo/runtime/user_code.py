"""Functions of the user's own, by name: ``file.py:function`` or ``module:function``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_ppo.runtime.waiting import FAILURES


def load_function(source: str, what: str) -> Callable[..., Any]:
    """The function that ``source`` names. A file is run once, unless it changes, so that its functions share its state.

    A class that is named is made without arguments, and what it makes must be callable.

    Args:
        source: ``file.py:function`` or ``module:function``.
        what: what to call it in messages, such as "reward".
    Raises:
        ValueError: the file, module or function is not there (with the closest that is), or running it failed.
    """
    module_name, _, name = source.rpartition(":")
    if not module_name:
        raise ValueError(f"{what} {source!r} names no function: write file.py:function or module:function")
    if module_name.endswith(".py"):
        if not Path(module_name).is_file():
            raise ValueError(f"{what} file {module_name} does not exist (working folder: {Path.cwd()})")
        try:
            module = _run(Path(module_name).resolve(), Path(module_name).stat().st_mtime_ns)
        except FAILURES as error:
            raise ValueError(f"{what} file {module_name}{_where(error)}") from error
    else:
        try:
            module = importlib.import_module(module_name)
        except FAILURES as error:
            raise ValueError(f"{what} module {module_name!r} cannot be imported{_where(error)}") from error
    function = getattr(module, name, None)
    if isinstance(function, type):
        function = _instance(function, f"{what} {source!r}")
    if not callable(function):
        raise ValueError(f"{what} {source!r}: {module_name} has no function {name!r}{_closest(name, module)}")
    return function


def _instance(cls: type, where: str) -> Any:
    try:
        made = cls()
    except FAILURES as error:
        raise ValueError(
            f"{where}: {cls.__name__}() failed{_where(error)}; a class is made without arguments, so give what it "
            "needs a default, or name a function that calls it"
        ) from error
    if not callable(made):
        raise ValueError(f"{where}: {cls.__name__} has no __call__, so it cannot be asked: give it one")
    return made


def _closest(name: str, module: ModuleType) -> str:
    """What could have been meant instead of ``name``, as the end of a message."""
    own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if close := difflib.get_close_matches(name, own, n=1):
        return f"; did you mean {close[0]!r}?"
    return f"; it has {', '.join(sorted(own)[:12])}" if own else "; it defines none"


def _where(error: BaseException) -> str:
    """What went wrong while a module was run, and in which line."""
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
