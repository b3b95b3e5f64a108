"""Recording: a run keeps the rollouts it trains on, through kills and rollbacks; a policy is recorded untrained."""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from rlhf_ppo.runtime.machine.signals import Interrupted
from rlhf_ppo.training.recorded.recorded_rollouts import open_recording
from tests.rlhf_ppo.training.test_checkpoint import kill_after
from tests.rlhf_ppo.training.test_recorded_rollouts import assert_equal
from tests.rlhf_ppo.training.test_stability import poison

RECORDED = {"total_episodes": 32, "save_every": 2, "save_rollouts": True, "samples_per_rollout": 8}


def files(run: Path) -> dict[str, bytes]:
    """The recording's files by name, without the manifest, whose facts name the run's folder."""
    return {file.name: file.read_bytes() for file in (run / "rollouts").glob("rollout-*")}


def test_a_run_records_what_it_trains_on(make_trainer):
    trainer = make_trainer(**RECORDED)
    trainer.train()
    recording = open_recording(trainer.run.path)
    assert recording.numbers == [1, 2, 3, 4] and recording.num_responses == 32
    said = [text for rollout in recording for text in rollout.completions]
    assert said == [row["completion"] for row in trainer.run.read("samples.jsonl")]
    for rollout, line in zip(recording, trainer.run.read(), strict=True):
        assert rollout.scores is not None and float(rollout.scores.mean()) == line["score/mean"]
    facts = recording.facts
    assert facts.model == "object" and facts.rewards == {"early_letters": 1.0}
    assert facts.architecture == "gpt2, 2 layers, 16 wide, 30 tokens" and facts.tokenizer.startswith("30 tokens, ")
    assert facts.settings["gamma"] == 1.0 and facts.settings["stop_token_ids"] == [0, 12, 16, 20, 24, 28]
    assert {"policy", "critic", "reference"} <= facts.fingerprints.keys()


def test_nothing_is_recorded_unless_asked(make_trainer):
    trainer = make_trainer()
    trainer.train()
    assert not (trainer.run.path / "rollouts").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("elsewhere", [False, True], ids=["same-folder", "another-folder"])
def test_a_run_killed_and_resumed_has_the_recording_of_one_never_killed(make_trainer, in_child, elsewhere):
    """Killed after rollout 3 was recorded, resumed from checkpoint-2: neither a duplicate nor a hole."""
    whole = make_trainer(**RECORDED)
    whole.train()
    killed = Path(f"{whole.run.path}-killed")
    run = lambda: make_trainer(**RECORDED, output_dir=str(killed), callbacks=[kill_after(3)]).train()  # noqa: E731
    assert in_child(run) == -signal.SIGKILL
    assert open_recording(killed).numbers == [1, 2, 3]
    more = {} if elsewhere else {"output_dir": str(killed)}
    resumed = make_trainer(**{**RECORDED, **more})
    resumed.train(resume_from_checkpoint=killed)
    assert files(resumed.run.path) == files(whole.run.path)
    facts = open_recording(resumed.run.path).facts
    assert facts.fingerprints == open_recording(whole.run.path).facts.fingerprints  # of the policy before rollout 1


def test_a_run_resumed_with_other_settings_records_what_it_samples_then(make_trainer):
    """Rollouts 3 and 4 of before are gone."""
    first = make_trainer(**RECORDED)
    first.train()
    folder = str(first.run.path)
    resumed = make_trainer(**{**RECORDED, "output_dir": folder, "seed": 1})
    with pytest.warns(UserWarning, match="seed: 0 -> 1"):
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-2", resume_override=True)
    said = [text for rollout in open_recording(folder) for text in rollout.completions]
    assert said == [row["completion"] for row in resumed.run.read("samples.jsonl")] and len(said) == 32


def test_a_recording_begun_by_a_resumed_run_begins_there(make_trainer):
    first = make_trainer(total_episodes=16, save_every=1)
    first.train()
    folder = str(first.run.path)
    resumed = make_trainer(**{**RECORDED, "output_dir": folder})
    resumed.train(resume_from_checkpoint=first.run.path / "checkpoint-2")
    assert open_recording(folder).numbers == [3, 4]
    # Resumed before its first rollout, it begins anew.
    again = make_trainer(**{**RECORDED, "output_dir": folder, "total_episodes": 24})
    again.train(resume_from_checkpoint=first.run.path / "checkpoint-1")
    assert open_recording(folder).numbers == [2, 3]


def test_a_recording_that_stopped_is_not_continued_with_a_hole(make_trainer):
    trainer = make_trainer(**RECORDED)
    trainer.train()
    folder = str(trainer.run.path)
    resumed = make_trainer(**{**RECORDED, "output_dir": folder, "total_episodes": 40, "save_rollouts": False})
    resumed.train(resume_from_checkpoint=folder)
    assert open_recording(folder).numbers == [1, 2, 3, 4]
    resumed = make_trainer(**{**RECORDED, "output_dir": folder, "total_episodes": 48})
    with pytest.warns(UserWarning, match=r"ends with rollout 4, and the run resumes after rollout 5: nothing more is"):
        resumed.train(resume_from_checkpoint=folder)
    assert open_recording(folder).numbers == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:.*Rolling back")
def test_a_rollback_undoes_recorded_rollouts(make_trainer):
    """Rollout 4 is bad as it was drawn: back to checkpoint-2, and 3 and 4 are recorded as drawn then."""
    trainer = make_trainer(**RECORDED, on_nonfinite="rollback", max_skipped_steps=2)
    poison(trainer, lambda trainer, n: trainer.rollouts_made == 4)
    trainer.train()
    recording = open_recording(trainer.run.path)
    assert recording.numbers == [1, 2, 3, 4] and trainer.rollouts_made == 6
    said = [text for rollout in recording for text in rollout.completions]
    assert said == [row["completion"] for row in trainer.run.read("samples.jsonl")]


def test_a_full_recording_keeps_its_beginning_and_the_run_goes_on(make_trainer):
    whole = make_trainer(**RECORDED)
    whole.train()
    size = sum(map(len, files(whole.run.path).values())) / 4
    trainer = make_trainer(**RECORDED, save_rollouts_gb=2.5 * size / 1e9)
    with pytest.warns(UserWarning, match=r"rollout 3 and those after it are not recorded: they would exceed") as seen:
        trainer.train()
    assert len([w for w in seen if "recorded" in str(w.message)]) == 1
    assert trainer.iteration == 4 and open_recording(trainer.run.path).numbers == [1, 2]


def test_a_full_disk_ends_the_recording_and_not_the_run(make_trainer, monkeypatch):
    trainer = make_trainer(**{**RECORDED, "save_every": 0})
    usage = shutil.disk_usage(trainer.run.path)
    full = lambda path: usage._replace(free=0)  # noqa: E731
    fill = lambda trainer, _: trainer.iteration == 1 and monkeypatch.setattr(shutil, "disk_usage", full)  # noqa: E731
    trainer.callbacks += [fill, lambda trainer, _: trainer.iteration == 2 and monkeypatch.undo()]
    with pytest.warns(UserWarning, match=r"rollout 2 and those after it are not recorded: .* MB free") as seen:
        trainer.train()
    assert len([w for w in seen if "those after it are not recorded" in str(w.message)]) == 1
    assert trainer.iteration == 4 and open_recording(trainer.run.path).numbers == [1]


CRITICS = {
    "shared": {},
    "none": {"advantage_estimator": "rloo", "num_generations": 2},
    "adapter": {"peft_config": lambda: LoraConfig(r=2, target_modules=["c_attn"]), "critic": "adapter"},
}


@pytest.mark.parametrize("kind", CRITICS)
def test_an_untrained_policy_is_recorded_as_training_would_sample_it(make_trainer, kind, capsys):
    settings = {name: value() if callable(value) else value for name, value in CRITICS[kind].items()}
    trained = make_trainer(**{**RECORDED, **settings})
    trained.train()
    trainer = make_trainer(**settings, total_episodes=24, quiet=False)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    recording = trainer.record()
    assert recording.numbers == [1, 2, 3]
    said = capsys.readouterr().err
    assert "24 responses to record" in said and "\ntrained" not in said and "learning rate" not in said
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    assert not trainer.optimizer.state and trainer.iteration == 0  # no memory for moments
    assert_equal(recording.read(0), open_recording(trained.run.path).read(0))
    assert recording.read(0).completions != recording.read(1).completions
    # Rollouts are the same whether or not an earlier recording is there, which is moved aside.
    again = make_trainer(**settings, total_episodes=24, output_dir=str(trainer.run.path))
    again.record()
    assert files(trainer.run.path) == files(trainer.run.path / "previous-1")


def test_recording_ends_where_it_is_full_or_asked_to(make_trainer):
    trainer = make_trainer(save_rollouts=True, save_rollouts_gb=5e-6)
    with pytest.warns(UserWarning, match="rollout 2 and those after it are not recorded"):
        assert trainer.record().numbers == [1]
    calls = []

    def signalling(prompts, completions, **columns):
        calls.append(0)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return [float(len(text)) for text in completions]

    trainer = make_trainer(total_episodes=32, reward_funcs=signalling)
    with warnings.catch_warnings(), pytest.raises(Interrupted):
        trainer.record()
    assert open_recording(trainer.run.path).numbers in ([1], [1, 2])
