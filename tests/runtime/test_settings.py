"""Settings from defaults, YAML and flags: fault 30, and who wins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import tyro

import classic
from rlhf_ppo import RLHFConfig
from rlhf_ppo.core.validation import require_types
from rlhf_ppo.pipeline.evaluation.evaluate import EvaluateArgs
from rlhf_ppo.pipeline.generate import GenerateArgs
from rlhf_ppo.pipeline.labelled.reward_training import RewardTrainingArgs
from rlhf_ppo.pipeline.labelled.sft import SFTArgs
from rlhf_ppo.runtime.command_line.settings import load_yaml, parse_settings, read_yaml, run_command


@dataclass(frozen=True, kw_only=True)
class Args:
    """Do a small thing."""

    name: str
    """A name."""
    rate: float = 0.1
    """A rate."""
    steps: tuple[int, ...] | None = None
    """Some steps."""
    mode: Literal["a", "b"] = "a"
    """A mode."""
    loud: bool = False
    """Loudness."""
    limit: int | None = 3
    """A limit."""

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate must be 0 or more, got {self.rate}")


@pytest.fixture
def yaml(tmp_path):
    def write(text: str) -> str:
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return str(file)

    return write


def parse(*argv: str) -> Args:
    return parse_settings(Args, argv, prog="test")


def test_defaults_then_yaml_then_flags(yaml):
    file = yaml("name: yaml\nrate: 0.5\nmode: b\n")
    assert parse("--name", "x") == Args(name="x")
    assert parse("--config", file) == Args(name="yaml", rate=0.5, mode="b")
    # Flags win wherever they stand, and --config=FILE is the same.
    for argv in (["--config", file, "--rate", "0.7"], ["--rate", "0.7", f"--config={file}"]):
        assert parse(*argv) == Args(name="yaml", rate=0.7, mode="b")


def test_a_key_that_is_there_twice_is_refused_with_both_lines(yaml):
    """YAML keeps the last silently; a mapping that is merged in may be overridden, as it is meant to be."""
    for text, lines in (("name: a\nrate: 1\nname: b\n", "1 and 3"), ("name: a\nsteps: {x: 1,\n x: 2}\n", "2 and 3")):
        with pytest.raises(ValueError, match=rf"config\.yaml: '(name|x)' is given twice, in lines {lines}: keep one"):
            read_yaml(yaml(text), Args)
    file = yaml("a: &base {rate: 1, x: 2}\nb: {<<: *base, rate: 3}\n")
    assert load_yaml(Path(file))["b"] == {"rate": 3, "x": 2}


def test_fault_30_yaml_1e_5_is_a_float(yaml):
    """YAML itself reads 1e-5, without a dot, as a string."""
    assert parse("--config", yaml("name: x\nrate: 1e-5\n")).rate == 1e-5
    args = parse_settings(RLHFConfig, ["--config", yaml("output_dir: o\nlearning_rate: 3e-6\n")], prog="test")
    assert args.learning_rate == 3e-6


def test_fault_30_an_unknown_key_suggests_the_closest(yaml):
    with pytest.raises(ValueError, match=r"config\.yaml: unknown key 'learning_rat'; did you mean 'learning_rate'\?"):
        read_yaml(yaml("learning_rat: 1\n"), RLHFConfig)
    with pytest.raises(ValueError, match="unknown key 'zzz'; known: limit, loud, mode, name, rate, steps"):
        read_yaml(yaml("zzz: 1\n"), Args)


@pytest.mark.parametrize("flag", ["--top-k", "--top_k", "--top-k=5"])
def test_a_setting_that_is_refused_says_why_in_a_file_and_as_a_flag(yaml, flag):
    with pytest.raises(ValueError, match=r"config\.yaml: top_p is not supported: .*use temperature"):
        read_yaml(yaml("output_dir: o\ntop_p: 0.9\n"), RLHFConfig)
    with pytest.raises(ValueError, match=r"^top_k is not supported: .*use temperature"):
        parse_settings(RLHFConfig, ["--output-dir", "o", flag, "5"], prog="test")


def test_fault_30_an_unknown_flag_ends_with_a_suggestion(capsys):
    with pytest.raises(SystemExit) as error:
        parse("--name", "x", "--rat", "1")
    assert error.value.code == 2
    assert "--rate" in capsys.readouterr().err


def test_fault_30_contradictions_in_a_file_name_both(yaml, capsys):
    file = yaml("output_dir: o\nrollout_batch_size: 30\nnum_minibatches: 4\n")
    with pytest.raises(SystemExit) as error:
        run_command("prog", {"train": (RLHFConfig, lambda args: 0)}, ["train", "--config", file])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert "rollout_batch_size=30" in message and "num_minibatches=4" in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nrate: fast\n", "rate: .*number.*got 'fast'"),
        ("name: x\nmode: c\n", "mode: .*'a' or 'b'.*got 'c'"),
        ("name: x\nlimit: 1.5\n", r"limit: .*got 1\.5"),
        ("name: x\nrate: true\n", "rate: Input should be a number, not true or false, got True"),
        ("name: x\nlimit: false\n", "limit: Input should be a number, not true or false, got False"),
        ("name: x\nsteps: [1, yes]\n", "steps: Input should be a number, not true or false, got .1, True."),
        ("- a\n- b\n", "must hold `name: value` lines, got list"),
        ("name: [x\n", "not valid YAML"),
    ],
)
def test_a_wrong_value_is_named_with_its_file(yaml, text, message):
    with pytest.raises(ValueError, match=rf"config\.yaml.*{message}"):
        read_yaml(yaml(text), Args)


def test_every_kind_of_value_survives_the_file(yaml):
    file = yaml("name: 'a b -c'\nsteps: [1, 2]\nloud: true\nlimit: null\nrate: 1\n")
    assert parse("--config", file) == Args(name="a b -c", steps=(1, 2), loud=True, limit=None, rate=1.0)
    assert parse("--name", "x", "--steps", "3", "4", "--loud", "True").steps == (3, 4)
    assert read_yaml(yaml(""), Args) == {}


def test_a_bools_flag_may_stand_alone():
    """At the end, before another flag, or with its value; a flag of another type still needs one."""
    for flags in ("--name x --loud", "--loud --name x", "--name x --loud True"):
        assert parse_settings(Args, flags.split(), prog="x").loud
    assert not parse_settings(Args, ["--name", "x", "--loud", "False"], prog="x").loud
    with pytest.raises(SystemExit):
        parse_settings(Args, ["--name", "x", "--rate"], prog="x")


def test_a_flag_that_is_repeated_collects_values_or_is_refused(yaml):
    """Where a setting takes several values all count, however they are written; where it takes one, neither does."""
    for flags in ("--steps 1 2 --steps 3", "--steps=1 --steps=2 --steps 3", "--steps 1 --name x --steps=2 --steps 3"):
        assert parse(*("--name x " * ("--name" not in flags) + flags).split()).steps == (1, 2, 3)
    file = yaml("name: x\nsteps: [9]\n")
    assert parse("--config", file, "--steps", "1", "--steps", "2").steps == (1, 2)
    for flags in ("--rate 1 --rate 2", "--rate=1 --rate 1", "--loud --loud", "--mode a --rate 1 --mode b"):
        name = flags.split()[0].partition("=")[0]
        with pytest.raises(ValueError, match=f"^{name} is given twice, but takes one value: give it once"):
            parse("--name", "x", *flags.split())
    with pytest.raises(ValueError, match=r"^--config is given twice"):
        parse("--config", file, f"--config={file}")


@dataclass(frozen=True)
class Placed:
    """Do it in a folder."""

    folder: tyro.conf.Positional[str]
    """A folder."""
    seed: int = 0
    """A seed."""


def test_words_before_the_first_flag_are_not_lost(yaml, capsys):
    file = yaml("seed: 3")
    assert parse_settings(Placed, ["--config", file, "here"], prog="x") == Placed("here", 3)
    for words, said in ((["here", "-h"], "A seed."), (["here", "-seed", "3", "--seed", "4"], "-seed")):
        with pytest.raises(SystemExit):
            parse_settings(Placed, words, prog="x")
        out = capsys.readouterr()
        assert said in out.out + out.err


def test_two_names_of_one_flag_are_the_same_flag():
    @dataclass(frozen=True, kw_only=True)
    class Named:
        """Have two names."""

        long_name: Annotated[str, tyro.conf.arg(aliases=("--short",))] = ""
        """A name."""

    for flags in ("--short a --long-name b", "--long_name a --long-name b", "--short a --short b"):
        with pytest.raises(ValueError, match="is given twice"):
            parse_settings(Named, flags.split(), prog="x")
    assert parse_settings(Named, ["--short", "a"], prog="x").long_name == "a"


def test_a_missing_file_and_a_missing_path():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml does not exist"):
        parse("--config", "nowhere.yaml")
    with pytest.raises(ValueError, match="--config needs the path"):
        parse("--name", "x", "--config")


def test_run_command_dispatches_and_turns_bad_input_into_one_line(capsys):
    seen: list[Args] = []

    def refuse(args: Args) -> int:
        raise ValueError("no such thing")

    commands = {
        "go": (Args, lambda args: seen.append(args)),
        "fail": (Args, lambda args: 1 // 0),
        "refuse": (Args, refuse),
    }
    assert run_command("prog", commands, ["go", "--name", "x"]) == 0
    assert seen == [Args(name="x")]
    assert run_command("prog", commands, ["goo"]) == 2
    assert "unknown command 'goo'; did you mean 'go'?" in capsys.readouterr().err
    assert run_command("prog", commands, ["--help"]) == 0
    assert "Do a small thing." in capsys.readouterr().out
    assert run_command("prog", commands, []) == 2
    with pytest.raises(SystemExit) as error:
        run_command("prog", commands, ["go", "--name", "x", "--rate", "-1"])
    assert error.value.code == 2
    assert "rate must be 0 or more, got -1.0" in capsys.readouterr().err
    assert run_command("prog", commands, ["refuse", "--name", "x"]) == 2
    assert capsys.readouterr().err == "error: no such thing\n"
    # A defect of the program is no bad input: its traceback stays.
    with pytest.raises(ZeroDivisionError):
        run_command("prog", commands, ["fail", "--name", "x"])


def test_commands_of_two_words_are_a_group(capsys):
    seen: list[Args] = []
    commands = {"go": (Args, print), "critic fit": (Args, seen.append), "critic report": (Args, print)}
    assert run_command("prog", commands, ["critic", "fit", "--name", "x"]) == 0 and seen == [Args(name="x")]
    assert run_command("prog", commands, ["critic", "rport"]) == 2
    assert "unknown command 'rport'; did you mean 'report'?\nusage: prog critic COMMAND" in capsys.readouterr().err
    assert run_command("prog", commands, ["critic", "--help"]) == 0
    text = capsys.readouterr().out
    assert "  fit     Do a small thing." in text and "go " not in text
    assert run_command("prog", commands, ["critc", "fit"]) == 2
    assert "unknown command 'critc'; did you mean 'critic'?" in capsys.readouterr().err
    assert run_command("prog", commands, ["--help"]) == 0
    assert "  critic report  Do a small thing." in capsys.readouterr().out


def test_a_class_with_a_config_of_its_own_keeps_the_flag():
    @dataclass(frozen=True, kw_only=True)
    class Convert:
        """Convert a file."""

        config: str | None = None
        """A file of another program."""

    assert parse_settings(Convert, ["--config", "theirs.yaml"], prog="test").config == "theirs.yaml"


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Count."""

    total: int = 1
    """A whole number."""
    limit: int | None = None
    """Or none."""
    widths: tuple[int, ...] = (1,)
    """Several."""
    rate: float = 0.5
    """Any number."""
    options: dict[str, bool | int | float | str] | None = None
    """Whatever another program wants."""

    def __post_init__(self) -> None:
        require_types(self)


def test_a_number_without_a_fraction_is_whole_however_it_is_written(yaml):
    """By flag, with and without =, in a file, and in Python, where a type checker would complain and nobody else."""
    flags = ["--total", "1e6", "--limit=2e3", "--widths", "64", "6.4e1", "3.2E1", "--rate", "1e3"]
    file = yaml("total: 1e6\nlimit: 2.0e3\nwidths: [64, 6.4e1, '3.2E1']\nrate: 1e3\n")
    many: Any = {"total": 1e6, "limit": np.float32(2e3), "widths": [64, 64.0, 32.0], "rate": 1000}
    for made in (
        parse_settings(Counts, flags, prog="x"),
        parse_settings(Counts, ["--config", file], prog="x"),
        Counts(**many),
    ):
        assert (made.total, made.limit, tuple(made.widths), made.rate) == (1_000_000, 2000, (64, 64, 32), 1000.0)
        assert {type(x) for x in (made.total, made.limit, *made.widths)} == {int}
    options: Any = {"a": 1.0, "b": "1e6"}
    assert Counts(options=options).options == options and type(Counts(options=options).options["a"]) is float


@pytest.mark.parametrize("value", ["1.5", "1e-3", "inf", "nan", "1e400", "1e6x"])
def test_what_has_a_fraction_or_no_end_is_no_whole_number(yaml, capsys, value):
    with pytest.raises(SystemExit):
        parse_settings(Counts, ["--total", value], prog="x")
    assert "--total" in capsys.readouterr().err
    with pytest.raises(ValueError, match=rf"total: .*got .*{value}"):
        read_yaml(yaml(f"total: '{value}'\n"), Counts)
    if value != "1e6x":
        with pytest.raises(ValueError, match="total must be a whole number"):
            Counts(total=float(value))  # pyright: ignore[reportArgumentType]


def test_settings_of_both_frontends_take_such_numbers():
    many: Any = {"total_timesteps": 1e6, "hidden_sizes": [64.0, 3.2e1], "save_every": 1e1, "output_dir": "x"}
    args = classic.PPOArgs(**many)
    assert (args.total_timesteps, args.hidden_sizes, args.save_every) == (1_000_000, (64, 32), 10)
    with pytest.raises(ValueError, match=r"num_steps must be a whole number or None, got 1\.5"):
        classic.PPOArgs(num_steps=1.5)  # pyright: ignore[reportArgumentType]
    for cls, required, name in (
        (RLHFConfig, {"output_dir": "o"}, "total_episodes"),
        (SFTArgs, {"output_dir": "o", "dataset": ("x",), "model": "m"}, "batch_size"),
        (RewardTrainingArgs, {"output_dir": "o", "dataset": ("x",), "model": "m"}, "batch_size"),
        (GenerateArgs, {"model": "m", "prompt": ("x",)}, "num_samples"),
        (EvaluateArgs, {"model": "m", "dataset": "x", "reward": ("m",)}, "batch_size"),
    ):
        assert getattr(cls(**required, **{name: 1e2}), name) == 100
        with pytest.raises(ValueError, match=f"{name} must be a whole number"):
            cls(**required, **{name: 1.5})
