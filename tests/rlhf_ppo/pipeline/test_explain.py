"""Explain a run's rollouts: recorded, of a black box and sampled anew, with the very numbers of the update."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

import rlhf_ppo.trainer
from rlhf_ppo.cli import main
from rlhf_ppo.config.arguments.commands import ExplainArgs
from rlhf_ppo.config.arguments.inference import GenerateArgs
from rlhf_ppo.pipeline.explain import explain_run, print_explained
from rlhf_ppo.training.checkpoints.black_box import read_black_box
from rlhf_ppo.training.recorded.recorded_rollouts import open_recording
from tests.rlhf_ppo.pipeline.test_replay import healthy_box

REWARD = """
def vowels(prompts, completions, **columns):
    return [sum(c in 'aeiou' for c in t) for t in completions]
def hard(prompts, completions, level):
    return [float(x) for x in level]
"""


@pytest.fixture
def folder(tmp_path, make_model, tokenizer, monkeypatch) -> Path:
    """A working folder with a model, a reward file and prompts."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"the cat {word}", "level": i} for i, word in enumerate(("sat", "ran", "ate", "saw"))]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN = (
    "train --model model --reward reward.py:{} --dataset prompts.jsonl --output-dir run --total-episodes 4 "
    "--rollout-batch-size 4 --num-minibatches 2 --max-new-tokens 4 --eval-size 0 --device cpu --precision fp32 --quiet "
    "--learning-rate {}"
)


def column(found, name):
    return [row[name] for row in found.explanation.rows]


def test_a_recorded_rollout_has_the_numbers_of_its_update(make_trainer, monkeypatch, capsys):
    """Coefficients that have moved since, and statistics of the rollouts before, are those of that update."""
    seen, after = [], []

    def noting(rollout, rewards, args):
        seen.append((rollout, rewards, rlhf_ppo.training.experience.estimate(rollout, rewards, args)))
        return seen[-1][2]

    monkeypatch.setattr(rlhf_ppo.trainer, "estimate", noting)
    settings = {"normalize_scores": True, "kl_target": 0.01, "kl_horizon": 20, "save_rollouts": True, "save_every": 1}
    note = lambda trainer, _: after.append([row["ratio"] for row in trainer.explain(seen[-1][0]).rows])  # noqa: E731
    trainer = make_trainer(total_episodes=32, learning_rate=0.01, callbacks=[note], **settings)
    trainer.train()
    assert trainer.kl_coef != trainer.args.kl_coef
    for number in (1, 3):
        found = explain_run(ExplainArgs(run=str(trainer.run.path), rollout=number, device="cpu"))
        rollout, rewards, estimates = seen[number - 1]
        mask = estimates.experience.mask
        assert list(found.completions) == rollout.completions and found.scores == rollout.scores.tolist()
        torch.testing.assert_close(torch.tensor(column(found, "reward")), rewards.per_token[mask].float())
        torch.testing.assert_close(torch.tensor(column(found, "weight")), estimates.experience.advantages[mask])
        kl = (rollout.logprobs - rollout.ref_logprobs)[mask]
        torch.testing.assert_close(torch.tensor(column(found, "kl")), kl)
        assert column(found, "ratio") == pytest.approx(after[number - 1], abs=1e-4)
        assert f"checkpoint-{number}" in found.title
    assert explain_run(ExplainArgs(run=str(trainer.run.path), device="cpu")).title.startswith("rollout 4")
    # Without the checkpoint of that update, the newest policy; without any policy, no ratios.
    shutil.rmtree(trainer.run.path / "checkpoint-1")
    args = ExplainArgs(run=str(trainer.run.path), rollout=1, device="cpu")
    assert "checkpoint-4" in explain_run(args).title
    for number in (2, 3, 4):
        shutil.rmtree(trainer.run.path / f"checkpoint-{number}")
    assert "saved model" in explain_run(args).title
    (trainer.run.path / "config.json").unlink()
    found = explain_run(args)
    assert "no ratios" in found.title and "ratio" not in found.explanation.columns
    assert main(["explain", str(trainer.run.path), "--rollout", "7"]) == 2
    assert "has recorded rollouts 1 to 4, and there is no blackbox-7" in capsys.readouterr().err


def test_a_black_box_has_the_numbers_of_its_update(make_trainer, prompts):
    trainer = make_trainer(kl_coef=0.3)
    box = healthy_box(trainer, prompts, [0, 1, 2, 3])
    old = read_black_box(box).old
    trainer.tokenizer.save_pretrained(trainer.run.path)  # as a run does at its end
    for args in (ExplainArgs(run=str(box)), ExplainArgs(run=str(trainer.run.path), rollout=1)):
        found = explain_run(dataclasses.replace(args, device="cpu"))
        torch.testing.assert_close(torch.tensor(column(found, "weight")), old.advantages[old.mask])
        assert column(found, "ratio") == pytest.approx([1.0] * int(old.mask.sum()), abs=1e-4)


@pytest.mark.parametrize("more", ["", "--lora-rank 2", "--save-every 1"])
def test_new_responses_are_the_runs_newest_policy_s(folder, more, capsys):
    """A learning rate of 0 moves nothing: the newest policy is the reference, and the ratio is 1."""
    words = TRAIN.format("vowels", 0)
    assert main([*words.split(), *more.split()]) == 0
    found = explain_run(ExplainArgs(run="run", sample=2, device="cpu"))
    assert found.prompts == ["the cat ate"] and found.scores == [sum(c in "aeiou" for c in found.completions[0])]
    zeros = pytest.approx([0.0] * len(found.explanation.rows), abs=1e-5)
    assert column(found, "kl") == zeros and column(found, "ratio") == pytest.approx([1.0] * len(zeros.expected))
    assert ("checkpoint-1" if "save" in more else "from run") in found.title
    capsys.readouterr()
    assert main("generate --model run --prompt a b --explain --device cpu".split()) == 0
    said = capsys.readouterr().out
    assert "response 1, score" in said and "a|" in said and said.count("advantage") == 2
    assert main("explain run --device cpu --sample 4".split()) == 2
    assert "sample=4 is beyond the run's 4 training prompts" in capsys.readouterr().err
    assert main("explain run --device cpu --responses 1".split()) == 2
    assert "responses names 1, but the rollout has 1" in capsys.readouterr().err


def test_what_cannot_be_explained_is_one_sentence(folder, make_trainer, capsys):
    assert main(TRAIN.format("hard", 0).split()) == 0
    assert main("generate --model run --prompt a --explain --device cpu".split()) == 2
    assert "'hard' has the parameters (prompts, completions, level)" in capsys.readouterr().err
    trainer = make_trainer(total_episodes=8)
    trainer.train()
    assert main(["explain", str(trainer.run.path)]) == 2
    assert "does not name the run's model and dataset" in capsys.readouterr().err
    assert main(["explain", "nowhere"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    Path("run/model.safetensors").unlink(), Path("run/config.json").unlink()
    assert main(["explain", "run"]) == 2
    assert "neither a checkpoint nor a saved model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExplainArgs(run="r", rollout=1, sample=0), "drop one of them"),
        (lambda: ExplainArgs(run="r", rollout=0), "rollout"),
        (lambda: ExplainArgs(run="r", responses=()), "name at least one response"),
        (lambda: GenerateArgs(model="m", chat=True, explain=True), "explain shows completions of prompt"),
        (lambda: GenerateArgs(model="m", prompt=("a",), explain=True, temperature=0.5), "samples as the run did"),
    ],
)
def test_contradictions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_terminal_gets_colours_and_a_file_plain_columns(make_trainer, prompts):
    trainer = make_trainer(reward_funcs=lambda prompts, completions, **_: [float(len(t)) for t in completions])
    box = str(healthy_box(trainer, prompts, [0, 1, 2, 3]))
    with pytest.raises(ValueError, match="names a tokenizer: say where the model and its tokenizer are with --model"):
        explain_run(ExplainArgs(run=box, device="cpu"))
    trainer.tokenizer.save_pretrained(trainer.run.path)  # as a run does at its end
    found = explain_run(ExplainArgs(run=box, device="cpu"))
    shown = {}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=200, markup=False)
        print_explained(found, [0, 1], console)
        shown[terminal] = console.file.getvalue()
    assert "\x1b[32m" in shown[True] and "\x1b[31m" in shown[True] and "\x1b" not in shown[False]
    label = found.explanation.rows[0]["label"]
    assert all(label in said and "gradient_alive" in said for said in shown.values())
    hostile = dataclasses.replace(found, completions=["\x1b[2J"] * len(found.completions))
    console = Console(file=io.StringIO(), width=200, markup=False)
    print_explained(hostile, [0], console)
    assert "|\ufffd[2J" in console.file.getvalue() and "\x1b" not in console.file.getvalue()


def test_the_tokens_as_a_page(make_trainer, tmp_path, capsys):
    trainer = make_trainer(total_episodes=8, save_rollouts=True)
    trainer.train()
    page = tmp_path / "pages" / "tokens.html"
    assert (
        main(["explain", str(trainer.run.path), "--responses", "0", "2", "--html", str(page), "--device", "cpu"]) == 0
    )
    assert f"page     {page}" in capsys.readouterr().out
    source = page.read_text()
    assert "Response 0" in source and "Response 2" in source and "Response 1" not in source
    tokens = sum(row["sequence"] in (0, 2) for row in trainer.explain(open_recording(trainer.run.path).read(0)).rows)
    assert source.count('role="option"') == tokens


def test_a_page_of_completions_needs_explain():
    with pytest.raises(ValueError, match="add explain, or leave html out"):
        GenerateArgs(model="m", prompt=("x",), html="page.html")


def test_new_responses_of_a_run_of_vllm_need_no_server(folder, capsys):
    main(TRAIN.format("vowels", 0.01).split())
    run = json.loads(Path("run/run.json").read_text())
    run |= {"generation": "vllm", "vllm_url": "http://127.0.0.1:9", "rollouts_ahead": 1, "max_sampler_gap": 1.0}
    Path("run/run.json").write_text(json.dumps(run))
    found = explain_run(ExplainArgs(run="run", sample=0, device="cpu"))
    assert found.title.startswith("new responses to prompt 0") and found.completions
