"""Read what is to be migrated: a file, a command line or both; the project is recognised from what they say."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rlhf_ppo.config.arguments.commands import MigrateArgs
from rlhf_ppo.config.migration_table import SOURCES
from rlhf_ppo.migration.arguments import check_values, known_fields, one_word, read_flags
from rlhf_ppo.migration.script import read_script
from rlhf_ppo.migration.shell import ShellCommand, count_processes, read_command
from rlhf_ppo.runtime.command_line.yaml_files import load_yaml

_OPENING = {"stage": "llama-factory", "rlhf_type": "ms-swift"}
"""Arguments that only one project has, and that each of its PPO runs needs."""


class Given(NamedTuple):
    """Arguments of another project, as they were given."""

    source: str
    """The project, of ``SOURCES``."""
    values: dict[str, Any]
    origin: str
    """Where they were given, in words."""
    folder: Path
    """Of the file, or the working folder: where files that they name may be."""
    processes: int
    unread: dict[str, str]
    """Argument of a Python script -> the expression whose value is not known."""


def read_given(args: MigrateArgs) -> Given:
    """Read the file and the command line; flags win over files.

    Raises:
        FileNotFoundError: no such file.
        ValueError: invalid YAML, Python or shell text, or an argument that the project does not know.
    """
    named = args.config if args.file is None else args.file
    file = None if named is None else _existing(named)
    values: dict[str, Any] = {}
    unread: dict[str, str] = {}
    command: ShellCommand | None = None
    where = "the command line"
    if file is not None and file.suffix == ".py":
        values, unread = read_script(file)
    elif file is not None and file.suffix in (".sh", ".bash"):
        command = read_command(file.read_text(encoding="utf-8"), str(file), script=True)
        where = str(file)
    elif file is not None:
        values = load_yaml(file)
    if args.command_line is not None:
        if command is not None:
            command.flags.update(read_command(args.command_line, "the command line").flags)
        else:
            command = read_command(args.command_line, where)
    if command is not None:
        files = [word for word in command.words if "=" not in word]
        files += [one_word("config", command.flags.pop("config"))] if "config" in command.flags else []
        for name in files:
            values |= load_yaml(_existing(name))
        values |= {k: yaml.safe_load(v) for k, _, v in (word.partition("=") for word in command.words if "=" in word)}
    flags = {} if command is None else command.flags
    names = {*values, *unread, *(name.replace("-", "_") for name in flags)}
    source = args.source or _recognise(names, [] if command is None else command.launcher, file)
    values.pop("env", None)  # TRL's parser sets these variables
    if "swift_version" in values:  # args.json, as ms-swift saves it, holds what it computed, too
        values = {name: value for name, value in values.items() if name in known_fields(source)}
    checked = check_values(source, values, "" if file is None else f"{file}: ") | read_flags(source, flags)
    known = {name: text for name, text in unread.items() if name in known_fields(source) and name not in checked}
    processes = 1 if command is None else count_processes(command, all_gpus=source == "llama-factory")
    origin = " and ".join(filter(None, (named, "command line" if args.command_line is not None else None)))
    folder = Path() if file is None else file.parent
    return Given(source, checked, origin, folder, args.num_processes or processes, known)


def _existing(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"config file {name} does not exist")
    return path


def _recognise(names: Collection[str], launcher: list[str], file: Path | None) -> str:
    """Return the project whose arguments these are: by its program, else by the names."""
    programs = {word.rpartition("/")[2] for word in launcher}
    if programs & {"llamafactory-cli", "lmf"}:
        return "llama-factory"
    if "swift" in programs:
        return "ms-swift"
    for name, source in _OPENING.items():
        if name in names:
            return source
    scripts = file is not None and file.suffix == ".py"
    # The first of the best: a YAML file with nothing but shared names is TRL's.
    possible = ["trl-0x", "trl"] if scripts else [source for source in SOURCES if source != "trl-0x"]
    return max(possible, key=lambda source: len(names & known_fields(source).keys()))
