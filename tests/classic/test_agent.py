"""The agent: predict, evaluate, save, load."""

from __future__ import annotations

import json

import gymnasium
import numpy as np
import pytest
import torch

import classic


@pytest.mark.parametrize("env_id", ["tests/Match-v0", "tests/Aim-v0"])
def test_predict_takes_one_observation_or_a_batch(env_id, small):
    agent = classic.PPO(env_id, small())
    space = gymnasium.make(env_id).action_space
    one, state = agent.predict(np.array([0.5]))
    many, _ = agent.predict(np.array([[0.5], [-0.5], [0.5]]))
    assert state is None and isinstance(many, np.ndarray)
    assert space.contains(one)
    assert many.shape == (3, *space.shape)
    # A product of three rows may add up in another order than that of one.
    np.testing.assert_allclose(many[0], one, rtol=1e-6, atol=1e-6)
    sampled = [agent.predict([0.5], deterministic=False)[0].item() for _ in range(30)]
    assert len(set(sampled)) > 1


@pytest.mark.parametrize("observation", [[1.0, 2.0, 3.0], [[1.0, 2.0]], 1.0, [[[1.0] * 4]]])
def test_predict_refuses_a_wrong_shape(observation):
    agent = classic.PPO("CartPole-v1")
    with pytest.raises(ValueError, match=r"'CartPole-v1' has observations of shape \(4,\)"):
        agent.predict(observation)


def test_predict_refuses_nan():
    with pytest.raises(ValueError, match="'CartPole-v1' is non-finite"):
        classic.PPO("CartPole-v1").predict([0.0, np.nan, 0.0, 0.0])


@pytest.mark.parametrize("episodes", [1, 7, 45])
def test_evaluate_plays_exactly_as_many_whole_episodes(episodes, small):
    """Clock's return in episode e is 5 + 4 e; copies each play their share from e = 0 on."""
    result = classic.PPO("tests/Clock-v0", small()).evaluate(episodes=episodes)
    assert set(result) == {"mean_return", "std_return", "mean_length"}
    copies = min(episodes, 4)
    shares = [(episodes + i) // copies for i in range(copies)]
    returns = [5 + 4 * e for share in shares for e in range(share)]
    assert sum(shares) == episodes
    assert result["mean_return"] == pytest.approx(np.mean(returns))
    assert result["std_return"] == pytest.approx(np.std(returns))
    assert result["mean_length"] == 4


def test_evaluate_is_repeatable_and_refuses_no_episodes_and_negative_seeds(small):
    agent = classic.PPO("CartPole-v1", small())
    assert agent.evaluate(episodes=5) == agent.evaluate(episodes=5)
    assert agent.evaluate(episodes=5, seed=1) != agent.evaluate(episodes=5, seed=2)
    with pytest.raises(ValueError, match="episodes must be 1 or more, got 0"):
        agent.evaluate(episodes=0)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        agent.evaluate(episodes=1, seed=-1)


@pytest.mark.parametrize("env_id", ["tests/Match-v0", "tests/Aim-v0"])
def test_save_and_load_give_identical_predictions_and_optimizer(env_id, small, tmp_path):
    agent = classic.PPO(env_id, small()).learn(200)
    agent.save(tmp_path / "agent")
    loaded = classic.PPO.load(tmp_path / "agent")
    observations = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(agent.predict(observations.numpy())[0], loaded.predict(observations.numpy())[0])
    assert torch.equal(agent.network.values(observations), loaded.network.values(observations))
    assert loaded.args == agent.args and loaded.counters == agent.counters
    state, saved = agent.optimizer.state(), loaded.optimizer.state()
    names = [name for name, _ in agent.network.named_parameters()]
    assert set(state) == set(saved) == {f"{n}/{key}" for n in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert all(torch.equal(state[key], saved[key]) for key in state)
    loaded.learn(100)
    assert loaded.counters["env_steps"] > agent.counters["env_steps"]


def test_adapted_coefficients_survive_save_and_load(small, tmp_path):
    args = small(objective="penalty", target_kl=0.01, learning_rate=0.0)
    agent = classic.PPO("tests/Match-v0", args).learn(160)
    assert agent.config.penalty_beta == 0.125
    agent.save(tmp_path)
    assert classic.PPO.load(tmp_path).config == agent.config


def test_a_saved_folder_holds_only_safetensors_and_json(small, tmp_path):
    classic.PPO("tests/Match-v0", small()).learn(60).save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "agent.json",
        "model.safetensors",
        "normalizer.safetensors",
        "optimizer.safetensors",
    ]


def test_load_says_what_is_missing(small, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no saved agent in .*nowhere: agent\.json is missing"):
        classic.PPO.load(tmp_path / "nowhere")
    classic.PPO("tests/Match-v0", small()).save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        classic.PPO.load(tmp_path)


def test_a_saved_agent_loads_although_its_preset_set_something_that_nothing_reads(small, tmp_path, monkeypatch):
    monkeypatch.setattr("classic.presets.resolve.preset", lambda *_: {"clip_range": 0.1, "recurrent_size": 8})
    classic.PPO("tests/Match-v0", small(objective="a2c", num_epochs=1)).save(tmp_path)
    monkeypatch.undo()
    assert classic.PPO.load(tmp_path).args.objective == "a2c"


def test_load_refuses_a_broken_file_and_changed_spaces(small, tmp_path):
    agent = classic.PPO("tests/Match-v0", small())
    agent.save(tmp_path)
    content = json.loads((tmp_path / "agent.json").read_text())
    (tmp_path / "agent.json").write_text(json.dumps({**content, "env_id": "CartPole-v1"}))
    with pytest.raises(ValueError, match="'CartPole-v1' has changed since"):
        classic.PPO.load(tmp_path)
    (tmp_path / "agent.json").write_text(json.dumps({**content, "args": {"no_such_setting": 1}}))
    with pytest.raises(ValueError, match=r"agent\.json was not written by this version.*no_such_setting"):
        classic.PPO.load(tmp_path)
    agent.save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"the tensors in .* cannot be read"):
        classic.PPO.load(tmp_path)


def test_a_second_run_in_one_folder_sets_the_first_aside(small, tmp_path):
    for _ in range(2):
        classic.PPO("tests/Match-v0", small(output_dir=str(tmp_path))).learn(60)
    assert (tmp_path / "previous-1" / "metrics.jsonl").read_bytes() == (tmp_path / "metrics.jsonl").read_bytes()


def test_a_loaded_agent_needs_no_tracker(small, tmp_path, monkeypatch):
    args = small(output_dir=str(tmp_path), report_to=("tensorboard",))
    monkeypatch.setattr("rlhf_ppo.runtime.logs.trackers.find_spec", lambda name: True)
    agent = classic.PPO("tests/Match-v0", args)
    agent.save(tmp_path / "agent")
    monkeypatch.setattr("rlhf_ppo.runtime.logs.trackers.find_spec", lambda name: None)
    loaded = classic.PPO.load(tmp_path / "agent")
    assert loaded.evaluate(episodes=2) == agent.evaluate(episodes=2)
    assert loaded.args == agent.args
