"""Settings: presets, contradictions that name both sides, and no setting that nothing reads."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

import classic
from classic.config import PPOArgs
from classic.presets.resolve import DEFAULTS, FOLDER, preset, preset_ids, resolve
from rlhf_ppo.core import clipped_value_loss
from rlhf_ppo.core.config import OBJECTIVES

# These mean "off" as None; every other None means "the preset's".
OPTIONAL = (
    "clip_range_high",
    "clip_range_vf",
    "target_kl",
    "max_initial_log_ratio",
    "autoreset_mode",
    "output_dir",
    "env_kwargs",
    "action_masks",
    "save_total_limit",
    "eval_envs",
    "eval_max_steps",
    "value_hidden_sizes",
    "network",
)


def test_none_means_the_preset_and_a_value_wins_over_it():
    args = resolve(PPOArgs(num_steps=64), "CartPole-v1")
    assert args.num_steps == 64
    assert args.num_envs == preset("CartPole-v1")["num_envs"] == 32
    assert args.vf_coef == DEFAULTS["vf_coef"]
    assert resolve(PPOArgs(), "tests/Match-v0").num_steps == DEFAULTS["num_steps"]


def test_settings_resolve_themselves():
    assert PPOArgs().resolve("CartPole-v1", single=True) == resolve(PPOArgs(), "CartPole-v1", single=True)


def test_every_field_is_filled_or_documented_as_off():
    names = {field.name for field in dataclasses.fields(PPOArgs)}
    for settings in (DEFAULTS, *(preset(env_id) for env_id in preset_ids())):
        assert set(settings) <= names
        # env_kwargs={} turns off what a preset gives the environment.
        assert not set(settings) & {*OPTIONAL} - {"env_kwargs"}, "a preset must not turn on what None turns off"
    resolved = resolve(PPOArgs(), "CartPole-v1")
    assert {name for name in names if getattr(resolved, name) is None} == set(OPTIONAL)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_resolving_twice_changes_nothing(objective):
    once = resolve(PPOArgs(objective=objective, target_kl=0.01), "CartPole-v1")
    assert resolve(once, "CartPole-v1") == once


@pytest.mark.parametrize(
    ("settings", "first", "second"),
    [
        ({"objective": "reinforce", "gae_lambda": 0.9}, "objective='reinforce'", "gae_lambda=0.9"),
        ({"objective": "adaptive_clip", "target_kl": 0.1, "clip_range_high": 0.3}, "objective", "clip_range_high"),
        ({"dual_clip": 2.0}, "dual_clip=2.0", "objective='clip'"),
        ({"objective": "clip", "penalty_beta": 3.0}, "penalty_beta=3.0", "objective='clip'"),
        ({"objective": "a2c", "clip_range": 0.1}, "clip_range=0.1", "objective='a2c'"),
        ({"objective": "reinforce", "clip_range": 0.1}, "clip_range=0.1", "objective='reinforce'"),
        ({"objective": "penalty", "clip_range": 0.1}, "clip_range=0.1", "objective='penalty'"),
        ({"objective": "cispo", "clip_range": 0.1, "clip_range_high": 3.0}, "clip_range=0.1", "clip_range_high=3.0"),
        ({"vf_coef": 0.0, "clip_range_vf": 0.2}, "clip_range_vf=0.2", "vf_coef=0"),
        ({"objective": "a2c", "clip_range_high": 0.3}, "clip_range_high=0.3", "objective='a2c'"),
        ({"clip_range_schedule": "linear", "objective": "a2c"}, "clip_range_schedule='linear'", "objective='a2c'"),
        ({"save_every": 2}, "save_every=2", "output_dir=None"),
        ({"save_total_limit": 2, "output_dir": "runs/x"}, "save_total_limit=2", "save_every=0"),
        ({"num_minibatches": 5000}, "num_minibatches=5000", "num_envs x num_steps"),
    ],
)
def test_contradictions_name_both_settings(settings, first, second):
    with pytest.raises(ValueError) as caught:
        classic.PPO("CartPole-v1", PPOArgs(**settings))
    assert first in str(caught.value) and second in str(caught.value)


def test_a_presets_clip_range_is_accepted_under_another_objective():
    assert resolve(PPOArgs(objective="a2c"), "HalfCheetah-v5").clip_range == 0.1


def test_minibatches_that_reset_steps_could_empty_are_refused_before_training(small):
    """2 copies x 8 steps are 16 decisions at best and 8 at worst under NEXT_STEP."""
    settings = {"num_envs": 2, "num_steps": 8, "num_minibatches": 9}
    with pytest.raises(ValueError, match=r"num_minibatches=9.*num_envs=2 x num_steps=8 guarantees only 8"):
        classic.PPO("tests/Match-v0", small(**settings, autoreset_mode="next_step"))
    classic.PPO("tests/Match-v0", small(**settings, autoreset_mode="same_step")).learn(16)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_envs": 0},
        {"num_steps": 0},
        {"total_timesteps": 0},
        {"num_threads": 0},
        {"seed": -1},
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"hidden_sizes": (8, 0)},
        {"lr_schedule": "cubic"},
        {"autoreset_mode": "disabled"},
        {"clip_range_schedule": "cubic"},
        {"ent_coef_schedule": "cubic"},
        {"activation": "gelu"},
        {"recurrent": "transformer"},
        {"recurrent_size": 0},
        {"log_std_init": 3.0},
        {"vectorization": "threads"},
        {"save_every": -1},
        {"save_total_limit": 0},
        {"gamma": 1.5},
        {"objective": "trpo"},
    ],
)
def test_values_out_of_range_name_the_setting(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        resolve(PPOArgs(**settings), "CartPole-v1")


@pytest.mark.parametrize("env_id", preset_ids())
def test_every_preset_resolves(env_id):
    resolved = resolve(PPOArgs(), env_id)
    assert resolve(resolved, env_id) == resolved
    assert all(getattr(resolved, name) == value for name, value in preset(env_id).items())


def test_a_misspelt_key_in_a_preset_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("classic.presets.resolve.FOLDER", tmp_path)
    (tmp_path / "tests-Odd-v0.yaml").write_text("learning_rat: 1e-3")
    with pytest.raises(
        ValueError, match=r"tests-Odd-v0\.yaml: unknown key 'learning_rat'; did you mean 'learning_rate'"
    ):
        resolve(PPOArgs(), "tests-Odd-v0")


@pytest.mark.parametrize("objective", ["a2c", "reinforce"])
def test_data_reuse_without_a_ratio_warns(objective):
    with pytest.warns(UserWarning, match="num_epochs=3 reuses it off-policy"):
        resolve(PPOArgs(objective=objective, num_epochs=3), "CartPole-v1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(PPOArgs(objective=objective), "CartPole-v1").num_epochs == 1


def test_presets_with_another_librarys_critic_weight_double_it():
    """Its squared error has no 1/2, so twice its number is the same loss; its default is 0.5."""
    values, returns = torch.randn(2, 100)
    ours = clipped_value_loss(values, None, returns).mean()
    assert ours.item() == pytest.approx(0.5 * torch.nn.functional.mse_loss(values, returns).item())
    theirs = {"HalfCheetah-v5": 0.58096}
    for env_id in preset_ids():
        head = (FOLDER / f"{env_id}.yaml").read_text()
        if "twice" in head:
            assert resolve(PPOArgs(), env_id).vf_coef == 2 * theirs.get(env_id, 0.5)
        elif "The RL Zoo's values" in head or "Tianshou" in head:
            assert "half of its weight for the critic" in head
