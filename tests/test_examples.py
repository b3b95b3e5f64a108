"""Every example runs, short; the ones with a known answer reach it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem, EXAMPLES / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_loop_reaches_the_closed_form_optimum():
    now, best = load("own_loop.py").main(["--iterations", "60"])
    # Uniform play starts 0.13 below the optimum; 60 rollouts bring it within a hundredth (E[score] - beta KL).
    assert best - 0.01 < now <= best


def test_toy_reward(tmp_path):
    metrics = load("toy_reward.py").main(["--total-episodes", "32", "--output-dir", str(tmp_path)])
    assert metrics["progress/episodes"] == 32 and (tmp_path / "curve.png").exists()


def test_multi_turn(tmp_path, capsys):
    metrics = load("multi_turn.py").main(["--total-episodes", "32", "--output-dir", str(tmp_path)])
    assert metrics["progress/episodes"] == 32 and metrics["response/turns"] >= 1
    assert "points a game of 3" in capsys.readouterr().out


def test_cartpole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load("cartpole.py").main(["--total-timesteps", "2048"])


def test_yaml_example_trains(tmp_path, monkeypatch):
    from rlhf_ppo.cli import main

    monkeypatch.chdir(ROOT)  # its paths are relative to the repository
    flags = ["--output-dir", str(tmp_path), "--total-episodes", "32", "--eval-size", "8", "--max-new-tokens", "8"]
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
