"""Functions of the user's own, by name: ``file.py:function`` or ``module:function``."""

from __future__ import annotations

import importlib
import importlib.util
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_ppo.waiting import FAILURES


def load_function(source: str, what: str) -> Callable[..., Any]:
    """The function that ``source`` names. A file is run once, unless it changes, so that its functions share its state.

    Args:
        source: ``file.py:function`` or ``module:function``.
        what: what to call it in messages, such as "reward".
    Raises:
        ValueError: the file, module or function is not there, or running it failed.
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
    if not callable(function):
        raise ValueError(f"{what} {source!r}: {module_name} has no function {name!r}")
    return function


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
