"""Load settings: defaults, then a preset, then a YAML file, then flags; a typo is an error with a suggestion."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast

import tyro
from pydantic import TypeAdapter, ValidationError

from rlhf_ppo.runtime.command_line.presets import find_preset
from rlhf_ppo.runtime.command_line.settings_help import aliases, help_text, positional
from rlhf_ppo.runtime.command_line.unknown_names import hint, refuse
from rlhf_ppo.runtime.command_line.yaml_files import load_yaml
from rlhf_ppo.runtime.package import __version__
from rlhf_ppo.runtime.processes.voice import first_alone, settle

Settings = TypeVar("Settings")
Command = tuple[type, Callable[[Any], int | None] | str]
"""A command's arguments, and what it runs: a function, or "module:function", imported once the arguments are valid."""


def read_yaml(path: str | Path, cls: type) -> dict[str, Any]:
    """Read the settings in a YAML file, checked key by key against the dataclass ``cls``.

    Numbers may be written ``1e-5``: YAML reads that as a string, the field's type makes it a float.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a mapping, an unknown key (with the closest known one), or a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    content = load_yaml(path)
    refuse(cls, {str(key): value for key, value in content.items()}, where=f"{path}: ")
    types = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    return {key: _checked(path, key, value, known, types) for key, value in content.items()}


def _checked(path: Path, key: Any, value: Any, known: list[str], types: Mapping[str, Any]) -> Any:
    if key not in known:
        listed = f"; known: {', '.join(sorted(known))}"
        raise ValueError(f"{path}: unknown key {key!r}{hint(str(key), known) or listed}")
    if isinstance(value, str) and "tuple" in str(types[key]):
        value = [value]  # one word needs no brackets
    try:
        return as_type(value, types[key])
    except ValueError as error:
        raise ValueError(f"{path}: {key}: {error}, got {value!r}") from None


def as_type(value: Any, hint: Any) -> Any:
    """Convert what YAML made of a setting to the setting's type; text may be a number, true and false may not.

    Raises:
        ValueError: it does not fit; says why.
    """
    if _counts(hint):
        value = [as_whole(item) for item in value] if isinstance(value, list) else as_whole(value)
    try:
        typed = TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"]) from None
    items = value if isinstance(value, (list, tuple)) else [value]
    # Pydantic takes true for 1.
    if "bool" not in str(hint) and any(isinstance(item, bool) for item in items):
        raise ValueError("Input should be a number, not true or false")
    return typed


def as_whole(value: Any) -> Any:
    """Return text such as 1e6 as the whole number that it is, and anything else unchanged."""
    if not isinstance(value, str) or value.isdecimal():
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() else value


def _counts(hint: Any) -> bool:
    """Whether a setting takes whole numbers only."""
    words = str(hint)
    return "int" in words and not any(other in words for other in ("float", "str", "bool"))


def parse_settings(cls: type[Settings], argv: Sequence[str], *, prog: str, description: str | None = None) -> Settings:
    """Build ``cls`` from ``argv``: flags win over ``--config file.yaml``, which wins over ``--preset``, then defaults.

    A bool's flag without a value means True. A field annotated ``tyro.conf.Positional[...]`` is a word without a flag;
    such words come first. A class with a field ``config`` of its own takes settings from flags only.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_yaml`; a wrong flag ends the program with usage help.
    """
    yaml_allowed = "config" not in typing.get_type_hints(cls)
    if "-h" in argv or "--help" in argv:
        if yaml_allowed:
            description = f"{description or ''} Settings may also come from a YAML file: --config FILE (flags win)."
        print(help_text(cls, prog=prog, description=description or ""), end="")
        raise SystemExit(0)
    flags: list[str] = []
    from_yaml: list[str] = []
    held: dict[str, Any] = {}
    from_file: dict[str, Any] | None = None
    # Words before the first flag go first again: after YAML's list values they would be read as part of the list.
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    rest = iter(argv[len(words) :])
    for word in rest:
        if yaml_allowed and (word == "--config" or word.startswith("--config=")):
            path = word.partition("=")[2] or next(rest, "")
            if not path:
                raise ValueError("--config needs the path of a YAML file")
            if from_file is not None:
                raise ValueError("--config is given twice: put the settings into one file")
            from_file = read_yaml(path, cls)
        else:
            flags.append(word)
    before, given = _grouped(flags, cls)
    refuse(cls, {name: words[-1].rpartition("=")[2] for name, words in given.items()})
    file = from_file or {}
    *_, named = given.get("preset", ["--preset"])
    # A flag without a value is tyro's to refuse.
    preset = file.get("preset") if named == "--preset" else named.rpartition("=")[2]
    for key, value in {**_read_preset(cls, preset), **file}.items():
        if key in positional(cls):
            words = words or [str(value)]
        elif isinstance(value, dict):
            held[key] = value
        elif _reads_otherwise(value):
            held[key] = value
            from_yaml += _as_flag(key, "held")
        else:
            from_yaml += _as_flag(key, value)
    settings = tyro.cli(
        cls,
        args=[*words, *before, *from_yaml, *_spelt_out(list(itertools.chain(*given.values())), cls)],
        prog=prog,
        description=description,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )
    held = {key: value for key, value in held.items() if key not in given}
    return dataclasses.replace(cast(Any, settings), **held) if held else settings


def _read_preset(cls: type, name: str | None) -> dict[str, Any]:
    """Read the settings of a preset of the class's folder ``PRESETS``; none without a name."""
    folder: Path | None = getattr(cls, "PRESETS", None)
    return {} if name is None or folder is None else read_yaml(find_preset(folder, name), cls)


def _grouped(flags: Sequence[str], cls: type) -> tuple[list[str], dict[str, list[str]]]:
    """Return the words before the first flag, and setting -> its flag and values.

    ``--prompt a --prompt b`` is ``--prompt a b``, where a setting takes several.

    Raises:
        ValueError: a flag of one value is given twice.
    """
    hints, other_names = typing.get_type_hints(cls), aliases(cls)
    groups: dict[str, list[str]] = {}
    before: list[str] = []
    group = before
    for word in flags:
        if not word.startswith("--"):
            group.append(word)
            continue
        flag, equals, value = word.partition("=")
        setting = other_names.get(flag, flag[2:]).replace("-", "_")
        group = groups.setdefault(setting, [])
        if not group:
            group.append(word)
            continue
        if not _takes_several(hints.get(setting)):
            raise ValueError(f"{flag} is given twice, but takes one value: give it once")
        if "=" in group[0]:
            group[:1] = group[0].split("=", 1)
        group += [value] if equals else []
    return before, groups


def _takes_several(hint: Any) -> bool:
    return any(typing.get_origin(part) in (tuple, list, dict) for part in (hint, *typing.get_args(hint)))


def _spelt_out(flags: Sequence[str], cls: type) -> list[str]:
    """Spell flags out: ``--chat`` of a bool as ``--chat True``, ``--seed 1e3`` of an int as ``--seed 1000``."""
    hints = {f"--{name.replace('_', '-')}": hint for name, hint in typing.get_type_hints(cls).items()}
    words: list[str] = []
    counts = False
    for word, following in itertools.pairwise([*flags, "--"]):
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            counts = _counts(hints.get(flag.replace("_", "-")))
            words.append(f"{flag}={as_whole(value)}" if equals and counts else word)
        else:
            words.append(str(as_whole(word)) if counts else word)
        if hints.get(word) is bool and following.startswith("--"):
            words.append("True")
    return words


def _as_flag(key: str, value: Any) -> list[str]:
    words = [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]
    return [f"--{key.replace('_', '-')}", *words]


def _reads_otherwise(value: Any) -> bool:
    """Whether the value is or contains text that flags would read as something else."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(item, str) and (item.startswith("-") or item in ("None", "")) for item in items)


def run_command(
    prog: str,
    commands: Mapping[str, Command],
    argv: Sequence[str] | None = None,
    *,
    before: Callable[[str], object] = str,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> int:
    """Run ``prog COMMAND flags``: check the command's settings, then import and run it; report bad input in one line.

    Args:
        prog: name of the program.
        commands: name -> its arguments and what it runs; a name of two words is a group's command.
        argv: the words after the program's name; None: those of this process.
        before: called with the program's and the command's name before the settings are read.
        around: makes the context in which the command runs.
    Returns:
        The exit code: 0, or 2 for bad input.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    group = {rest: command for name, command in commands.items() if (rest := _rest(name, argv)) != name}
    if group:
        return run_command(f"{prog} {argv[0]}", group, argv[1:], before=before, around=around)
    with first_alone():  # usage and help: all processes have the same words
        code = _answer(prog, commands, argv)
    if code is not None:
        return code
    cls, run = commands[argv[0]]
    try:
        before(f"{prog} {argv[0]}")
        with first_alone():
            settings = parse_settings(cls, argv[1:], prog=f"{prog} {argv[0]}", description=_summary(cls))
        with around():
            return _loaded(run)(settings) or 0
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        prints, code = settle(error)
        if prints:
            print(f"error: {error}", file=sys.stderr)
        return code


def _rest(name: str, argv: Sequence[str]) -> str:
    """Return a command's name without the group that ``argv`` begins with."""
    return name.removeprefix(f"{argv[0]} ") if argv else name


def _answer(prog: str, commands: Mapping[str, Command], argv: Sequence[str]) -> int | None:
    """Print version, help, or that a command is unknown; returns the exit code, or None if there is one to run."""
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {_summary(cls)}" for name, (cls, _) in commands.items()]
    usage = f"usage: {prog} COMMAND [flags]\n\n" + "\n".join(lines)
    if argv == ["--version"]:
        print(f"{prog} {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{usage}\n\n{prog} COMMAND --help lists the flags of a command; {prog} --version prints the version.")
        return 0 if argv else 2
    if argv[0] in commands:
        return None
    close = difflib.get_close_matches(argv[0], [name.split()[0] for name in commands], n=1)
    print(f"error: unknown command {argv[0]!r}" + (f"; did you mean {close[0]!r}?" if close else ""), file=sys.stderr)
    print(usage, file=sys.stderr)
    return 2


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _loaded(run: Callable[[Any], int | None] | str) -> Callable[[Any], int | None]:
    if not isinstance(run, str):
        return run
    module, _, name = run.partition(":")
    return getattr(import_module(module), name)
