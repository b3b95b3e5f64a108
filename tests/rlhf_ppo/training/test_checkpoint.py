"""Checkpoints of a trainer: a run killed and resumed ends exactly where the other does; nothing starts silently."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig

from rlhf_ppo.runtime.checkpoints.checkpoint import list_checkpoints, verify_checkpoint
from rlhf_ppo.runtime.logs.run_directory import run_lock
from rlhf_ppo.training.checkpoints.checkpoint import MAY_CHANGE, save_checkpoint

SETTINGS = {"total_episodes": 32, "save_every": 2}
LINES = ("metrics.jsonl", "samples.jsonl", "eval_samples.jsonl")


def drawing(prompts, completions, **columns):
    """A reward with noise from every global generator."""
    noise = [random.gauss(0, 1) + np.random.randn() + float(torch.randn(())) for _ in completions]
    return [sum("a" <= x < "n" for x in text) + 0.1 * n for text, n in zip(completions, noise, strict=True)]


def state(trainer) -> dict[str, torch.Tensor]:
    moments = trainer.optimizer.state_dict()["state"].items()
    weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
    return {**weights, **{f"{i}.{key}": value for i, entry in moments for key, value in entry.items()}}


def assert_same_end(a, b) -> None:
    one, two = state(a), state(b)
    assert one.keys() == two.keys() and len(one) > len(list(a.model.parameters()))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for name in LINES:
        assert a.run.read(name) == b.run.read(name), name
    for name in ("kl_coef", "score_statistics", "episodes", "rollouts_made", "best"):
        assert getattr(a, name) == getattr(b, name), name
    assert (a.objective.clip_range, a.objective.penalty_beta) == (b.objective.clip_range, b.objective.penalty_beta)
    assert a.scheduler.get_last_lr() == b.scheduler.get_last_lr()


def kill_after(iteration: int):
    """A callback that ends the process as ``kill -9`` does."""
    return lambda trainer, metrics: trainer.iteration == iteration and os.kill(os.getpid(), signal.SIGKILL)


def lora(**more) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", lora_dropout=0.0, **more)


VARIANTS = {
    "plain": {},
    "adaptive-clip": {"objective": "adaptive_clip", "target_kl": 0.01, "kl_target": 1.0},
    "penalty": {"objective": "penalty", "target_kl": 0.01},
    "dual-clip": {"objective": "dual_clip", "lr_scheduler_type": "cosine", "warmup_steps": 3},
    "a2c": {"objective": "a2c", "num_epochs": 1, "num_minibatches": 1},
    "reinforce": {"objective": "reinforce", "num_epochs": 1, "num_minibatches": 1, "advantage_estimator": "reinforce"},
    "dis": {"objective": "dis", "recompute_logprobs": True, "critic_epochs": 3, "positive_loss_coef": 0.1},
    "cispo-grpo": {"objective": "cispo", "advantage_estimator": "grpo", "num_generations": 4},
    "rloo-sequence": {"advantage_estimator": "rloo", "num_generations": 2, "ratio_level": "sequence"},
    "kl-loss": {"kl_loss_coef": 0.1, "kl_loss": "exact", "kl_coef": 0.0},
    "two-adapters": {"peft_config": lora, "critic": "adapter", "value_learning_rate": 1e-2},
    "separate-critic": {"value_model": 1, "critic_warmup_rollouts": 3},
    "noise-cache-evaluation": {
        "reward_funcs": drawing,
        "cache_rewards": True,
        "normalize_scores": True,
        "eval_every": 1,
        "eval_dataset": [{"prompt": "to be"}, {"prompt": "a"}],
    },
}
OBJECTIVES = ("plain", "adaptive-clip", "penalty", "dual-clip", "a2c", "reinforce", "cispo-grpo", "kl-loss")
QUICK = ("plain", "adaptive-clip", "rloo-sequence", "two-adapters", "separate-critic", "noise-cache-evaluation")
"""One of each kind of state; the others only with the slow tests."""
VARIANTS |= {f"{name}, lora": {**VARIANTS[name], "peft_config": lora} for name in OBJECTIVES}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "variant",
    [pytest.param(VARIANTS[name], id=name, marks=() if name in QUICK else pytest.mark.slow) for name in VARIANTS],
)
def test_fault_21_a_run_killed_and_resumed_equals_the_one_never_killed(make_trainer, make_model, in_child, variant):
    """Killed in iteration 3 of 4, after checkpoint-2: weights, moments, controllers and every line are the same."""

    def make(**more):
        settings = {**SETTINGS, **variant, **more}
        if "peft_config" in settings:
            settings["peft_config"] = settings["peft_config"]()
        if "value_model" in settings:
            settings["value_model"] = make_model(seed=settings["value_model"])
        return make_trainer(**settings)

    whole = make()
    whole.train()
    folder = str(whole.run.path) + "-killed"
    assert in_child(lambda: make(output_dir=folder, callbacks=[kill_after(3)]).train()) == -signal.SIGKILL
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2"]
    resumed = make(output_dir=folder)
    resumed.train(resume_from_checkpoint="auto")
    assert_same_end(resumed, whole)


def test_a_checkpoint_holds_the_adapter_alone_and_no_pickle(make_trainer):
    trainer = make_trainer(**SETTINGS, peft_config=lora())
    trainer.train()
    folder = trainer.run.path / "checkpoint-4"
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}
    weights = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert (folder / "trainable.safetensors").stat().st_size < 4 * weights + 10_000


@pytest.fixture
def finished(make_trainer):
    """A run with checkpoints 2 and 4, which is its end."""
    trainer = make_trainer(**SETTINGS)
    trainer.train()
    return trainer


def again(make_trainer, trainer, **more):
    return make_trainer(**{**SETTINGS, "output_dir": str(trainer.run.path), **more})


def test_fault_24_a_damaged_checkpoint_is_left_aside_loudly_and_the_end_is_the_same(finished, make_trainer):
    before = state(finished)
    file = finished.run.path / "checkpoint-4" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    resumed = again(make_trainer, finished)
    with pytest.warns(UserWarning, match=r"checkpoint-4 cannot be used: optimizer\.safetensors: .*from checkpoint-2"):
        resumed.train(resume_from_checkpoint="auto")
    assert all(torch.equal(before[name], x) for name, x in state(resumed).items())
    assert verify_checkpoint(finished.run.path / "checkpoint-4") == []
    assert (finished.run.path / "previous-1" / "checkpoint-4" / "optimizer.safetensors").is_file()


def test_fault_24_a_named_checkpoint_that_is_damaged_is_an_error_and_changes_nothing(finished, make_trainer):
    (finished.run.path / "checkpoint-4" / "state.json").write_text("{}")
    resumed = again(make_trainer, finished)
    before, lines = {k: x.clone() for k, x in state(resumed).items()}, finished.run.read()
    with pytest.raises(ValueError, match=r"checkpoint-4 cannot be used: state\.json"):
        resumed.train(resume_from_checkpoint=finished.run.path / "checkpoint-4")
    assert all(torch.equal(before[name], x) for name, x in state(resumed).items())
    assert resumed.iteration == 0 and finished.run.read() == lines


def test_fault_25_what_is_asked_for_and_not_there_is_an_error_never_a_fresh_start(finished, make_trainer, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "checkpoint-7", "does not exist"),
        (tmp_path / "empty", "nor a run that has one"),
    ):
        trainer = make_trainer()
        with pytest.raises(FileNotFoundError, match=message):
            trainer.train(resume_from_checkpoint=path)
        assert trainer.iteration == 0 and not (trainer.run.path / "metrics.jsonl").exists()
    for folder in list_checkpoints(finished.run.path):
        (folder / "rng.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is good.*rng\.safetensors: is missing"):
        again(make_trainer, finished).train(resume_from_checkpoint="auto")


def test_auto_starts_afresh_where_there_is_no_checkpoint_at_all(make_trainer, finished):
    fresh = make_trainer(**SETTINGS)
    fresh.train(resume_from_checkpoint="auto")
    assert_same_end(fresh, finished)


def test_auto_after_the_end_writes_the_end_again(finished, make_trainer):
    (finished.run.path / "model.safetensors").unlink()
    resumed = again(make_trainer, finished)
    assert resumed.train(resume_from_checkpoint="auto") == finished.run.read()[-1]
    assert (finished.run.path / "model.safetensors").is_file()


def test_fault_26_a_run_made_longer_goes_on_through_the_data_sets_next_epoch(finished, make_trainer):
    """The eight prompts are one rollout: every checkpoint lies at an epoch boundary."""
    longer = again(make_trainer, finished, total_episodes=48, quiet=False)
    longer.train(resume_from_checkpoint=finished.run.path)
    assert [row["progress/iteration"] for row in longer.run.read()] == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in list_checkpoints(longer.run.path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"learning_rate": 0.5, "value_learning_rate": 1e-3}, "learning_rate: 0.001 -> 0.5"),
        ({"train_dataset": [{"prompt": "other"}] * 8}, 'train_dataset: "8 rows, .*" -> "8 rows, .*"'),
        ({"eval_dataset": [{"prompt": "x"}]}, 'eval_dataset: null -> "1 rows'),
        ({"reward_funcs": drawing}, r'reward_funcs: \["early_letters"\] -> \["drawing"\]'),
        ({"ref_model": 3}, 'reference: "[0-9a-f]*" -> "[0-9a-f]*"'),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_fault_26_another_run_is_refused_with_a_diff(finished, make_trainer, make_model, change, line):
    if "ref_model" in change:
        change = {"ref_model": make_model(seed=change["ref_model"])}
    with pytest.raises(ValueError, match=rf"old -> new\):\n  {line}.*\n.*--resume-override") as error:
        again(make_trainer, finished, **change).train(resume_from_checkpoint="auto")
    assert str(error.value).count(" -> ") == 2  # the heading's and one line


def test_the_page_names_every_setting_that_may_change():
    page = (Path(__file__).parents[3] / "docs/checkpoints.md").read_text(encoding="utf-8")
    listed = page.partition("You may change:")[2].partition("\n## ")[0]
    # The device in use is compared, whatever the setting said.
    for name in set(MAY_CHANGE) - {"device"}:
        assert f"`{name}`" in listed or (name.startswith("save_") and "`save_*`" in listed), name


def test_fault_26_an_override_goes_on_with_the_new_settings(finished, make_trainer):
    other = again(make_trainer, finished, learning_rate=0.5, lr_scheduler_type="constant", kl_coef=0.3)
    with pytest.warns(UserWarning, match=r"kl_coef: 0\.05 -> 0\.3"):
        other.train(resume_from_checkpoint=finished.run.path / "checkpoint-2", resume_override=True)
    assert other.run.read()[-1]["optim/learning_rate"] == 0.5 and other.kl_coef == 0.3


def test_fault_26_another_number_of_processes_resumes(finished, make_trainer):
    resumed = again(make_trainer, finished, total_episodes=40)
    resumed.fingerprints["processes"] = 2  # as if two had written it
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.iteration == 5


def test_a_checkpoint_of_another_model_is_refused_under_an_override_too(finished, make_trainer, make_model):
    other = again(make_trainer, finished, model=make_model("llama"))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="another model"):
        other.train(resume_from_checkpoint="auto", resume_override=True)


def test_going_back_to_an_older_checkpoint_sets_the_later_ones_aside(finished, make_trainer):
    back = again(make_trainer, finished, callbacks=[lambda trainer, metrics: trainer.iteration == 3])
    back.train(resume_from_checkpoint=finished.run.path / "checkpoint-2")
    assert [p.name for p in list_checkpoints(back.run.path)] == ["checkpoint-2", "checkpoint-3"]
    assert (back.run.path / "previous-1" / "checkpoint-4" / "manifest.json").is_file()


def test_a_run_can_go_on_in_another_folder_with_its_history(finished, make_trainer):
    other = make_trainer(**SETTINGS)
    other.train(resume_from_checkpoint=finished.run.path / "checkpoint-2")
    assert_same_end(other, finished)


def test_fault_27_rotation_keeps_the_newest_and_the_best(make_trainer):
    scores = iter([0.0, 1.0, 5.0, 2.0, 3.0, 4.0, 4.5])  # before training, then after each rollout; the third is best
    evaluated = {}

    def reward(prompts, completions, **columns):
        if len(completions) > 2:
            return [float(len(text)) for text in completions]
        evaluated["last"] = next(scores)
        return [evaluated["last"]] * len(completions)

    trainer = make_trainer(
        total_episodes=48,
        save_every=1,
        save_total_limit=1,
        save_best=True,
        eval_every=1,
        eval_dataset=[{"prompt": "a"}, {"prompt": "no"}],
        reward_funcs=reward,
    )
    trainer.train()
    assert [p.name for p in list_checkpoints(trainer.run.path)] == ["checkpoint-2", "checkpoint-6"]
    assert trainer.best == {"iteration": 2, "eval/score_mean": 5.0}


def test_the_best_is_saved_between_the_usual_saves(make_trainer):
    settings = {"save_best": True, "save_every": 0, "eval_every": 1, "eval_dataset": [{"prompt": "a"}]}
    trainer = make_trainer(**settings, reward_funcs=lambda p, c, **_: [float(trainer.iteration == 1)] * len(c))
    trainer.train()
    assert [p.name for p in list_checkpoints(trainer.run.path)] == ["checkpoint-1"]
    with pytest.raises(ValueError, match=r"save_best=True .* eval_every=0"):
        make_trainer(save_best=True)


def test_fault_28_a_pickle_in_a_checkpoint_is_never_opened(finished, make_trainer):
    """A folder of pickles that would leave a mark, beside and in place of what is read."""
    folder, mark = finished.run.path / "checkpoint-4", finished.run.path / "mark"
    pickle = f"cposix\nsystem\n(S'touch {mark}'\ntR.".encode()
    for name in ("optimizer.pt", "pytorch_model.bin", "rng_state.pth", "training_args.bin", "state.pkl"):
        (folder / name).write_bytes(pickle)
    again(make_trainer, finished).train(resume_from_checkpoint=folder)
    (folder / "rng.safetensors").write_bytes(pickle)
    with pytest.raises(ValueError, match=r"rng\.safetensors"):
        again(make_trainer, finished).train(resume_from_checkpoint=folder)
    assert not mark.exists()


def test_fault_29_a_second_run_in_the_folder_is_refused_and_touches_nothing(finished, make_trainer):
    before = sorted(finished.run.path.rglob("*"))
    with (
        run_lock(finished.run.path),
        pytest.raises(ValueError, match=rf"in use by another run \(process {os.getpid()}\)"),
    ):
        again(make_trainer, finished).train()
    assert sorted(finished.run.path.rglob("*")) == before


def test_fault_23_a_full_disk_ends_the_run_with_the_old_checkpoint_whole(make_trainer, monkeypatch):
    trainer = make_trainer(**SETTINGS, save_total_limit=1)
    usage = shutil.disk_usage(trainer.run.path)
    full = (trainer.run.path / "checkpoint-2").is_dir  # so much is left that this one fits
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000) if full() else usage)
    with (
        pytest.raises(OSError, match=r"step 4 could not be written.*free some space"),
        pytest.warns(UserWarning, match=r"checkpoint-2 holds it as it was after iteration 2: free some space"),
    ):
        trainer.train()
    assert [p.name for p in list_checkpoints(trainer.run.path)] == ["checkpoint-2"]
    assert verify_checkpoint(trainer.run.path / "checkpoint-2") == []


def test_a_checkpoint_without_a_manifest_says_what_it_is(finished, make_trainer):
    (finished.run.path / "checkpoint-4" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest\.json: is missing.*version that wrote no manifest"):
        again(make_trainer, finished).train(resume_from_checkpoint=finished.run.path / "checkpoint-4")


def test_saving_and_loading_leave_a_trainer_as_it_was(finished, make_trainer):
    before = {name: x.clone() for name, x in state(finished).items()}
    shutil.rmtree(finished.run.path / "checkpoint-4")
    folder = save_checkpoint(finished.state, finished.fixed)
    finished.load_checkpoint(folder)
    assert all(torch.equal(before[name], x) for name, x in state(finished).items())


def test_a_fresh_start_sets_an_earlier_runs_checkpoints_aside(finished, make_trainer):
    again(make_trainer, finished, save_every=3).train()
    names = [p.name for p in list_checkpoints(finished.run.path)]
    assert names == ["checkpoint-3", "checkpoint-4"]
    assert (finished.run.path / "previous-1" / "checkpoint-2").is_dir()
    assert Path(finished.run.path, "run.lock").is_file()
