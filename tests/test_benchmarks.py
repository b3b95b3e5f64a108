"""Benchmarks: each script imports; tables of frontiers and of times to a score say what their points say."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from rlhf_ppo import RLHFConfig

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a benchmark by its name, as a script in its folder would."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.fixture
def frontier(load) -> ModuleType:
    """The module benchmarks/frontier.py."""
    return load("frontier")


@pytest.fixture
def times(load) -> ModuleType:
    """The module benchmarks/time_to_score.py."""
    return load("time_to_score")


def test_every_benchmark_imports():
    names = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "sb3_returns")  # has its own environment
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def rows(arm: str, seed: int, points: list[tuple[float, float]], start: float = 0.0) -> list[dict]:
    """Lines of the results: ``points`` are (KL, score) of rising kl_coef."""
    common = {"task": "toy", "arm": arm, "seed": seed, "episodes": 64, "draws": 1, "score_before": start}
    return [
        {**common, "settings": {"kl_coef": i}, "kl": kl, "score": score, "explained_variance": None}
        for i, (kl, score) in enumerate(points)
    ]


def test_the_gap_is_the_area_over_the_root_of_the_kl_divided_by_its_width(frontier):
    # Heights 2 x and x over x = sqrt(KL), both known up to x = 2: the area of x from 0 to 2 is 2, over the width 2.
    ours, theirs = frontier.curve(rows("a", 0, [(1, 2), (4, 4)])), frontier.curve(rows("b", 0, [(9, 3)]))
    assert frontier.gap(ours, theirs) == pytest.approx((1, 2, 4))
    assert frontier.gap(theirs, ours) == pytest.approx((-1, 1, 4))
    bent = frontier.curve(rows("c", 0, [(1, 2), (4, 2)]))  # rises to 2 at x = 1, then stays: area 1 + 2 = 3
    assert frontier.gap(bent, theirs)[0] == pytest.approx((3 - 2) / 2, abs=1e-4)


def test_frontiers_are_paired_by_seed_and_need_all_points(frontier):
    lines = []
    for seed, luck in enumerate((0.0, 5.0, -3.0)):  # what a seed does to both does not widen the interval
        lines += rows("PPO", seed, [(1, luck + 3), (4, luck + 5)], luck)
        lines += rows("RLOO", seed, [(1, luck + 2), (4, luck + 4)], luck)
    lines += rows("PPO", 3, [(1, 99.0)]) + rows("RLOO", 3, [(1, 2.0), (4, 4.0)])  # half measured
    (row,) = frontier.compare(lines)
    assert row["pair"] == "PPO - RLOO" and row["seeds"] == 3 and row["verdict"] == "above"
    # The difference rises from 0 to 1 at x = 1 and stays 1 to x = 2.
    assert row["gap"] == pytest.approx(0.75, abs=1e-4) and row["half_width"] == pytest.approx(0)
    assert row["bootstrap"] == pytest.approx((0.75, 0.75), abs=1e-4)


def test_intervals_agree_with_closed_forms(frontier):
    assert frontier.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.30 / 3**0.5)
    low, high = frontier.bootstrap(list(np.linspace(-1, 1, 201)))
    error = np.std(np.linspace(-1, 1, 201)) / 201**0.5
    assert (low, high) == pytest.approx((-1.96 * error, 1.96 * error), rel=0.05)


def test_finished_runs_are_not_run_again(frontier, tmp_path, monkeypatch, capsys):
    ran = []

    def run_once(task, seed, episodes, folder, *, draws, **settings):
        ran.append((seed, settings["kl_coef"], settings.get("advantage_estimator")))
        return {"score_before": 0.0, "score": 1.0, "kl": 1.0, "explained_variance": 0.5, "cpu_seconds": 0.0}

    monkeypatch.setattr(frontier, "run_once", run_once)
    file = tmp_path / "results.jsonl"
    command = ["frontier", "--tasks", "sentiment", "--strengths", "1", "2", "--seeds", "0", "--results", str(file)]
    for seeds, expected in (([], 6), ([], 0), (["1"], 6)):
        ran.clear()
        monkeypatch.setattr(sys, "argv", [*command[:-2], *seeds, *command[-2:]])
        frontier.main()
        assert len(ran) == expected
    assert {kl for _, kl, _ in ran} == {0.05, 0.1} and {name for *_, name in ran} == {None, "rloo", "grpo"}
    file.write_text(file.read_text() * 2)  # two processes that ran the same
    capsys.readouterr()
    frontier.show(frontier.read_results([file]))
    assert "| sentiment | PPO | 0.05 | 2 | 1.000 ± 0.000 |" in capsys.readouterr().out


def test_arms_are_names_with_settings(frontier):
    given = [["full"], ["no clipping", "clip_range_vf=None", "critic=separate", "vf_coef=1e-1"]]
    expected = {"clip_range_vf": None, "critic": "separate", "vf_coef": 0.1}
    assert frontier.read_arms(given) == {"full": {}, "no clipping": expected}
    for settings in frontier.read_arms(None).values():
        RLHFConfig(output_dir="x", **settings)


def test_tasks_have_valid_settings_and_say_what_they_lack(load, monkeypatch, tmp_path):
    tasks = load("critic_tasks")
    monkeypatch.setenv("RLHF_PPO_DATA", str(tmp_path))
    for name, task in tasks.TASKS.items():
        RLHFConfig(output_dir="x", kl_coef=task.kl_coef, **task.settings)
        assert (tasks.missing(name) is None) == (not task.sources())
    with pytest.raises(ValueError, match=r"vowels needs .*stories260K.*: name its data folder by RLHF_PPO_DATA"):
        tasks.make_trainer("vowels", 0, tmp_path / "run", 64)
    assert tasks.vowels([""] * 3, ["aeIO", "bc de", ""]) == [10, 2, 0]
    with pytest.raises(argparse.ArgumentTypeError, match="is not name=value"):
        tasks.read_setting("kl_coef")


def test_a_task_is_trained_and_measured(load, tmp_path, monkeypatch, capsys):
    tasks = load("critic_tasks")
    argv = ["x", "run", "sentiment", "--episodes", "64", "--out", str(tmp_path), "--draws", "2"]
    argv += ["--set", "max_new_tokens=4", "--set", "eval_every=1", "--set", "num_epochs=1"]
    monkeypatch.setattr(sys, "argv", argv)
    tasks.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert [episodes for episodes, _, _ in result["curve"]] == [0, 32, 64]
    assert result["settings"]["max_new_tokens"] == 4 and result["explained_variance"] is not None
    samples = (tmp_path / "eval_samples.jsonl").read_text().splitlines()
    assert len(samples) == 3 * 2 * 96


def test_the_first_word_decides_a_late_reward_and_all_others_go_with_it(load):
    late = load("late_reward")
    texts = [[late.WORDS[i] for i in row] for row in late._texts(16, torch.Generator().manual_seed(0)).tolist()]
    assert {len(text) for text in texts} == {1 + 256}
    for ask, *words in texts:
        kind = words[0].rstrip("1a2b3c4d")
        assert ask == "ask" and late.opening_score([ask], [" ".join(words)]) == [kind == "bright"]
        assert [word[:-1] for word in words] == [f"{kind}{stage}" for stage in range(1, 9) for _ in range(32)]
    assert late.opening_score(["ask"] * 3, ["dark1a bright1a", " bright2b dark1a", ""]) == [0, 1, 0]
    both = {"scores": torch.tensor([1.0, 0.0, 1.0]), "values": torch.tensor([[0.5, 0.8], [0.5, 0.1], [0.5, 1.0]])}
    assert late._gap(both) == pytest.approx(0.8)
    assert late.summary([1.0, math.nan, 3.0]) == pytest.approx((2, 12.71))  # t * sqrt(2) / sqrt(2)


def line(side: str, seed: int, scores: list[float], *, kl: float = 1.0, rate: float | None = None) -> dict:
    """Line of the results: an evaluation every 64 episodes, ten CPU seconds apart."""
    common: dict = {"side": side, "learning_rate": rate, "kl_coef": 1, "seed": seed, "episodes": 128, "every": 64}
    common["until"] = [0.9, 6.0] if seed == 100 else None
    return {**common, "draws": 1, "curve": [[64 * i, 10.0 * i, 20.0 * i, s, kl * i] for i, s in enumerate(scores)]}


def test_a_level_is_reached_where_two_evaluations_have_it_within_the_kl(times):
    assert times.reached(line("ours", 0, [0, 1, 0, 1, 1]), 0.9, 9) == (192, 30, 60)
    assert times.reached(line("ours", 0, [0, 0, 1]), 0.9, 9) == (128, 20, 40)  # the last stands alone
    assert times.reached(line("ours", 0, [0, 0, 1, 1], kl=4), 0.9, 9) is None
    quick, slow, never = (line("ours", 0, scores) for scores in ([0, 1, 1], [0, 0, 1], [0, 0.5, 0.4]))
    assert sorted((never, slow, quick), key=lambda row: times.rank(row, 0.9, 9)) == [quick, slow, never]
    assert times.rank(never, 0.9, 9)[1] == -0.5


def test_times_search_each_side_and_compare_what_it_chose(times, monkeypatch, capsys, tmp_path):
    """TRL's PPO is fastest at rate 2; GRPO never gets there, and comes closest at rate 1; ours needs no search."""
    asked = []

    def run(command, **_):
        spec = json.loads(command[-1])
        asked.append((command[-2], spec["learning_rate"], spec["seed"], spec["until"]))
        scores = {"ours_as_it_comes": [0, 1, 1], "trl_ppo": [0, 0, 1 if spec["learning_rate"] == 2 else 0]}
        closest = [0, 0, 0.5 if spec["learning_rate"] == 1 else 0]
        curve = line("", 0, scores.get(command[-2], closest))["curve"]
        return argparse.Namespace(returncode=0, stdout=f"chatter\n{json.dumps({'curve': curve})}\n")

    monkeypatch.setattr(times, "LEARNING_RATES", (1, 2))
    monkeypatch.setattr(times, "KL_COEFS", (1,))
    monkeypatch.setattr(times, "trl_python", str)
    monkeypatch.setattr(times.subprocess, "run", run)
    file = str(tmp_path / "times.jsonl")
    Path(file).write_text(json.dumps(line("trl_ppo", 0, [0, 1, 1], rate=1)) + "\n")  # chosen by an earlier search
    sides = ["ours_as_it_comes", "trl_ppo", "trl_grpo"]
    command = ["x", "--sides", *sides, "--seeds", "0", "1", "--level", ".9", "--episodes", "128", "--draws", "1"]
    for end in (["--results", file], ["--results", file], ["--table", file, "--level", ".4"]):
        monkeypatch.setattr(sys, "argv", [*command, *end])
        times.main()
    assert len(asked) == 2 * 2 + 2 * 3  # once each: searches, then full runs in turns
    assert asked[:2] == [("trl_ppo", 1, 100, [0.9, 6.0]), ("trl_grpo", 1, 100, [0.9, 6.0])]
    assert asked[4:7] == [("ours_as_it_comes", None, 0, None), ("trl_ppo", 2, 0, None), ("trl_grpo", 1, 0, None)]
    printed, relaxed = capsys.readouterr().out.split("held-out score 0.4 within")
    assert "| ours, as it comes | default | default | 2 of 2 | 64 | 10 | 20 | 1.0 | 1.0 |" in printed
    assert "PPO | 2 | 1 | 2 of 2 | 128 | 20 | 40 | 2.0 | 2.0 |" in printed
    assert "GRPO | 1 | 1 | 0 of 2 | > 128 | > 20 | > 40 | > 2.0 | > 2.0 |" in printed
    assert "GRPO | 1 | 1 | 2 of 2 | 128 | 20 | 40 | 2.0 | 2.0 |" in relaxed


def test_differences_from_peers_are_those_of_the_page(load):
    """Committed results are within rounding of what was predicted, and the page has every row."""
    oracles = load("oracles")
    rows = json.loads(oracles.RESULTS.read_text())
    table = oracles.Table()
    table.rows = rows
    assert len(rows) >= 30 and not table.failures
    page = (FOLDER.parent / "docs/proof.md").read_text(encoding="utf-8")
    assert all(f"| {row['peer']} | {row['what']} |" in page and row["fact"] in page for row in rows)
    assert all(row["why"] or row["relation"] != "differs" for row in rows)


def test_a_comparison_sees_what_it_should(load):
    table = load("oracles").Table()
    table.add("x", "same", [1.0, 2.0], torch.tensor([1.0, 2.0]))
    table.add("x", "off", [1.0, 100.0], [1.0, 101.0])
    table.state("x", "fact", False, "f", "w")
    assert [row["what"] for row in table.failures] == ["off", "fact"] and table.rows[1]["difference"] == 0.01


@pytest.mark.parametrize("name", ["gsm8k", pytest.param("tldr", marks=pytest.mark.slow), "imdb"])
def test_a_gpu_reproduction_runs_through_at_tiny_size(name, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measured = load("gpu_reproductions").train(name, 1, tiny=True)
    assert all(math.isfinite(value) for value in measured.values()) and set(measured) >= {"before", "after"}


def test_the_graph_of_the_random_walks_has_shortest_paths_that_score_one(load):
    walks = load("random_walks")
    edges = walks.graph()
    best = walks.shortest(edges)
    for walk in walks.random_walks(edges, count=50):
        score = walks.optimality(edges, walk, best)
        reached = walk[-1] == walks.GOAL
        assert score == pytest.approx((walks.LONGEST - len(walk)) / (walks.LONGEST - best[walk[0]]) if reached else 0)
        assert len(walk) >= best[walk[0]] or not reached
    assert walks.optimality(edges, [5, 5, 0], best) == 0  # no node leads to itself


def test_the_realistic_workload_has_the_lengths_that_its_policy_samples(load):
    """A length is geometric and cut at the limit: its mean is (1 - (1 - p)^limit) / p."""
    worker, workloads = load("speed_worker"), load("speed_workloads")
    work = workloads.REALISTIC
    p = 1 / work.mean_tokens
    many = worker.response_lengths(dataclasses.replace(work, prompts=4096)).float()
    assert many.mean() == pytest.approx((1 - (1 - p) ** work.new_tokens) / p, rel=0.01)
    assert many.min() >= 1 and many.max() == work.new_tokens
    floors = worker.run_floor(workloads.WORKLOADS["tiny-R"])["seconds"]
    assert floors["defaults"] > 0 and floors["like"] > 0
