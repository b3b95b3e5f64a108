"""Demonstrations: recorded, cloned, from one's own arrays; what does not fit is refused."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Tuple

import classic
from classic.cli import main
from classic.demonstrations import _named, _unnamed, clone, read, record
from classic.envs.spaces import to_env_actions


@pytest.fixture
def signs(tmp_path):
    """Match played without a mistake: its actions are 3 and 4."""
    observations = np.random.default_rng(0).choice([-1.0, 1.0], (200, 1)).astype(np.float32)
    file = tmp_path / "signs.npz"
    np.savez(file, observations=observations, actions=np.where(observations[:, 0] > 0, 4, 3))
    return file


def test_cloned_behaviour_is_the_demonstrated(signs, small):
    agent = classic.PPO("tests/Match-v0", small(normalize_observations=True))
    critic = [x.detach().clone() for x in agent.network.critic.parameters()]
    result = clone(agent, signs, epochs=40, batch_size=50, learning_rate=1e-2)
    assert result["steps"] == 200 and result["loss_before"] == pytest.approx(np.log(2), abs=0.1)
    assert result["loss_after"] < 0.1 and agent.evaluate(10)["mean_return"] == 5.0
    assert all(torch.equal(x, y) for x, y in zip(critic, agent.network.critic.parameters(), strict=True))
    assert agent.normalizer.observations.count == 200
    agent.learn(200)
    assert agent.last_metrics["policy/first_minibatch_max_abs_log_ratio"] < 1e-5


@pytest.mark.parametrize("settings", [{}, {"squash": True}, {"use_sde": True}])
def test_continuous_actions_are_cloned_and_the_spread_stays(settings, small, tmp_path):
    np.savez(tmp_path / "aim.npz", observations=np.zeros((60, 1)), actions=np.full((60, 1), 0.5))
    agent = classic.PPO("tests/Aim-v0", small(**settings))
    log_std = agent.network.log_std.detach().clone()
    clone(agent, tmp_path / "aim.npz", epochs=200, learning_rate=1e-2)
    assert agent.predict(np.zeros(1))[0] == pytest.approx(0.5, abs=0.02)
    assert torch.equal(agent.network.log_std, log_std)


def test_an_agents_episodes_are_recorded_and_read_again(small, tmp_path):
    agent = classic.PPO("tests/Match-v0", small())
    file = record(agent, tmp_path / "a" / "played.npz", episodes=3, seed=2)
    with np.load(file) as played:
        assert len(played["actions"]) == 15 and played["terminated"].sum() == 3
        assert set(played["actions"]) <= {3, 4} and played["rewards"].shape == (15,)
    observations, actions = read(file, agent.envs)
    assert (agent.predict(observations.numpy())[0] == actions.numpy() + 3).all()


@pytest.mark.parametrize("name", ["MultiDiscreteAction", "MultiBinaryAction", "MatrixAction", "ImageInDictObservation"])
def test_every_space_makes_the_round_trip(name, small, tmp_path):
    agent = classic.PPO(f"tests/{name}-v0", small(num_envs=2, num_steps=4))
    file = record(agent, tmp_path / "played.npz", episodes=1, deterministic=False)
    observations, actions = read(file, agent.envs)
    assert observations.shape[1:] == agent.envs.observation_shape
    with np.load(file) as played:
        assert np.allclose(to_env_actions(actions, agent.envs.action_space), played["actions"])
    assert clone(agent, file, epochs=1)["steps"] == len(actions)


def test_parts_have_arrays_of_their_own():
    space = Dict({"a": Box(0, 1, (2,)), "b": Tuple([Discrete(2), Discrete(3)])})
    arrays = _named(space, [{"a": [0.1, 0.2], "b": (1, 2)}] * 3)
    assert {name: x.shape for name, x in arrays.items()} == {
        "observations.a": (3, 2),
        "observations.b.0": (3,),
        "observations.b.1": (3,),
    }
    assert _unnamed(space, arrays)["b"][1].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (
            {"observations": np.zeros((3, 2)), "actions": np.full(3, 3)},
            r"one observation must be \(1,\)",
        ),
        ({"observations": np.zeros((3, 1)), "actions": np.zeros((3, 2))}, r"one action must be \(\), got \(2,\)"),
        ({"observations": np.zeros((3, 1)), "actions": np.zeros(3)}, r"an action is outside Discrete\(2, start=3\)"),
        (
            {"observations": np.zeros((3, 1)), "actions": np.full(2, 3)},
            "3 observations, 2 actions: each",
        ),
        ({"observations": np.full((3, 1), np.nan), "actions": np.full(3, 3)}, "non-finite observations"),
        ({"actions": np.full(3, 3)}, "has no array 'observations'"),
        ({"observations": np.array([None] * 3, dtype=object), "actions": np.full(3, 3)}, "does not fit .*pickle"),
    ],
)
def test_what_does_not_fit_is_refused(arrays, words, small, tmp_path):
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(ValueError, match=words):
        clone(classic.PPO("tests/Match-v0", small()), tmp_path / "odd.npz")


def test_wrong_arguments_are_refused(small, signs, tmp_path):
    agent = classic.PPO("tests/Match-v0", small())
    with pytest.raises(FileNotFoundError, match=r"no demonstrations .*: classic-ppo record FOLDER"):
        clone(agent, tmp_path / "none.npz")
    with pytest.raises(ValueError, match="epochs must be 1 or more, got 0"):
        clone(agent, signs, epochs=0)
    with pytest.raises(ValueError, match="recurrent='gru' cannot be cloned"):
        clone(classic.PPO("tests/Match-v0", small(recurrent="gru")), signs)
    with pytest.raises(ValueError, match=r"demonstrations are an \.npz, got x\.csv"):
        record(agent, "x.csv")
    with pytest.raises(ValueError, match="episodes must be 1 or more"):
        record(agent, tmp_path / "x.npz", episodes=0)


def test_the_command_line_records_and_starts_from_demonstrations(signs, tmp_path, capsys):
    folder, played = str(tmp_path / "run"), str(tmp_path / "played.npz")
    words = ["train", "tests/Match-v0", "--output-dir", folder, "--num-envs", "2", "--num-steps", "8"]
    words += ["--num-minibatches", "2", "--total-timesteps", "32", "--eval-episodes", "5", "--learning-rate", "0"]
    assert main([*words, "--warm-start", str(signs), "--warm-start-epochs", "400"]) == 0
    out, err = capsys.readouterr()
    assert "imitated 200 steps" in err and "5.0 +- 0.0" in out
    assert main(["record", folder, played, "--episodes", "2"]) == 0
    with np.load(played) as arrays:
        assert arrays["rewards"].sum() == 10
    assert main([*words, "--warm-start", "none.npz"]) == 2
    assert "there are no demonstrations none.npz" in capsys.readouterr().err


def test_a_predicted_spread_stays(small, tmp_path):
    observations = np.random.default_rng(0).uniform(-1, 1, (500, 1)).astype(np.float32)
    np.savez(tmp_path / "aim.npz", observations=observations, actions=observations)
    agent = classic.PPO("tests/Aim-v0", small(state_dependent_std=True))
    result = clone(agent, tmp_path / "aim.npz", epochs=60, learning_rate=1e-2)
    output, _ = agent.network.step(torch.from_numpy(observations))
    assert output[:, 1].detach().numpy() == pytest.approx(np.zeros(500), abs=0.1)
    assert result["loss_after"] == pytest.approx(0.5 * np.log(2 * np.pi), abs=0.02)  # the mean is right


def test_a_critic_that_shares_layers_keeps_its_values(signs, small):
    agent = classic.PPO("tests/Match-v0", small(shared_network=True))
    observations = torch.tensor([[-1.0], [1.0]])
    before = agent.network.values(observations).detach()
    assert clone(agent, signs, epochs=40, batch_size=50, learning_rate=1e-2)["loss_after"] < 0.1
    torch.testing.assert_close(agent.network.values(observations), before, atol=0.05, rtol=0)


class Narrow(gymnasium.Env):
    """Its method allows the last of four options."""

    observation_space, action_space = Box(-1, 1, (1,), np.float32), Discrete(4)

    def action_masks(self):
        return np.array([False, False, False, True])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(1, np.float32), 1.0, self.t == 5, False, {}


def test_a_method_action_masks_counts_in_recordings(small, tmp_path):
    file = record(classic.PPO(Narrow, small()), tmp_path / "a.npz", episodes=3, deterministic=False)
    with np.load(file) as played:
        assert set(played["actions"]) == {3}


def test_a_file_cut_off_is_one_sentence(small, tmp_path):
    agent = classic.PPO("tests/Match-v0", small())
    file = record(agent, tmp_path / "a.npz", episodes=1)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"a\.npz is damaged or was not written to its end .* record it again"):
        clone(agent, file)
