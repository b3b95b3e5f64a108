"""Callbacks: evaluation while training, the best agent, saving and stopping; they do not disturb training."""

from __future__ import annotations

import gymnasium
import pytest

import classic
from classic.callbacks import evaluate_every, save_every, stop_at_return
from rlhf_ppo.runtime.logs.run_directory import RunDirectory


def test_evaluations_while_training_are_logged_and_the_best_agent_is_saved(small, tmp_path):
    args = small(output_dir=str(tmp_path / "watched"), learning_rate=1e-2, gamma=0.5)
    agent = classic.PPO("tests/Match-v0", args).learn(1_000, callbacks=[evaluate_every(3, episodes=7)])
    rows = [row for row in RunDirectory(tmp_path / "watched").read() if "eval/mean_return" in row]
    assert [row["progress/iteration"] for row in rows] == list(range(3, agent.counters["iteration"] + 1, 3))
    assert agent.best_return == max(row["eval/mean_return"] for row in rows)
    assert classic.PPO.load(tmp_path / "watched" / "best").evaluate(episodes=7)["mean_return"] == agent.best_return
    plain = classic.PPO("tests/Match-v0", small(learning_rate=1e-2, gamma=0.5)).learn(1_000)
    assert (plain.network.policy[0].weight == agent.network.policy[0].weight).all()


def test_training_stops_once_the_return_is_reached(small, learning_seed):
    args = small(learning_rate=1e-2, gamma=0.5, seed=learning_seed)
    agent = classic.PPO("tests/Match-v0", args).learn(50_000, callbacks=[stop_at_return(4.5, episodes=40)])
    last = [episode.total_reward for episode in agent.recent][-40:]
    assert sum(last) / 40 >= 4.5 and agent.counters["env_steps"] < 20_000
    # Each of Match's episodes is worth 5 at most.
    never = classic.PPO("tests/Match-v0", args).learn(300, callbacks=[stop_at_return(5.1, episodes=1)])
    assert never.counters["env_steps"] >= 300


def test_all_callbacks_are_called_even_if_one_ends_training(small, tmp_path):
    agent = classic.PPO("tests/Match-v0", small())
    agent.learn(10_000, callbacks=[lambda *_: True, save_every(1, tmp_path)])
    assert agent.counters["iteration"] == 1 and (tmp_path / "1" / "agent.json").is_file()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: evaluate_every(0), "rollouts must be 1 or more, got 0"),
        (lambda: evaluate_every(1, episodes=0), "episodes must be 1 or more, got 0"),
        (lambda: save_every(0, "x"), "rollouts must be 1 or more"),
        (lambda: stop_at_return(1.0, episodes=101), "between 1 and 100, got 101"),
    ],
)
def test_values_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_users_own_metric_is_logged(small, tmp_path):
    def success(agent, metrics):
        agent.log({"custom/success_rate": 0.25 * agent.counters["iteration"]})

    classic.PPO("tests/Match-v0", small(output_dir=str(tmp_path))).learn(100, callbacks=[success])
    rows = [row for row in RunDirectory(tmp_path).read() if "custom/success_rate" in row]
    assert rows == [{"progress/iteration": k, "custom/success_rate": 0.25 * k} for k in (1, 2)]
    with pytest.raises(KeyError, match="such as 'custom/success_rate'"):
        classic.PPO("tests/Match-v0", small(output_dir=str(tmp_path))).learn(
            100, callbacks=[lambda agent, metrics: agent.log({"episode/success_rate": 0.5})]
        )


def test_several_evaluation_environments_are_logged_beside_trainings(small, tmp_path):
    always_wrong = lambda: gymnasium.wrappers.TransformReward(gymnasium.make("tests/Match-v0"), lambda reward: -1.0)  # noqa: E731
    watch = evaluate_every(2, episodes=3, envs={"wrong": always_wrong, "same": "tests/Match-v0"})
    agent = classic.PPO("tests/Match-v0", small(output_dir=str(tmp_path))).learn(200, callbacks=[watch])
    rows = [row for row in RunDirectory(tmp_path).read() if "eval/mean_return" in row]
    assert rows and all(row["eval_wrong/mean_return"] == -5.0 for row in rows)
    assert all(row["eval_same/mean_return"] == row["eval/mean_return"] for row in rows)
    plain = classic.PPO("tests/Match-v0", small()).learn(200)
    assert (plain.network.policy[0].weight == agent.network.policy[0].weight).all()
    with pytest.raises(ValueError, match=r"plays 'tests/Match-v0' with the spaces .*, but 'CartPole-v1' has"):
        agent.evaluate(3, env="CartPole-v1")
