"""Help of settings: sections by theme, what a beginner needs first, and nothing heavy loaded for it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import pytest

import classic.cli
import rlhf_ppo.cli
from rlhf_ppo.config.arguments.train import TrainArgs
from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.runtime.command_line.settings import parse_settings
from rlhf_ppo.runtime.command_line.settings_help import FIRST, help_text, sections

HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "gymnasium", "numpy", "safetensors", "matplotlib")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes: how large it is."""

    width: int = 0
    """Columns."""
    kind: Literal["a", "b"] | None = None
    """One of two."""
    names: tuple[str, ...] = ()
    """Several."""


@dataclass(frozen=True, kw_only=True)
class Build(Sizes):
    """Build it."""

    width: int = 3
    """Columns of the thing."""
    folder: str
    """Where it goes."""
    loud: bool = False
    """Say more."""

    FIRST: ClassVar = ("folder",)


def test_settings_stand_once_under_the_theme_that_declares_them():
    found = {title: [field.name for field in members] for title, members in sections(Build)}
    assert found == {FIRST: ["folder"], "Settings": ["loud"], "Sizes: how large it is": ["width", "kind", "names"]}
    found = {title: [field.name for field in members] for title, members in sections(TrainArgs)}
    assert sum(map(len, found.values())) == len(fields(TrainArgs))
    themes = {name: title.partition(":")[0] for title, names in found.items() for name in names}
    # Settings of the algorithm that a group gives another default stand with the group.
    assert (themes["gamma"], themes["vf_coef"], themes["clip_range"]) == ("Advantages", "Critic", "PPO")
    assert len(found[FIRST]) == 10 and len(found) == 22


@pytest.mark.parametrize("width", [80, 120])
def test_help_shows_flag_kind_sentence_and_default_and_fits_the_terminal(width):
    text = help_text(Build, prog="prog build", description="Build it.", width=width)
    assert text.startswith("usage: prog build [flags]\n\nBuild it.\n\nStart here\n  --folder TEXT ")
    shown = " ".join(text.split())
    for line in (
        "--folder TEXT Where it goes. (required)",
        "--width INT Columns of the thing. (default: 3)",
        "--kind {a,b} One of two.",
        "--names TEXT ... Several.",
        "--loud Say more.",
    ):
        assert line in shown
    whole = help_text(TrainArgs, prog="rlhf-ppo train", description="", width=width)
    assert max(map(len, whole.splitlines())) <= width
    assert "--resume-from-checkpoint, --resume TEXT" in whole and "--min-new-tokens INT" in whole
    assert all(f"--{field.name.replace('_', '-')}" in whole for field in fields(RLHFConfig))


def test_help_anywhere_among_the_flags_ends_with_0(capsys):
    for words in (["-h"], ["--folder", "x", "--help"]):
        with pytest.raises(SystemExit) as ended:
            parse_settings(Build, words, prog="prog")
        assert ended.value.code == 0 and "Where it goes." in capsys.readouterr().out


BAD = {
    "rlhf_ppo.cli": (
        "train --model m --reward r --dataset d --output-dir o --learning-rate -1",
        "sft --modle m",
        "evaluate",
        "trian",
    ),
    "classic.cli": (
        "train CartPole-v1 --learning-rate -1",
        "train CartPole-v1 --eval-episodes 0",
        "explain f --max-rows 0",
    ),
}


@pytest.mark.parametrize("program", [rlhf_ppo.cli, classic.cli], ids=["rlhf-ppo", "classic-ppo"])
def test_help_and_bad_arguments_load_nothing_heavy(program):
    """One interpreter for all of a program's: what any of them loads would still be there at the end."""
    helps = [["--help"], *([*name.split(), "--help"] for name in program.COMMANDS)]
    bad = [words.split() for words in BAD[program.__name__]]
    code = (
        f"import sys\nfrom {program.__name__} import main\ncodes = []\n"
        f"for words in {helps + bad!r}:\n"
        "    try:\n        codes.append(main(words))\n"
        "    except SystemExit as ended:\n        codes.append(ended.code)\n"
        f"print('codes', *codes, 'loaded', *(name for name in {HEAVY!r} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = ["codes", *["0"] * len(helps), *["2"] * len(bad), "loaded"]
    # classic registers an environment when it is imported.
    allowed = {"gymnasium", "numpy"} if program is classic.cli else set()
    assert [word for word in done.stdout.splitlines()[-1].split() if word not in allowed] == expected
