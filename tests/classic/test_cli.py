"""`classic-ppo`: train, evaluate, help, errors in one line; and what importing classic does not load."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from safetensors import SafetensorError

import classic
from classic.cli import (
    CompareCommand,
    EvaluateCommand,
    ExplainCommand,
    ExportCommand,
    PushCommand,
    RecordCommand,
    TrainCommand,
    TuneCommand,
    main,
)
from classic.settings_page import settings_page
from rlhf_ppo.runtime.command_line.settings_help import sentences
from rlhf_ppo.runtime.logs.run_directory import RunDirectory
from rlhf_ppo.runtime.machine.signals import Interrupted

SMALL = [
    "--num-envs",
    "4",
    "--num-steps",
    "16",
    "--num-minibatches",
    "2",
    "--num-epochs",
    "1",
    "--total-timesteps",
    "200",
]


def test_train_saves_evaluates_and_says_where_everything_is(tmp_path, capsys, monkeypatch, pictures):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tests/Match-v0", "--seed", "3", "--eval-episodes", "4", *SMALL]) == 0
    folder = tmp_path / "runs" / "tests-Match-v0-seed3"
    out, err = capsys.readouterr()
    assert "mean return, 4 episodes" in out
    for name in ("model.safetensors", "metrics.jsonl", "curve.png", "report.html"):
        assert f"runs/tests-Match-v0-seed3/{name}" in out
        assert (folder / name).is_file()
    assert "tests/Match-v0" in err and "kl" in err  # live numbers
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"eval/mean_return", "eval/std_return", "eval/mean_length"} <= set(last)

    assert main(["evaluate", str(folder), "--episodes", "4"]) == 0
    out, _ = capsys.readouterr()
    assert f"{last['eval/mean_return']:.1f} +- {last['eval/std_return']:.1f}" in out
    assert main(["evaluate", str(folder), "--episodes", "2", "--env", "tests/Far-v0"]) == 2
    assert "but 'tests/Far-v0' has" in capsys.readouterr().err


def test_settings_from_yaml_and_a_positional_environment(tmp_path):
    config = tmp_path / "small.yaml"
    folder = tmp_path / "run"
    config.write_text("hidden_sizes: [8, 8]\nlearning_rate: 1e-3\nquiet: true\ntarget_kl: null\n")
    assert main(["train", "tests/Match-v0", "--config", str(config), "--output-dir", str(folder), *SMALL]) == 0
    args = json.loads((folder / "run.json").read_text())["args"]
    assert args["hidden_sizes"] == [8, 8] and args["learning_rate"] == 1e-3
    config.write_text(f"env: tests/Match-v0\noutput_dir: {folder}\nhidden_sizes: [8]\n")
    assert main(["train", "--config", str(config), *SMALL]) == 0


def test_arguments_of_the_environment_from_flags_and_yaml(tmp_path):
    config, folder = tmp_path / "short.yaml", tmp_path / "run"
    config.write_text("env_kwargs: {max_episode_steps: 7}\nwrappers: [TimeAwareObservation]\nquiet: true\n")
    for more, steps in ((), 7), (("--env-kwargs", "max_episode_steps", "5"), 5):
        words = ["train", "CartPole-v1", "--config", str(config), "--output-dir", str(folder), *SMALL, *more]
        assert main(words) == 0
        args = json.loads((folder / "run.json").read_text())["args"]
        assert args["env_kwargs"] == {"max_episode_steps": steps} and args["wrappers"] == ["TimeAwareObservation"]


def test_evaluations_on_the_way_resuming_and_videos(tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["train", "tests/Match-v0", "--output-dir", str(folder), "--quiet", *SMALL]
    more = ["--eval-every", "2", "--eval-episodes", "3", "--save-every", "2", "--stop-at-return", "6"]
    assert main([*words, *more]) == 0
    first = (folder / "metrics.jsonl").read_bytes()
    assert (folder / "best" / "agent.json").is_file() and (folder / "checkpoint-2").is_dir()
    assert main([*words, *more, "--resume", "auto"]) == 0
    assert (folder / "metrics.jsonl").read_bytes() == first
    assert main([*words, *more, "--resume", str(folder / "checkpoint-77")]) == 2
    assert re.search(
        r"checkpoint-77: the folder does not exist; .*: checkpoint-2, checkpoint-4", capsys.readouterr().err
    )
    assert main(["evaluate", str(folder), "--episodes", "2", "--video", str(tmp_path / "a.gif")]) == 2
    assert "a video needs an environment made with render_mode='rgb_array'" in capsys.readouterr().err


def test_a_folders_name_is_shown_as_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tests/Match-v0", "--output-dir", "x[/y]/[bold]:dog:", "--quiet", *SMALL]) == 0
    assert "x[/y]/[bold]:dog:/metrics.jsonl" in capsys.readouterr().out
    assert main(["evaluate", "x[/y]/[bold]:dog:", "--episodes", "1"]) == 0
    assert "tests/Match-v0 from x[/y]/[bold]:dog:" in capsys.readouterr().out


def _iteration(folder):
    return classic.PPO.load(folder).counters["iteration"]


@pytest.mark.parametrize("fault", ["crash", "nan_reward"])
def test_an_environment_that_breaks_late_loses_nothing_learned(fault, tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["train", f"tests/Faulty_{fault}-v0", "--quiet", *SMALL]
    # 16 steps a rollout: the third one breaks.
    assert main([*words, "--output-dir", str(folder), "--env-kwargs", "at", "40", "--save-every", "1"]) == 1
    err = capsys.readouterr().err
    where = rf"error: environment 'tests/Faulty_{fault}-v0'.* step 40: .*\n"
    assert re.search(where + rf"the agent was saved in {re.escape(str(folder))}; --resume auto continues\n$", err)
    assert _iteration(folder) == 2
    # The user's own traceback, and not ours around it.
    assert ("ZeroDivisionError: the simulator exploded" in err) == ("Traceback" in err) == (fault == "crash")
    assert "direct cause" not in err

    assert main([*words, "--env-kwargs", "at", "3", "--output-dir", str(tmp_path / "early")]) == 1
    assert not (tmp_path / "early" / "agent.json").exists() and "saved in" not in capsys.readouterr().err


def test_an_agent_that_diverged_is_saved_while_its_weights_are_finite(tmp_path, capsys, monkeypatch):
    words = ["train", "tests/Match-v0", "--quiet", *SMALL]

    def diverge(weight):
        def learn(self, **options):
            self.counters["iteration"] = 5
            self.optimizer.weights.vector.data[0] = weight
            raise classic.NonFiniteGradientError("10 consecutive gradients")

        monkeypatch.setattr(classic.PPO, "learn", learn)

    diverge(0.5)
    assert main([*words, "--output-dir", str(tmp_path / "finite")]) == 1
    assert capsys.readouterr().err == (
        f"error: 10 consecutive gradients\nthe agent was saved in {tmp_path / 'finite'}\n"
    )
    assert _iteration(tmp_path / "finite") == 5
    diverge(float("nan"))
    assert main([*words, "--output-dir", str(tmp_path / "nan")]) == 1
    assert capsys.readouterr().err.endswith("the agent was not saved: its weights are non-finite\n")
    assert not (tmp_path / "nan" / "agent.json").exists()


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("what", ["checkpoint", "metrics", "agent"])
def test_a_full_disk_is_one_line_and_the_agent_is_saved_where_it_can_be(what, tmp_path, capsys, monkeypatch):
    def full(*args, **options):
        raise SafetensorError(str(FULL)) if what == "agent" else FULL

    place = {
        "checkpoint": ("classic.session.save_checkpoint", full),
        "metrics": (f"{RunDirectory.__module__}.RunDirectory.append", full),
        "agent": ("classic.save.save_file", full),
    }[what]
    monkeypatch.setattr(*place)
    words = ["train", "tests/Match-v0", "--output-dir", str(tmp_path), "--quiet", "--save-every", "1", *SMALL]
    assert main(words) == 1
    error, rescued = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and "No space left on device" in error
    if what == "agent":
        assert rescued.startswith("the agent could not be saved: ") and rescued.endswith("; --resume auto continues")
        assert not (tmp_path / "agent.json").exists()
    else:
        assert rescued == f"the agent was saved in {tmp_path}" and _iteration(tmp_path) == 1


@pytest.mark.parametrize(
    ("stop", "words", "code"),
    [(KeyboardInterrupt(), "interrupted\n", 130), (Interrupted(15), "stopped by SIGTERM\n", 143)],
)
def test_a_signal_outside_training_leaves_no_traceback(stop, words, code, capsys, monkeypatch):
    def load(folder, **given):
        raise stop

    monkeypatch.setattr(classic.PPO, "load", load)
    assert main(["evaluate", "anywhere"]) == code
    assert capsys.readouterr().err == words


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "CartPol-v1"], "Did you mean: `CartPole`"),
        (["train", "CartPole-v1", "--dual-clip", "2"], "dual_clip=2.0"),
        (["train", "CartPole-v1", "--resume-override"], "resume_override=True is about a checkpoint to resume from"),
        (["evaluate", "no-such-folder"], "no saved agent in no-such-folder"),
        (["trian"], "did you mean 'train'"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(argv, words, capsys):
    try:
        code = main(argv)
    except SystemExit as ended:  # found while the flags were read
        code = ended.code
    assert code == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_every_flag_has_a_sentence(capsys):
    for command, cls in (
        ("train", TrainCommand),
        ("evaluate", EvaluateCommand),
        ("compare", CompareCommand),
        ("tune", TuneCommand),
        ("record", RecordCommand),
        ("export", ExportCommand),
        ("push", PushCommand),
        ("explain", ExplainCommand),
    ):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        shown = " ".join(text.split())
        said = sentences(cls)
        for field in dataclasses.fields(cls):
            assert f"--{field.name.replace('_', '-')} " in shown or field.name in ("env", "folder", "file", "repo_id")
            assert said[field.name] in shown and said[field.name].endswith(".")


def test_the_page_of_settings_is_made_from_the_commands_and_presets():
    page = (Path(__file__).parents[2] / "docs" / "classic-settings.md").read_text(encoding="utf-8")
    assert page == settings_page(), "run `make docs`"
    assert "| `num_epochs` | `10` | " in page and "| CartPole-v1 | `total_timesteps=" in page


def test_explain_runs_no_code_that_a_folder_names(tmp_path, capsys):
    (tmp_path / "evil.py").write_text(f"def f(done):\n    open({str(tmp_path / 'ran')!r}, 'w').close()\n    return 1\n")
    args = classic.PPOArgs(num_envs=2, num_steps=4, num_minibatches=1, lr_schedule=f"{tmp_path}/evil.py:f", quiet=True)
    classic.PPO("tests/Match-v0", args).save(tmp_path / "agent")
    assert main(["explain", str(tmp_path / "agent")]) == 0
    assert "constant instead of lr_schedule='" in capsys.readouterr().err and not (tmp_path / "ran").exists()
