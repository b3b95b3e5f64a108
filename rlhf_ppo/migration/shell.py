"""Read the command of a shell script or command line: its variables, launcher and arguments; nothing is executed."""

from __future__ import annotations

import itertools
import operator
import re
import shlex
from typing import NamedTuple

_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv, "%": operator.mod}
_LAUNCHERS = (("swift", "rlhf"), ("llamafactory-cli", "train"), ("lmf", "train"))
"""Programs of the other projects, with the word after which their arguments begin."""


class ShellCommand(NamedTuple):
    """A command that starts a training run."""

    variables: dict[str, str]
    """Set before it, in a script or in front of the program."""
    launcher: list[str]
    """Words up to the arguments."""
    words: list[str]
    """The arguments that come before the first flag: a config file, or ``name=value``."""
    flags: dict[str, list[str]]
    """Flag without its dashes -> the words after it."""


def read_command(text: str, where: str, *, script: bool = False) -> ShellCommand:
    """Read a command line, or the first command with a launcher or flags of a script.

    Raises:
        ValueError: no such command, quotes that do not match, or a value that only a shell could compute.
    """
    variables: dict[str, str] = {}
    lines = re.sub(r"\\\r?\n", " ", text).splitlines()
    for line in (line for line in lines if not line.lstrip().startswith("#")):
        words = _split(_substituted(line, variables, where) if script else line, where)
        while words and (found := _ASSIGNMENT.fullmatch(words[0])):
            variables[found[1]] = found[2]
            words.pop(0)
        if words[:1] == ["export"]:
            variables |= {found[1]: found[2] for word in words[1:] if (found := _ASSIGNMENT.fullmatch(word))}
        elif words and (not script or _begin(words) or any(word.startswith("--") for word in words)):
            return _command(words, variables, where)
    raise ValueError(f"{where} has no command that starts a run: give one, such as `swift rlhf --rlhf_type ppo ...`")


def count_processes(command: ShellCommand, *, all_gpus: bool) -> int:
    """Return the number of processes of a command, or 1 where it does not say.

    Args:
        command: as read.
        all_gpus: whether the program starts a process for each visible GPU by itself.
    """
    named = re.findall(r"--(?:num[-_]processes|nproc[-_]per[-_]node)[= ](\d+)", " ".join(command.launcher))
    nodes = int(command.variables.get("NNODES", "1"))
    if named:
        return int(named[-1])
    if number := command.variables.get("NPROC_PER_NODE"):
        return int(number) * nodes
    devices = command.variables.get("CUDA_VISIBLE_DEVICES", "")
    return (len(devices.split(",")) if all_gpus and devices else 1) * nodes


def _split(line: str, where: str) -> list[str]:
    try:
        words = shlex.split(line)
        return list(itertools.takewhile(lambda word: not word.startswith("#"), words))
    except ValueError as error:
        raise ValueError(f"{where} cannot be read as a shell command ({error}): {line.strip():.80}") from None


def _substituted(line: str, variables: dict[str, str], where: str) -> str:
    """Replace variables, and arithmetic with whole numbers: ``$(expr 16 / $n)`` and ``$((16 / n))``."""
    line = re.sub(r"\$\{(\w+)\}|\$(\w+)", lambda m: variables.get(m[1] or m[2], m[0]), line)

    def computed(found: re.Match[str]) -> str:
        words = (found[1] or found[2]).split()
        if len(words) == 3 and words[1].strip("\\") in _OPERATORS:
            left, right = (variables.get(word, word) for word in (words[0], words[2]))
            if left.isdecimal() and right.isdecimal() and int(right):
                return str(_OPERATORS[words[1].strip("\\")](int(left), int(right)))
        return found[0]

    line = re.sub(r"\$\(expr ([^()]*)\)|\$\(\(([^()]*)\)\)", computed, line)
    flag = re.search(r"--\S+[= ]\s*\"?(\$[\w({][^\s\"]*)", line)
    if flag:
        raise ValueError(f"{where}: the value {flag[1]} is known to the shell alone: write the value itself there")
    return line


def _begin(words: list[str]) -> int:
    """Return the number of words before the program's arguments."""
    scripts = [i + 1 for i, word in enumerate(words) if word.endswith(".py")]
    pairs = itertools.pairwise(words)
    programs = [i + 2 for i, (one, two) in enumerate(pairs) if (one.rpartition("/")[2], two) in _LAUNCHERS]
    return max([0, *scripts, *programs])


def _command(words: list[str], variables: dict[str, str], where: str) -> ShellCommand:
    begin = _begin(words)
    launcher, arguments = words[:begin], words[begin:]
    command = ShellCommand(variables, launcher, [], {})
    values = command.words
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values = command.flags[name] = [value] if equals else []
        elif word not in ("&", "|", ";"):
            values.append(word)
        else:
            break
    for word in command.words:
        if "=" not in word and not word.endswith((".yaml", ".yml", ".json")):
            raise ValueError(f"{where}: flags begin with --, got {word!r}")
    return command
