"""Interruption: a run that a signal or a reward ends goes on bit for bit; a second signal leaves nothing half done."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import pytest
import torch

from rlhf_ppo.cli import main, resume_hint
from rlhf_ppo.rewards.validation import RewardError
from rlhf_ppo.runtime.checkpoints.checkpoint import list_checkpoints
from rlhf_ppo.runtime.machine.signals import Interrupted
from rlhf_ppo.trainer import PPOTrainer
from rlhf_ppo.training.trainer.callbacks import Callback

SETTINGS = {"total_episodes": 32, "normalize_scores": True, "kl_target": 1.0}
EVALUATION = [{"prompt": "to be"}, {"prompt": "or not"}]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def state(trainer: PPOTrainer) -> dict:
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    moments = {f"{i}.{k}": v for i, s in trainer.optimizer.state_dict()["state"].items() for k, v in s.items()}
    return {**weights, **moments}


def assert_same(a: PPOTrainer, b: PPOTrainer) -> None:
    one, two = state(a), state(b)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    for name in ("metrics.jsonl", "samples.jsonl", "eval_samples.jsonl"):
        assert a.run.read(name) == b.run.read(name), name
    assert (a.kl_coef, a.score_statistics, a.rollouts_made) == (b.kl_coef, b.score_statistics, b.rollouts_made)


# Where a signal comes in iteration 3 (after rollout 2 and its evaluation), and the checkpoint that must result.
def while_decoding(trainer: PPOTrainer) -> None:
    calls = iter(range(1000))
    decode = trainer.model.decode

    def decoding(*inputs):
        # Two tokens into the third rollout: evaluations decode, too, but at another iteration or batch size.
        if trainer.iteration == 2 and len(inputs[0]) > 2 and next(calls) == 2:
            send(signal.SIGTERM)
        return decode(*inputs)

    trainer.model.decode = decoding


def while_evaluating(trainer: PPOTrainer) -> None:
    decode = trainer.model.decode

    def decoding(*inputs):
        if trainer.iteration == 2 and len(inputs[0]) <= 2:
            send(signal.SIGTERM)
        return decode(*inputs)

    trainer.model.decode = decoding


def while_updating(trainer: PPOTrainer) -> None:
    gradient, calls = trainer.fixed.gradient, iter(range(1000))

    def interrupted(*inputs, **settings):
        if next(calls) == 9:  # of 4 steps an update: the second step of the third update
            send(signal.SIGTERM)
        return gradient(*inputs, **settings)

    trainer.fixed = dataclasses.replace(trainer.fixed, gradient=interrupted)


@pytest.mark.parametrize(
    ("plant", "iteration"),
    [(while_decoding, 2), (while_evaluating, 2), (while_updating, 3)],
    ids=["decoding", "evaluating", "updating"],
)
def test_fault_22_a_run_stopped_anywhere_goes_on_bit_for_bit(make_trainer, plant, iteration):
    whole = make_trainer(**SETTINGS, eval_every=2, eval_dataset=EVALUATION)
    whole.train()
    cut = make_trainer(**SETTINGS, eval_every=2, eval_dataset=EVALUATION)
    plant(cut)
    with pytest.raises(Interrupted, match=f"stopped by SIGTERM; saved in .*checkpoint-{iteration}$") as stop:
        cut.train()
    assert stop.value.exit_code == 143 and cut.iteration == iteration
    assert (cut.run.path / "model.safetensors").is_file()
    resumed = make_trainer(**SETTINGS, eval_every=2, eval_dataset=EVALUATION, output_dir=str(cut.run.path))
    resumed.train(resume_from_checkpoint=stop.value.saved)
    assert_same(resumed, whole)


def test_fault_22_trackers_are_waited_for_after_the_checkpoint_is_there(make_trainer, monkeypatch):
    """A tracker that is out of reach takes a minute at the end; SIGKILL may follow SIGTERM sooner."""
    trainer, there = make_trainer(**SETTINGS), []

    @contextmanager
    def slow(run, *_, **__):
        try:
            yield
        finally:
            there.extend(path.name for path in list_checkpoints(run.path))

    monkeypatch.setattr("rlhf_ppo.trainer.reporting", slow)
    while_updating(trainer)
    with pytest.raises(Interrupted):
        trainer.train()
    assert there == ["checkpoint-3"]


def test_fault_22_a_signal_lets_the_update_finish(make_trainer):
    trainer = make_trainer(**SETTINGS)
    while_updating(trainer)
    with pytest.raises(Interrupted):
        trainer.train()
    assert trainer.optimizer_steps == 12 and trainer.run.read()[-1]["progress/iteration"] == 3


def test_fault_22_one_state_is_saved_once(make_trainer, monkeypatch):
    """The signal comes while the checkpoint that is due anyway is written."""
    import rlhf_ppo.training.checkpoints.resume

    saves = []
    save = rlhf_ppo.training.checkpoints.resume.save_checkpoint

    def saving(state, *more):
        saves.append(state.iteration)
        if state.iteration == 2:
            send(signal.SIGINT)
        return save(state, *more)

    monkeypatch.setattr(rlhf_ppo.training.checkpoints.resume, "save_checkpoint", saving)
    trainer = make_trainer(**SETTINGS, save_every=1)
    with pytest.raises(Interrupted, match="checkpoint-2"):
        trainer.train()
    assert saves == [1, 2]


def test_fault_22_the_same_trainer_can_resume(make_trainer):
    """In a notebook: train() again, without a checkpoint, after an interrupt."""
    whole, cut = make_trainer(**SETTINGS), make_trainer(**SETTINGS)
    whole.train()
    while_decoding(cut)
    with pytest.raises(Interrupted):
        cut.train()
    cut.train(resume_from_checkpoint=cut.run.path / "checkpoint-2")
    assert_same(cut, whole)


def test_fault_22_a_signal_interrupts_a_slow_reward(make_trainer):
    """A signal while a slow reward runs: the rollout is dropped, and made again by the resumed run."""
    slow = {"asked": 0}

    def reward(prompts, completions, **columns):
        slow["asked"] += 1
        if slow["asked"] == 2:
            send(signal.SIGINT)
            time.sleep(20)
        return [float(len(text)) for text in completions]

    whole = make_trainer(total_episodes=24, reward_funcs=lambda p, c, **_: [float(len(text)) for text in c])
    whole.train()
    cut = make_trainer(total_episodes=24, reward_funcs=reward)
    start = time.monotonic()
    with pytest.raises(Interrupted, match="checkpoint-1"):
        cut.train()
    assert time.monotonic() - start < 15  # the reward alone would take 20
    resumed = make_trainer(total_episodes=24, reward_funcs=reward, output_dir=str(cut.run.path))
    resumed.train(resume_from_checkpoint=cut.run.path / "checkpoint-1")
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name])


def test_fault_22_a_second_ctrl_c_is_immediate_and_saves_nothing_half_done(make_trainer):
    trainer = make_trainer(**SETTINGS)
    gradient, calls = trainer.fixed.gradient, iter(range(1000))

    def twice(*inputs, **settings):
        if next(calls) == 2:
            send(signal.SIGINT)
            send(signal.SIGINT)
        return gradient(*inputs, **settings)

    trainer.fixed = dataclasses.replace(trainer.fixed, gradient=twice)
    with pytest.raises(KeyboardInterrupt) as stop:
        trainer.train()
    assert not isinstance(stop.value, Interrupted)
    assert {file.name for file in trainer.run.path.iterdir()} == {"run.json", "run.lock", "reference"}


@pytest.mark.parametrize("rollout", [1, 3])
def test_faults_14_15_a_run_that_a_reward_ended_goes_on_bit_for_bit(make_trainer, rollout):
    """From the first rollout on: checkpoint-0 is where the run began."""

    def reward(prompts, completions, **columns):
        if state["fails"] and trainer.rollouts_made == rollout - 1:
            raise ConnectionError("the scorer is down")
        return [float(len(text)) for text in completions]

    state = {"fails": False}
    trainer = whole = make_trainer(**SETTINGS, reward_funcs=reward)
    whole.train()
    state["fails"] = True
    trainer = cut = make_trainer(**SETTINGS, reward_funcs=reward)
    with pytest.raises(RewardError, match=rf"Resume with resume_from_checkpoint=.*checkpoint-{rollout - 1}$") as error:
        cut.train()
    assert isinstance(error.value.__cause__, ConnectionError)
    assert len(cut.run.read("failed_rollout.jsonl")) == 8
    state["fails"] = False
    trainer = resumed = make_trainer(**SETTINGS, reward_funcs=reward, output_dir=str(cut.run.path))
    resumed.train(resume_from_checkpoint=cut.run.path / f"checkpoint-{rollout - 1}")
    assert_same(resumed, whole)


def test_any_error_between_two_updates_leaves_a_checkpoint(make_trainer, capsys):
    def fail(trainer, metrics):
        if trainer.iteration == 2:
            raise KeyError("mine")

    whole, cut = make_trainer(**SETTINGS), make_trainer(**SETTINGS, callbacks=[fail])
    whole.train()
    with pytest.raises(KeyError, match="mine"):
        cut.train()
    folder = cut.run.path / "checkpoint-2"
    assert f"saved in {folder}: resume with resume_from_checkpoint={folder}" in capsys.readouterr().err
    resumed = make_trainer(**SETTINGS, output_dir=str(cut.run.path))
    resumed.train(resume_from_checkpoint=folder)
    assert_same(resumed, whole)


REWARD = (
    "import os, pathlib, signal, time\n"
    "def vowels(prompts, completions, **columns):\n"
    "    if pathlib.Path('signal').exists():\n"
    "        os.kill(os.getpid(), int(pathlib.Path('signal').read_text()))\n"
    "        time.sleep(60)\n"
    "    return [sum(c in 'aeiou' for c in t) for t in completions]\n"
)
TRAIN = (
    "train --model model --reward reward.py:vowels --dataset prompts.jsonl --output-dir run --total-episodes 8 "
    "--rollout-batch-size 4 --num-minibatches 2 --max-new-tokens 4 --eval-size 0 --device cpu --quiet True"
)


@pytest.fixture
def folder(tmp_path, make_model, tokenizer, monkeypatch) -> Path:
    """A working folder; what its file ``signal`` holds is sent by the reward."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"the cat {i}"}) + "\n" for i in "abcdefgh"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_fault_22_sigterm_ends_the_command_with_143_and_says_how_to_resume(folder, in_child):
    Path("signal").write_text(str(int(signal.SIGTERM)))

    def command() -> None:
        os.dup2(os.open("said", os.O_WRONLY | os.O_CREAT), 2)  # the handler writes to the descriptor itself
        with open("said", "a") as said, redirect_stderr(said):
            code = main(TRAIN.split())
        os._exit(code)

    assert in_child(command) == 143
    said = Path("said").read_text()
    assert "SIGTERM: the run stops at the next safe point" in said
    on = f"{TRAIN} --resume-from-checkpoint run/checkpoint-0"
    assert f"saved in run/checkpoint-0. Resume with: rlhf-ppo {on}" in said
    Path("signal").unlink()
    assert main(on.split()) == 0
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 2


def test_fault_22_ctrl_c_ends_the_command_with_130(folder, capsys):
    Path("signal").write_text(str(int(signal.SIGINT)))
    assert main(TRAIN.split()) == 130
    assert "stopped by SIGINT; saved in run/checkpoint-0. Resume with: rlhf-ppo train" in capsys.readouterr().err


def test_the_printed_command_resumes_from_one_checkpoint():
    stop = Interrupted(signal.SIGINT, Path("run/checkpoint-4"))
    for earlier in (["--resume-from-checkpoint", "run/checkpoint-2"], ["--resume_from_checkpoint=run/checkpoint-2"]):
        said = resume_hint(["train", *earlier, "--seed", "1"], stop)
        assert said == "Resume with: rlhf-ppo train --seed 1 --resume-from-checkpoint run/checkpoint-4"
    assert "--resume" not in resume_hint(["demo"], stop)


class FailsOnce(Callback):
    def on_rollout_end(self, trainer, rollout):
        if trainer.iteration == 2:
            raise RuntimeError("the hook failed")


def test_a_run_that_a_hook_ended_after_a_rollout_goes_on_exactly(make_trainer):
    whole = make_trainer(**SETTINGS)
    whole.train()
    failed = make_trainer(**SETTINGS, callbacks=[FailsOnce()])
    with pytest.raises(RuntimeError, match="the hook failed"):
        failed.train()
    again = make_trainer(**SETTINGS, output_dir=str(failed.run.path))
    again.train(resume_from_checkpoint=str(failed.run.path / "checkpoint-2"))
    assert_same(again, whole)
