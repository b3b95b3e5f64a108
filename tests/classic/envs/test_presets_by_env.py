"""A task has one preset, whichever way it is named, and a run prints where its settings come from."""

from __future__ import annotations

import gymnasium
import pytest

import classic
from classic.presets.resolve import DEFAULTS, preset


def cartpole(**kwargs):
    return gymnasium.make("CartPole-v1", **kwargs)


WAYS = {
    "id": "CartPole-v1",
    "newest version": "CartPole",
    "module and id": "gymnasium:CartPole-v1",
    "module and newest": "gymnasium:CartPole",
    "instance": cartpole,
    "wrapped instance": lambda: gymnasium.wrappers.TransformReward(cartpole(), lambda reward: reward),
    "function": lambda: cartpole,
    "function with a wrapper": lambda: lambda: gymnasium.wrappers.TimeAwareObservation(cartpole()),
    "spec": lambda: gymnasium.spec("CartPole-v1").make,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.filterwarnings("ignore:.*latest versioned environment")
def test_one_task_has_one_preset(way):
    agent = classic.PPO(way() if callable(way) else way)
    assert agent.task == "CartPole-v1" and agent.origin == "preset of CartPole-v1"
    known = {name: x for name, x in preset("CartPole-v1").items() if name not in ("num_envs", "num_steps")}
    assert {name: getattr(agent.args, name) for name in known} == known


def test_an_environment_without_a_preset_says_so(small, caplog, capsys):
    for env in (
        "tests/Match-v0",
        lambda: gymnasium.make("tests/Match-v0"),
        gymnasium.make("tests/Match-v0").unwrapped.__class__,
    ):
        agent = classic.PPO(env, classic.PPOArgs(num_envs=2))
        assert agent.origin.startswith("no preset") and agent.args.learning_rate == DEFAULTS["learning_rate"]
    caplog.clear()
    loud = classic.PPO("tests/Match-v0", small(quiet=False)).learn(1)
    assert caplog.messages[0] == "tests/Match-v0: no preset for this environment: general defaults"
    caplog.clear()
    loud.learn(1)
    capsys.readouterr()
    classic.PPO("tests/Match-v0", small()).learn(1)
    assert "preset" not in caplog.text and capsys.readouterr().err == ""


def test_a_loaded_agent_says_where_its_settings_come_from(small, tmp_path, caplog):
    classic.PPO("tests/Match-v0", small()).save(tmp_path)
    classic.PPO.load(tmp_path, quiet=False).learn(1)
    assert caplog.messages[0] == f"tests/Match-v0: settings as saved in {tmp_path}"


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_identifying_a_functions_task_makes_no_extra_environment(vectorization, small):
    made = []

    def make():
        made.append(gymnasium.make("tests/Match-v0"))
        return made[-1]

    agent = classic.PPO(make, small(num_envs=3, vectorization=vectorization))
    agent.learn(10)
    assert len(made) == 3 if vectorization == "sync" else len(made) <= 3  # Gymnasium's own, to see the spaces
    agent.envs.close()
