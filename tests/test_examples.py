"""Every example runs, short; the ones with a known answer reach it."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from processes import in_processes

from rlhf_ppo import RLHFConfig

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem, EXAMPLES / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small(module: ModuleType) -> ModuleType:
    """The example with 8 responses a rollout, of at most 8 tokens."""

    def config(**settings: Any) -> RLHFConfig:
        return RLHFConfig(**{**settings, "rollout_batch_size": 8, "max_new_tokens": 8})

    module.RLHFConfig = config
    return module


def test_own_loop_reaches_the_closed_form_optimum():
    now, best = load("own_loop.py").main(["--iterations", "60"])
    # Uniform play starts 0.13 below the optimum; 60 rollouts bring it within a hundredth (E[score] - beta KL).
    assert best - 0.01 < now <= best


def test_toy_reward(tmp_path, pictures):
    metrics = small(load("toy_reward.py")).main(["--total-episodes", "8", "--output-dir", str(tmp_path)])
    assert metrics["progress/episodes"] == 8 and (tmp_path / "curve.png").exists()


def test_multi_turn(tmp_path, capsys):
    metrics = small(load("multi_turn.py")).main(["--total-episodes", "8", "--output-dir", str(tmp_path)])
    assert metrics["progress/episodes"] == 8 and metrics["response/turns"] >= 1
    assert "points a game of 3" in capsys.readouterr().out


def test_calculator(tmp_path, capsys):
    module = small(load("calculator.py"))
    assert [module.calculator(text) for text in ("37*48", "999999*999", "-(2+3)/2", " 0.5 - 1")] == [
        "1776",
        "998999001",
        "-2.5",
        "-0.5",
    ]
    # What a policy writes is never run: no names, calls, powers or numbers that take for ever.
    for text in (
        "__import__('os')",
        "9**9**9",
        "1+" * 40 + "1",
        "True",
        "x",
        "(lambda: 1)()",
        "9e9*9e9",
        "'a'*9",
        "1,2",
    ):
        with pytest.raises(ValueError, match=r"only numbers|characters|larger"):
            module.calculator(text)
    metrics = module.main(["--total-episodes", "8", "--sft-steps", "2", "--output-dir", str(tmp_path)])
    assert metrics["progress/episodes"] == 8 and metrics["tools/calls_per_response"] >= 0
    assert "calls of the calculator a question" in capsys.readouterr().out


def several_processes(folder: str) -> dict[str, float]:
    """Run the example in a script that has joined the processes through accelerate before."""
    from accelerate import Accelerator

    assert Accelerator(cpu=True).num_processes == 2
    flags = ["--total-episodes", "8", "--output-dir", folder, "--quiet"]
    return small(load("several_processes.py")).main(flags)


def test_several_processes(tmp_path):
    first, second = in_processes(2, several_processes, str(tmp_path))
    assert first == second and first["progress/episodes"] == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", ["torch.distributed.run --nproc-per-node 2", "accelerate.commands.launch --multi_gpu --num_processes 2"]
)
def test_several_processes_under_a_launcher_print_once(tmp_path, launcher):
    flags = ["--total-episodes", "32", "--output-dir", str(tmp_path), "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *launcher.split(), str(EXAMPLES / "several_processes.py"), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("with 2 process(es)") == 1 and done.stdout.count("held-out prompts, before and after") == 1


def test_cartpole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load("cartpole.py").main(["--total-timesteps", "2048"])


def test_clip_and_lambda(tmp_path):
    """Slopes by hand: gone above 1.2 for A > 0 and below 0.8 for A < 0; lambda 1 is 1 - V, lambda 0 one step's gain."""
    example = load("clip_and_lambda.py")
    ratio = torch.tensor([0.5, 1.0, 1.3])
    assert example.objective(ratio, 1.0)[1].tolist() == pytest.approx([1, 1, 0])
    assert example.objective(ratio, -1.0)[1].tolist() == pytest.approx([0, -1, -1])
    values, advantages = example.advantages_of_one_episode()
    torch.testing.assert_close(advantages[1.0], 1 - values)
    torch.testing.assert_close(advantages[0.0][:-1], values.diff())
    example.main(["--output-dir", str(tmp_path)])
    for name in ("clip.png", "lambda.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_yaml_example_trains(tmp_path, monkeypatch):
    from rlhf_ppo.cli import main

    monkeypatch.chdir(ROOT)  # its paths are relative to the repository
    sizes = "--total-episodes 8 --rollout-batch-size 8 --eval-size 4 --max-new-tokens 8".split()
    flags = ["--output-dir", str(tmp_path), *sizes]
    assert main(["train", "--config", "examples/positive.yaml", *flags]) == 0
    assert json.loads((tmp_path / "run.json").read_text())["kl_target"] == 10


def test_embedded_model_recipe_runs_on_any_stories(tmp_path):
    stories = tmp_path / "stories.jsonl"
    text = "Once upon a time, there was a little cat named Tom. He liked to play in the park with number {}."
    stories.write_text("".join(json.dumps({"text": text.format(i)}) + "\n" for i in range(60)))
    flags = ["--dataset", str(stories), "--output-dir", str(tmp_path / "model"), "--num-epochs", "1"]
    metrics = load("embedded_model/recreate.py").main(flags)
    assert metrics["eval/perplexity"] > 1
    openings = (tmp_path / "model" / "story-openings.jsonl").read_text().splitlines()
    assert len(openings) == 1 and json.loads(openings[0])["prompt"].startswith("Once upon a time")


@pytest.fixture
def judgements(tmp_path) -> Path:
    """The two data sets of the pipeline in small: good films are fine, bad ones dull; polite answers win."""
    draw = random.Random(0)
    words = ["film", "plot", "cast", "music", "story", "ending"]
    folder = tmp_path / "data" / "datasets"
    folder.mkdir(parents=True)
    lines = ["label,sentence"]
    for i in range(80):
        thing, number = draw.choice(words), draw.randint(100, 999)
        lines.append(f'{i % 2},"{number} {thing}s later, this is {"fine" if i % 2 else "dull"}"')
    (folder / "sst2_train.csv").write_text("\n".join(lines) + "\n")
    with gzip.open(folder / "hh_harmless_base_test.jsonl.gz", "wt") as file:
        for i in range(40):
            question = f"\n\nHuman: hello\n\nAssistant: yes\n\nHuman: question {i}?\n\nAssistant: "
            file.write(json.dumps({"chosen": f"{question}Sure, {i}.", "rejected": f"{question}No."}) + "\n")
    return tmp_path / "data"


@pytest.mark.parametrize("preferences", ["sst2", pytest.param("hh", marks=pytest.mark.slow)])
def test_preference_pipeline(tmp_path, judgements, preferences):
    example = load("preference_pipeline.py")
    flags = ["--data", str(judgements), "--output-dir", str(tmp_path / "run"), "--preferences", preferences]
    report = example.main([*flags, "--total-episodes", "32", "--max-new-tokens", "6", "--epochs", "1"])
    assert report["prompts"] >= 5 and report["judge"] == str(tmp_path / "run" / "judge")
    assert not report["judge_was_trained_on"] and set(report["agreement"]) == {"reward", "judge"}
    parts = example.split(example.READERS[preferences](judgements / "datasets", random.Random(0)))
    seen = [text for name in ("reward", "judge") for row in parts[name] for text in example.texts(row)]
    assert not any(text.startswith(row["opening"]) for row in parts["evaluation"] for text in seen)
    assert len(parts["reward"]) > len(parts["judge"]) > 0


def test_ppo_or_dpo(tmp_path):
    flags = ["--pairs", "16", "--total-episodes", "8", "--dpo-epochs", "1", "--held-out", "4"]
    curves = small(load("ppo_or_dpo.py")).main([*flags, "--output-dir", str(tmp_path)])
    assert (tmp_path / "ppo_or_dpo.png").exists()
    # Both start at the same model with the same draws: no KL, the same reward.
    (dpo_kl, dpo_reward), (ppo_kl, ppo_reward) = (curve[0] for curve in curves.values())
    assert dpo_kl == pytest.approx(ppo_kl, abs=1e-3) == pytest.approx(0, abs=1e-3)
    assert dpo_reward == pytest.approx(ppo_reward)


def test_gsm8k_short(tmp_path):
    """The embedded model with a chat template knows no arithmetic; the run is what is tested."""
    from rlhf_ppo.models.loading import load_policy, load_tokenizer, resolve_model

    name = resolve_model("embedded")
    tokenizer = load_tokenizer(name)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    load_policy(name).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    small = "--total-episodes 8 --rollout-batch-size 8 --max-new-tokens 4 --eval-size 4 --device cpu".split()
    flags = ["--model", str(tmp_path / "model"), "--output-dir", str(tmp_path / "run"), "--short"]
    assert load("gsm8k.py").main([*flags, *small]) == 0
    row = json.loads((tmp_path / "run" / "problems.jsonl").read_text().splitlines()[0])
    assert row["prompt"][0]["role"] == "user" and row["answer"].isdigit()
