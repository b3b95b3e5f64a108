"""Trackers: they get what metrics.jsonl gets, and whatever happens to them, the run and its file go on."""

from __future__ import annotations

import json
import sqlite3
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking

import classic
from rlhf_ppo.runtime.logs import trackers
from rlhf_ppo.runtime.logs.run_directory import RunDirectory
from rlhf_ppo.runtime.logs.trackers import TRACKERS, check_trackers, reporting, require_installed

LINES = [{"progress/episodes": 8.0 * i, "score/mean": i / 4} for i in (1, 2, 3)]
SAMPLES = [
    {"prompt": "a|b", "completion": "c\n<d>", "score": 0.5, "finished": True, "parsed": {"deep": 1}},
    {"prompt": "a", "completion": "", "score": None, "finished": False, "turns": 2},
]
SHOWN = trackers.Samples(
    "samples",
    ["prompt", "completion", "score", "finished", "parsed", "turns"],
    [["a|b", "c\n<d>", 0.5, 1.0, '{"deep": 1}', None], ["a", "", None, 0.0, None, 2.0]],
    8,
)


class Fake:
    """A tracker in accelerate's form, in memory; ``broken`` names the call that raises."""

    made: list[Fake]
    broken: str | None = None

    def __init__(self, project: str, **options: Any) -> None:
        self.project, self.options, self.lines, self.ended = project, options, [], False
        self.samples: list[trackers.Samples] = []
        Fake.made.append(self)

    def _maybe_raise(self, what: str) -> None:
        if Fake.broken == what:
            raise ConnectionError("nobody answers")

    def start(self) -> None:
        self._maybe_raise("start")

    def log(self, values: dict[str, float], step: int | None) -> None:
        if len(self.lines) == 1:
            self._maybe_raise("log")
        self.lines.append((step, values))

    def finish(self) -> None:
        self.ended = True
        self._maybe_raise("finish")


@pytest.fixture
def fakes(monkeypatch):
    """All trackers are fakes and their packages installed; returns those that were made."""
    for name in ("TensorBoardTracker", "WandBTracker", "TrackioTracker"):
        monkeypatch.setattr(tracking, name, Fake)
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    monkeypatch.setattr(trackers, "log_samples", lambda name, tracker, samples: tracker.samples.append(samples))
    Fake.made, Fake.broken = [], None
    return Fake.made


def report(folder: Path, names: tuple[str, ...]) -> None:
    run = RunDirectory(folder)
    with reporting(run, names, project="p", settings={"seed": 1, "stop_strings": ("a",), "device": None}):
        for line in LINES:
            run.log(line)
            run.log_samples("samples.jsonl", SAMPLES, iteration=1, step=int(line["progress/episodes"]))
    run.log(LINES[0])  # after the block nobody is told
    run.log_samples("samples.jsonl", SAMPLES, iteration=1, step=8)
    assert run.read() == [*LINES, LINES[0]]
    assert run.read("samples.jsonl") == [{"iteration": 1, **row} for row in SAMPLES] * 4


def test_each_tracker_gets_every_line_with_its_step(tmp_path, fakes):
    report(tmp_path / "run", TRACKERS)
    assert len(fakes) == 3
    for fake in fakes:
        assert fake.lines == [(8 * i, line) for i, line in zip((1, 2, 3), LINES, strict=True)] and fake.ended
        assert fake.samples == [SHOWN._replace(step=8 * i) for i in (1, 2, 3)]
    # Each was made in a thread of its own, in any order.
    board, trackio, wandb = sorted(fakes, key=lambda fake: len(fake.options))
    assert board.options == {"logging_dir": str(tmp_path / "run")}
    assert wandb.options == {"dir": str(tmp_path / "run"), **trackio.options} and wandb.project == "p"
    assert trackio.options == {"name": "run", "config": {"seed": 1, "stop_strings": "('a',)", "device": "None"}}


def test_none_is_the_default_and_starts_nothing(tmp_path, fakes):
    report(tmp_path, ())
    assert not fakes


@pytest.mark.parametrize("what", ["start", "log", "finish"])
def test_fault_34_a_tracker_that_fails_is_one_warning_and_the_file_has_every_line(tmp_path, fakes, what):
    Fake.broken = what
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report(tmp_path, ("wandb",))
    (warning,) = caught
    words = str(warning.message)
    assert f"tracker 'wandb' failed to {what} (ConnectionError: nobody answers)" in words
    assert "metrics.jsonl is complete" in words
    assert len(fakes[0].lines) == {"start": 0, "log": 1, "finish": 3}[what]


def test_fault_34_one_that_fails_leaves_the_other_alone(tmp_path, fakes, monkeypatch):
    class Broken(Fake):
        def start(self) -> None:
            raise OSError("no disk")

    monkeypatch.setattr(tracking, "WandBTracker", Broken)
    with pytest.warns(UserWarning, match=r"'wandb' failed to start \(OSError: no disk\)"):
        report(tmp_path, ("wandb", "trackio"))
    (other,) = (fake for fake in fakes if type(fake) is Fake)
    assert len(other.lines) == 3


@pytest.mark.parametrize("what", ["start", "log", "finish"])
def test_fault_34_a_tracker_that_hangs_is_left_behind(tmp_path, fakes, monkeypatch, what):
    """Wherever it hangs: the run is not held up, the other tracker gets every line, and one warning says so."""
    release = threading.Event()

    class Hanging(Fake):
        pass

    setattr(Hanging, what, lambda self, *_, **__: release.wait(60))
    monkeypatch.setattr(tracking, "TrackioTracker", Hanging)
    monkeypatch.setattr(trackers, "FINISH_S", 0.2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report(tmp_path, ("trackio", "wandb"))
    release.set()
    (warning,) = caught
    assert "tracker 'trackio' did not finish within 0.2 seconds" in str(warning.message)
    (other,) = (fake for fake in fakes if type(fake) is Fake)
    assert len(other.lines) == 3 and other.ended


def test_fault_34_a_run_ends_as_it_would_have_without_its_tracker(tmp_path, fakes):
    Fake.broken = "log"
    small = {"seed": 1, "total_timesteps": 64, "num_envs": 2, "num_steps": 16, "num_minibatches": 2, "quiet": True}
    classic.PPO("CartPole-v1", classic.PPOArgs(**small, output_dir=str(tmp_path / "plain"))).learn()
    reported = classic.PPOArgs(**small, output_dir=str(tmp_path / "reported"), report_to=("wandb",))
    with pytest.warns(UserWarning, match="failed to log"):
        classic.PPO("CartPole-v1", reported).learn()
    plain, reported = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("plain", "reported"))
    assert plain == reported and plain.count("\n") == 3


def test_the_evaluation_after_a_control_run_is_reported_too(tmp_path, fakes):
    from classic.cli import main

    flags = "--num-envs 2 --num-steps 16 --num-minibatches 2 --total-timesteps 64 --eval-episodes 2 --quiet"
    assert main(["train", "CartPole-v1", *flags.split(), "--output-dir", str(tmp_path), "--report-to", "wandb"]) == 0
    (tracker,) = fakes
    assert "eval/mean_return" in tracker.lines[-1][1] and tracker.ended


def test_a_tracker_ends_with_a_run_that_raises(tmp_path, fakes):
    run = RunDirectory(tmp_path)
    with pytest.raises(ZeroDivisionError), reporting(run, ("wandb",), project="p", settings={}):
        raise ZeroDivisionError
    assert fakes[0].ended and run.listener is None


@pytest.mark.parametrize("names", [("tensorbord",), ("wandb", "wandb"), "wandb"])
def test_names_that_are_none_are_refused(names):
    with pytest.raises(ValueError, match="report_to must be a tuple of different names of tensorboard, wandb, trackio"):
        check_trackers(names)


def test_a_package_that_is_not_there_is_said_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"report_to='trackio' needs a missing package: pip install 'rlhf-ppo\[trackio"
    ):
        require_installed(("trackio",))
    with pytest.raises(ModuleNotFoundError, match="report_to='wandb'"):
        classic.PPO("CartPole-v1", classic.PPOArgs(report_to=("wandb",), output_dir=str(tmp_path)))


def test_classic_has_nothing_to_report_without_a_folder():
    with pytest.raises(ValueError, match=r"report_to=\('wandb',\).*output_dir is None"):
        classic.PPO("CartPole-v1", classic.PPOArgs(report_to=("wandb",)))


def test_tensorboard_itself(tmp_path):
    """The real one: what its own reader finds is what metrics.jsonl has."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report(tmp_path, ("tensorboard",))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("score/mean")] == [(8, 0.25), (16, 0.5), (24, 0.75)]
    shown = events.Tensors("samples/text_summary")
    assert [event.step for event in shown] == [8, 16, 24]
    (markdown,) = shown[0].tensor_proto.string_val
    assert markdown.decode() == SHOWN.markdown() and len(markdown.splitlines()) == 4
    assert markdown.decode().splitlines()[2] == r'| a\|b | c<br>&lt;d&gt; | 0.5 | 1 | {"deep": 1} |  |'


def test_wandb_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report(tmp_path, ("wandb",))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    tables = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/samples_*.table.json"))
    assert len(tables) == 3 and json.loads(tables[0].read_text()) == {"columns": SHOWN.columns, "data": SHOWN.cells}


def test_trackio_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    pytest.importorskip("trackio")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report(tmp_path / "run", ("trackio",))
    (file,) = (tmp_path / "kept").rglob("*.db")
    with sqlite3.connect(file) as kept:
        rows = [json.loads(row) for (row,) in kept.execute("select metrics from metrics")]
    (first, *_) = (row["samples"]["_value"] for row in rows if "samples" in row)
    assert [[row[column] for column in SHOWN.columns] for row in first] == SHOWN.cells


def test_a_language_models_run_reports_too(tmp_path, fakes):
    """With an evaluation before and after, from the command line."""
    from rlhf_ppo.cli import main

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"One {w}"}) + "\n" for w in "abcdef"))
    flags = (
        f"train --model embedded --reward rlhf_ppo.rewards.toy:no_letter_e --dataset {tmp_path}/rows.jsonl "
        f"--output-dir {tmp_path}/run --total-episodes 2 --rollout-batch-size 2 --num-minibatches 1 --num-epochs 1 "
        "--max-new-tokens 2 --eval-size 2 --device cpu --quiet --report-to wandb trackio"
    )
    assert main(flags.split()) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for fake in fakes:
        assert fake.lines == [(int(line["progress/episodes"]), line) for line in lines]
        assert fake.project == "rlhf-ppo" and fake.options["config"]["model"] == "embedded"
        samples, evaluations = ([x for x in fake.samples if x.name == name] for name in ("samples", "eval_samples"))
        assert [x.step for x in samples] == [2] and [x.step for x in evaluations] == [0, 2]
        assert len(samples[0].cells) == 2 and samples[0].cells[0][0].startswith("One ")


@pytest.mark.parametrize("command", ["sft", "reward"])
def test_training_on_labelled_data_reports_too(tmp_path, fakes, command):
    from rlhf_ppo.cli import main

    rows = [
        {"text": f"One {w}", "prompt": f"One {w}", "chosen": " a", "rejected": " b"} for w in "abcdefghijklmnopqrst"
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"{command} --model embedded --dataset {tmp_path}/rows.jsonl --output-dir {tmp_path}/run --batch-size 9"
    assert main([*flags.split(), "--quiet", "--report-to", "wandb", "--eval-fraction", "0.1"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (fake,) = fakes
    assert fake.lines == [(line["progress/optimizer_steps"], line) for line in lines] and fake.ended
    assert [line["progress/optimizer_steps"] for line in lines] == [1, 2, 2]
    trained, measured = ("sft/loss", "eval/perplexity") if command == "sft" else ("preference/loss", "eval/accuracy")
    assert trained in lines[0] and "optim/learning_rate" in lines[0] and measured in lines[2]
    assert json.loads((tmp_path / "run/run.json").read_text())["report_to"] == ["wandb"]
