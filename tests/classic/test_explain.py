"""agent.explain: the update's own numbers, step by step."""

from __future__ import annotations

import json

import pytest
import torch

import classic
from classic.advantages import estimate_advantages
from classic.cli import main


def test_the_last_update_is_explained_by_its_own_numbers(small, tmp_path):
    """Clock: rewards 0.5 * t + episode, episodes of four steps that terminate and are truncated by turns."""
    agent = classic.PPO("tests/Clock-v0", small(num_envs=1, num_steps=16, autoreset_mode="same_step", gamma=0.9))
    with pytest.raises(ValueError, match="no update yet"):
        agent.explain()
    agent.learn(16)
    explanation = agent.explain()
    rows = explanation.rows
    assert [row["reward"] for row in rows] == [0.5 * t + episode for episode in range(4) for t in (1, 2, 3, 4)]
    assert [row["ended"] for row in rows] == ["", "", "", "terminated", "", "", "", "truncated"] * 2
    decay = 0.9 * agent.config.gae_lambda
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        # Nothing of the next episode reaches this one; the rollout ends with an episode.
        rest = 0 if row["ended"] or following is None else decay * following["advantage"]
        assert row["advantage"] == pytest.approx(row["delta"] + rest, abs=1e-5)
    assert sum(row["weight"] for row in rows) == pytest.approx(0, abs=1e-4)
    assert any(row["ratio"] != 1 for row in rows)
    assert {row["label"] for row in rows} <= {"0", "1"}
    assert explanation.plot(tmp_path / "clock.png").exists()


def test_a_given_rollout_is_explained_by_the_current_critic(small):
    agent = classic.PPO("tests/Aim-v0", small()).learn(64)
    rollout = agent.last_update.rollout
    given = agent.explain(rollout).rows
    values = estimate_advantages(agent.network, rollout, agent.config, agent.value_scale).values
    torch.testing.assert_close(torch.tensor([row["value"] for row in given]), values[rollout.mask].float())
    assert "." in given[0]["label"]  # a continuous action


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_command_explains_one_more_update_and_changes_no_file(small, tmp_path, capsys):
    agent = classic.PPO("tests/Match-v0", small(output_dir=str(tmp_path / "run"))).learn(100)
    agent.save(tmp_path / "run")
    before = contents(tmp_path / "run")
    picture, page = tmp_path / "explained.png", tmp_path / "steps.html"
    assert (
        main(["explain", str(tmp_path / "run"), "--picture", str(picture), "--max-rows", "5", "--html", str(page)]) == 0
    )
    out = capsys.readouterr().out
    assert "gradient_alive" in out and "more rows" in out and picture.exists()
    assert "Copy 0" in page.read_text() and f"page     {page}" in out
    assert contents(tmp_path / "run") == before
    assert json.loads((tmp_path / "run" / "agent.json").read_text())["counters"] == agent.counters


def test_an_explanation_uses_the_updates_own_clip_range(small):
    """The controller adapts it only after the update."""
    args = small(objective="adaptive_clip", learning_rate=0.01, target_kl=1.0, num_steps=64, num_epochs=6)
    agent = classic.PPO("tests/Match-v0", args).learn(64)
    used = agent.last_metrics["policy/clip_range"]
    assert agent.config.clip_range > 1.2 * used
    between = [row for row in agent.explain().rows if 1 + used < row["ratio"] < 1 + agent.config.clip_range]
    assert between and all(row["clipped"] == "above" for row in between)


def test_rows_to_print_are_one_or_more(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["explain", "anywhere", "--max-rows", "0"])
    assert ended.value.code == 2
    assert "max_rows must be 1 or more, got 0" in capsys.readouterr().err
