"""Callbacks and the lines of a run's beginning and end: what was moved, what starts afresh, who ended it; run.json."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from peft import LoraConfig

import classic
from rlhf_ppo import Callback
from rlhf_ppo.cli import main


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([3], r"callbacks\[0\] must be a function of \(trainer, metrics\), got 3"),
        ([print, "x"], r"callbacks\[1\] must be a function .* got 'x'"),
        (print, r"callbacks must be a list of functions of \(trainer, metrics\)"),
        ([dict], r"callbacks\[0\] must be a function .* got <class 'dict'>"),
        (
            [lambda trainer: None],
            r"callbacks\[0\] is called with \(trainer, metrics\), but takes \(trainer\): too many",
        ),
    ],
)
def test_bad_callbacks_are_refused_before_anything_is_loaded(make_trainer, monkeypatch, callbacks, message):
    monkeypatch.setattr("rlhf_ppo.trainer.set_up", None)
    with pytest.raises(ValueError, match=message):
        make_trainer(callbacks=callbacks)
    agent = classic.PPO("CartPole-v1", classic.PPOArgs(num_envs=1, quiet=True))
    with pytest.raises(ValueError, match=message.replace("trainer, metrics", "agent, metrics")):
        agent.learn(1, callbacks=callbacks)
    agent.envs.close()


def said(caplog) -> list[str]:
    """The lines that were logged since the last call."""
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return lines


def test_a_run_says_who_ended_it_what_it_moved_and_that_it_starts_afresh(make_trainer, tmp_path, caplog, capsys):
    def enough(trainer, metrics):
        return True

    settings = {"output_dir": str(tmp_path / "run"), "quiet": False}
    make_trainer(**settings, callbacks=[enough]).train(resume_from_checkpoint="auto")
    assert said(caplog) == [
        f"no checkpoint in {tmp_path}/run: the run starts afresh",
        "callback enough ended the run after 8 of 16 episodes",
    ]
    make_trainer(**settings).train()
    assert said(caplog) == [f"an earlier run in {tmp_path}/run is now in {tmp_path}/run/previous-1"]
    make_trainer(**{**settings, "quiet": True}, callbacks=[enough]).train(resume_from_checkpoint="auto")
    assert said(caplog) == [] and capsys.readouterr().out == ""


def test_an_agent_says_the_same(tmp_path, caplog):
    args = {"num_envs": 2, "num_steps": 8, "num_minibatches": 1, "output_dir": str(tmp_path), "total_timesteps": 64}
    agent = classic.PPO("CartPole-v1", classic.PPOArgs(**args))
    agent.learn(callbacks=[lambda *_: True], resume_from_checkpoint="auto")
    origin, afresh, ended = said(caplog)
    assert origin.startswith("CartPole-v1: ") and afresh == f"no checkpoint in {tmp_path}: training starts afresh"
    assert re.fullmatch(r"a callback ended training after 1\d of 64 steps", ended)
    classic.PPO("CartPole-v1", classic.PPOArgs(**args)).learn()
    assert f"an earlier run in {tmp_path} is now in {tmp_path}/previous-1" in said(caplog)
    assert set(json.loads((tmp_path / "run.json").read_text())["versions"]) == {
        *("rlhf_ppo", "torch", "gymnasium", "python")
    }


def test_lines_go_to_standard_error_unless_the_program_logs_elsewhere():
    code = "from rlhf_ppo.runtime.logs.lines import LOGGER, warn_once; "
    code += "LOGGER.info('at %s', 1); warn_once('look'); warn_once('look')"
    elsewhere = "import logging, sys; logging.basicConfig(stream=sys.stdout, format='%(name)s: %(message)s'); "

    def run(code: str) -> tuple[str, str]:
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return ended.stdout, ended.stderr

    assert run(code) == ("", "at 1\nwarning: look\n")
    assert run(elsewhere + code) == ("rlhf_ppo: at 1\nrlhf_ppo: look\n", "")


def by_vowels(prompts, completions, **columns):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def test_a_run_from_python_writes_down_versions_reward_data_and_adapter(make_trainer, make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    trainer = make_trainer(model=str(tmp_path / "base"), reward_funcs=by_vowels, peft_config=adapter)
    trainer.train()
    run = json.loads((trainer.run.path / "run.json").read_text())
    assert {"rlhf_ppo", "torch", "transformers", "peft", "python"} == set(run["versions"])
    assert run["versions"]["python"] == sys.version.split()[0]
    assert run["reward"] == [f"{__name__}:by_vowels"]
    facts = run["fingerprints"]
    assert facts["train_dataset"].startswith("8 rows, ") and facts["eval_dataset"] is None
    assert facts["adapters"]["default"]["r"] == 3 and facts["bf16"] is False


def test_an_evaluation_knows_a_reward_that_trained_from_python(
    make_trainer, make_model, tokenizer, tmp_path, monkeypatch
):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = make_trainer(model=str(tmp_path / "base"), reward_funcs=by_vowels)
    trainer.train()
    (tmp_path / "mine.py").write_text(
        "def by_vowels(prompts, completions, **columns):\n    return [1.0 for _ in completions]\n"
        "def other(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    )
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n' * 4)
    for reward, trained in (("by_vowels", True), ("other", False)):
        words = f"evaluate --model {trainer.run.path} --reward {tmp_path}/mine.py:{reward} --dataset "
        words += f"{tmp_path}/prompts.jsonl --output-dir {tmp_path}/out --device cpu --precision fp32 --quiet"
        assert main(words.split()) == 0
        assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["judge_was_trained_on"] == trained


class Recorder(Callback):
    """Notes each call."""

    def __init__(self):
        self.calls = []

    def on_train_begin(self, trainer):
        self.calls.append(("begin", trainer.iteration))

    def on_rollout_end(self, trainer, rollout):
        self.calls.append(("rollout", len(rollout.completions)))

    def on_update_end(self, trainer, metrics):
        self.calls.append(("update", metrics["progress/iteration"]))
        return trainer.iteration == 2

    def on_evaluate(self, trainer, metrics):
        self.calls.append(("evaluate", "eval/score_mean" in metrics))

    def on_save(self, trainer, folder):
        self.calls.append(("save", folder.name))

    def on_train_end(self, trainer, metrics):
        self.calls.append(("end", metrics["progress/iteration"]))


def test_an_object_hears_of_every_moment_in_order_and_may_end_the_run(make_trainer, tmp_path):
    recorder, functions = Recorder(), []
    settings = {"output_dir": str(tmp_path / "run"), "save_every": 1, "eval_every": 1, "save_best": True}
    callbacks = [recorder, lambda trainer, metrics: functions.append(trainer.iteration)]
    rows = [{"prompt": "the cat"}]
    make_trainer(total_episodes=80, eval_dataset=rows, callbacks=callbacks, **settings).train()
    each = [("rollout", 8), ("update", 1), ("save", "checkpoint-1"), ("evaluate", True)]
    last = [("rollout", 8), ("update", 2), ("save", "checkpoint-2"), ("evaluate", True)]
    assert recorder.calls == [("begin", 0), ("evaluate", True), *each, *last, ("save", "run"), ("end", 2)]
    assert functions == [1, 2]


def test_the_checkpoint_of_a_best_evaluation_is_told_of(make_trainer, tmp_path):
    recorder = Recorder()
    settings = {"output_dir": str(tmp_path / "run"), "eval_every": 1, "save_best": True}
    make_trainer(eval_dataset=[{"prompt": "the cat"}], callbacks=[recorder], **settings).train()
    saves = [name for kind, name in recorder.calls if kind == "save"]
    assert "checkpoint-1" in saves and saves[-1] == "run" and len(saves) == len(set(saves))


@pytest.mark.parametrize(
    ("hook", "meant"),
    [
        ("on_step_end", "write on_update_end"),
        ("on_log", "write on_update_end"),
        ("on_rollout_ended", "write on_rollout_end"),
        ("on_x", "there are on_train_begin, on_rollout_end, "),
    ],
)
def test_a_hook_that_does_not_exist_is_refused_where_it_is_written(hook, meant):
    with pytest.raises(TypeError, match=f"Mine.{hook} would never be called: {meant}"):
        type("Mine", (Callback,), {hook: lambda *_: None})


def test_the_callbacks_of_another_library_are_refused(make_trainer):
    from transformers import TrainerCallback

    with pytest.raises(ValueError, match=r"callbacks\[0\], TrainerCallback, .* is no rlhf_ppo.Callback: inherit"):
        make_trainer(callbacks=[TrainerCallback()])
