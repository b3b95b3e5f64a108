"""Other settings for an existing agent: each works as if it had been made with them, or is refused by name."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import classic
from classic.changed_settings import COPY_SETTINGS, WEIGHT_SETTINGS
from classic.config import PPOArgs
from classic.update import update
from rlhf_ppo.core import PPOConfig

# Every setting that the core reads as well, at a value that no preset has.
OF_THE_CORE = {
    "objective": "dual_clip",
    "clip_range": 0.07,
    "clip_range_high": 0.3,
    "clip_range_vf": 0.4,
    "dual_clip": 2.5,
    "vf_coef": 0.3,
    "ent_coef": 0.02,
    "gamma": 0.5,
    "gae_lambda": 0.6,
    "normalize_advantages": False,
    "num_epochs": 3,
    "num_minibatches": 4,
    "max_grad_norm": 0.2,
    "target_kl": 0.3,
}
OF_THE_RUN = {
    "total_timesteps": 321,
    "num_steps": 24,
    "learning_rate": 1e-5,
    "lr_schedule": "constant",
    "clip_range_schedule": "linear",
    "ent_coef_schedule": "linear",
    "recompute_advantages": True,
    "normalize_values": False,
    "max_initial_log_ratio": 0.5,
    "adam_eps": 1e-4,
    "weight_decay": 0.01,
}


@pytest.fixture
def saved(small, tmp_path):
    folder = tmp_path / "agent"
    classic.PPO("tests/Match-v0", small(normalize_rewards=True)).learn(100).save(folder)
    return folder


def test_every_setting_is_listed_as_changeable_or_fixed():
    """A new setting has to be added to one of the lists."""
    where_it_goes = {"output_dir", "quiet", "num_threads", "save_every", "save_total_limit", "report_to", "report"}
    where_it_goes |= {"eval_envs", "eval_max_steps", "episode_info"}
    where_it_goes |= {"sde_sample_freq"}  # read with use_sde alone
    adapted = {"penalty_beta"}  # penalty's own; below
    listed = [*WEIGHT_SETTINGS, *COPY_SETTINGS, *OF_THE_CORE, *OF_THE_RUN, *where_it_goes, *adapted]
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(PPOArgs))
    in_core = {field.name for field in dataclasses.fields(PPOConfig)} & {
        field.name for field in dataclasses.fields(PPOArgs)
    }
    assert in_core == {*OF_THE_CORE, *adapted}


def learned(agent, monkeypatch):
    """Learn, and return the core's settings and the learning rate of each update."""
    seen = []
    monkeypatch.setattr(
        "classic.ppo.update",
        lambda state, *rest: (seen.append((state.config, state.optimizer.lr)), update(state, *rest))[1],
    )
    agent.learn(250)
    monkeypatch.undo()
    return seen


@pytest.mark.parametrize("way", ["loaded", "assigned"])
def test_changed_settings_equal_those_an_agent_was_made_with(way, small, saved, monkeypatch):
    """From the same weights, moments, generators and episodes."""
    changes = {**OF_THE_CORE, **OF_THE_RUN}
    if way == "loaded":
        agent = classic.PPO.load(saved, **changes)
    else:
        agent = classic.PPO.load(saved)
        agent.args = dataclasses.replace(agent.args, **changes)
    made = classic.PPO("tests/Match-v0", small(normalize_rewards=True, **changes))
    assert agent.args == made.args and agent.config == made.config
    made.network.load_state_dict(agent.network.state_dict())
    made.optimizer.load(agent.optimizer.state())
    made.normalizer.load(agent.normalizer.state())
    made.value_scale = agent.value_scale
    made.counters = dict(agent.counters)
    assert learned(agent, monkeypatch) == learned(made, monkeypatch)
    assert torch.equal(agent.optimizer.weights.vector, made.optimizer.weights.vector)
    assert agent.last_metrics["optim/learning_rate"] == 1e-5
    assert agent.normalizer.gamma == 0.5


def test_a_loaded_agent_may_have_other_copies_and_another_seed(saved):
    agent = classic.PPO.load(saved, seed=5, num_envs=2, autoreset_mode="same_step", normalize_rewards=False)
    assert agent.envs.num_envs == 2 and not agent.envs.next_step_autoreset and agent.normalizer.returns is None
    assert agent.state.generator.initial_seed() != classic.PPO.load(saved).state.generator.initial_seed()
    assert agent.learn(100).last_metrics["policy/first_minibatch_max_abs_log_ratio"] < 1e-5


def test_reward_normalisation_can_be_turned_on_when_loading(small, tmp_path):
    classic.PPO("tests/Match-v0", small()).learn(100).save(tmp_path)
    agent = classic.PPO.load(tmp_path, normalize_rewards=True)
    assert agent.normalizer.returns.count == 0
    assert agent.learn(100).normalizer.returns.count > 0


@pytest.mark.parametrize("name", [name for name in WEIGHT_SETTINGS if name != "network"])  # whose code is given anew
def test_settings_of_the_weights_cannot_change(name, saved):
    other = {
        "hidden_sizes": (8,),
        "value_hidden_sizes": (8,),
        "activation": "relu",
        "recurrent": "gru",
        "recurrent_size": 5,
        "log_std_init": -1.0,
    }.get(name, True)
    with pytest.raises(ValueError, match=rf"the network in .*agent was made with {name}="):
        classic.PPO.load(saved, **{name: other})
    agent = classic.PPO.load(saved)
    before = agent.args
    with pytest.raises(ValueError, match=name):
        agent.args = dataclasses.replace(agent.args, **{name: other})
    assert agent.args is before


@pytest.mark.parametrize(
    "changes", [{"seed": 5}, {"num_envs": 2}, {"wrappers": ("TimeAwareObservation",)}, {"normalize_rewards": False}]
)
def test_settings_that_only_loading_can_change_are_refused_elsewhere(changes, saved):
    agent = classic.PPO.load(saved)
    with pytest.raises(ValueError, match=rf"the agent was made with {next(iter(changes))}=.*PPO\.load\("):
        agent.args = dataclasses.replace(agent.args, **changes)


def test_changes_are_checked_like_settings(saved):
    with pytest.raises(TypeError, match=r"there is no setting 'learning_rat'; did you mean 'learning_rate'\?"):
        classic.PPO.load(saved, learning_rat=1e-5)
    with pytest.raises(ValueError, match="learning_rate must be 0 or more"):
        classic.PPO.load(saved, learning_rate=-1.0)
    agent = classic.PPO.load(saved)
    for changes, words in (({"num_minibatches": 60}, "num_minibatches=60"), ({"dual_clip": 2.0}, r"dual_clip=2\.0")):
        with pytest.raises(ValueError, match=words):
            classic.PPO.load(saved, **changes)
        with pytest.raises(ValueError, match=words):
            agent.args = dataclasses.replace(agent.args, **changes)


@pytest.mark.parametrize("objective", ["a2c", "reinforce", "penalty"])
def test_another_objective_drops_settings_that_it_does_not_read(objective, small, tmp_path):
    args = small(clip_range=0.13, clip_range_high=0.3, gae_lambda=0.8, num_epochs=1)
    classic.PPO("tests/Match-v0", args).learn(100).save(tmp_path)
    agent = classic.PPO.load(tmp_path, objective=objective)
    agent.learn(100)
    assert agent.args.objective == agent.config.objective == objective and agent.args.clip_range_high is None


def test_an_adapted_coefficient_is_kept_until_its_setting_changes(small, tmp_path):
    args = small(objective="penalty", target_kl=0.01, learning_rate=0.0)
    agent = classic.PPO("tests/Match-v0", args).learn(160)
    moved = agent.config.penalty_beta
    assert moved == 0.125
    agent.args = dataclasses.replace(agent.args, gamma=0.5)
    assert (agent.config.penalty_beta, agent.config.gamma) == (moved, 0.5)
    agent.save(tmp_path)
    assert classic.PPO.load(tmp_path, gamma=0.6).config.penalty_beta == moved
    assert classic.PPO.load(tmp_path, penalty_beta=2.0).config.penalty_beta == 2.0
    agent.args = dataclasses.replace(agent.args, penalty_beta=3.0)
    assert agent.config.penalty_beta == 3.0


def test_a_scheduled_clip_range_starts_afresh_with_other_settings(small, tmp_path):
    agent = classic.PPO("tests/Match-v0", small(clip_range_schedule="linear", autoreset_mode="same_step")).learn(640)
    assert agent.config.clip_range == pytest.approx(0.02)
    agent.save(tmp_path)
    agent.args = dataclasses.replace(agent.args, clip_range_schedule="constant")
    for one in (agent, classic.PPO.load(tmp_path, clip_range_schedule="constant")):
        assert one.config.clip_range == 0.2


def test_the_output_folder_can_change_between_runs(small, tmp_path):
    agent = classic.PPO("tests/Match-v0", small(output_dir=str(tmp_path / "first"))).learn(100)
    lines = (tmp_path / "first/metrics.jsonl").read_text()
    agent.args = dataclasses.replace(agent.args, output_dir=str(tmp_path / "second"))
    agent.learn(100)
    assert (tmp_path / "first/metrics.jsonl").read_text() == lines
    assert (tmp_path / "second/metrics.jsonl").read_text().count("\n") == 2
    agent.args = dataclasses.replace(agent.args, output_dir=None)
    agent.learn(100)
    assert (tmp_path / "second/metrics.jsonl").read_text().count("\n") == 2


def test_an_agent_saved_by_an_earlier_version_loads(small, tmp_path):
    agent = classic.PPO("tests/Match-v0", small()).learn(100)
    agent.save(tmp_path)
    content = json.loads((tmp_path / "agent.json").read_text())
    del content["layers"], content["frozen"], content["value_scale"], content["args"]["max_initial_log_ratio"]
    (tmp_path / "agent.json").write_text(json.dumps(content))
    loaded = classic.PPO.load(tmp_path)
    observations = np.random.default_rng(0).normal(size=(50, 1))
    assert np.array_equal(loaded.predict(observations)[0], agent.predict(observations)[0])
    assert loaded.learn(100).counters["iteration"] > agent.counters["iteration"]


def test_run_json_holds_the_steps_asked_for(small, tmp_path):
    agent = classic.PPO("tests/Match-v0", small(output_dir=str(tmp_path), autoreset_mode="same_step"))
    asked = []
    for steps in (128, 1e2):
        agent.learn(steps)
        asked.append(json.loads((tmp_path / "run.json").read_text())["args"]["total_timesteps"])
    assert asked == [128, 228] and agent.args.total_timesteps == 500_000
    with pytest.raises(ValueError, match=r"whole number, 1 or more, got 100\.5"):
        agent.learn(100.5)


def test_a_callback_may_change_settings_from_the_next_rollout_on(small):
    seen = []

    def change(agent, metrics):
        seen.append(
            (metrics["optim/learning_rate"], metrics["policy/clip_range"], agent.state.gradients.__class__.__name__)
        )
        if len(seen) == 1:
            agent.args = dataclasses.replace(
                agent.args, objective="penalty", clip_range=None, learning_rate=1e-5, lr_schedule="constant"
            )

    classic.PPO("tests/Match-v0", small(lr_schedule="constant")).learn(130, callbacks=[change])
    assert [rate for rate, _, _ in seen] == [3e-3, 1e-5, 1e-5]
    assert [kind for _, _, kind in seen] == ["AnalyticGradients", "Autograd", "Autograd"]
