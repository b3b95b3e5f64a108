"""Settings: presets, contradictions that name both sides, and no setting that nothing reads."""

from __future__ import annotations

import dataclasses
import warnings

import pytest

import classic
from classic.config import DEFAULTS, PRESETS, PPOArgs

# These mean "off" as None; every other None means "the preset's".
OPTIONAL = (
    "clip_range_high",
    "clip_range_vf",
    "target_kl",
    "autoreset_mode",
    "output_dir",
    "env_kwargs",
    "action_masks",
)


def test_none_means_the_preset_and_a_value_wins_over_it():
    args = PPOArgs(num_steps=64).resolve("CartPole-v1")
    assert args.num_steps == 64
    assert args.num_envs == PRESETS["CartPole-v1"]["num_envs"]
    assert args.vf_coef == DEFAULTS["vf_coef"]
    assert PPOArgs().resolve("tests/Match-v0").num_steps == DEFAULTS["num_steps"]


def test_every_field_is_filled_or_documented_as_off():
    names = {field.name for field in dataclasses.fields(PPOArgs)}
    for preset in (DEFAULTS, *PRESETS.values()):
        assert set(preset) <= names
        assert not set(preset) & set(OPTIONAL), "a preset must not turn on what None turns off"
    resolved = PPOArgs().resolve("CartPole-v1")
    assert {name for name in names if getattr(resolved, name) is None} == set(OPTIONAL)


@pytest.mark.parametrize("objective", ["clip", "penalty", "adaptive_clip", "dual_clip", "cispo", "a2c", "reinforce"])
def test_resolving_twice_changes_nothing(objective):
    once = PPOArgs(objective=objective, target_kl=0.01).resolve("CartPole-v1")
    assert once.resolve("CartPole-v1") == once


@pytest.mark.parametrize(
    ("settings", "first", "second"),
    [
        ({"objective": "reinforce", "gae_lambda": 0.9}, "objective='reinforce'", "gae_lambda=0.9"),
        ({"objective": "adaptive_clip", "target_kl": 0.1, "clip_range_high": 0.3}, "objective", "clip_range_high"),
        ({"dual_clip": 2.0}, "dual_clip=2.0", "objective='clip'"),
        ({"objective": "clip", "penalty_beta": 3.0}, "penalty_beta=3.0", "objective='clip'"),
        ({"objective": "a2c", "clip_range_high": 0.3}, "clip_range_high=0.3", "objective='a2c'"),
        ({"clip_range_schedule": "linear", "objective": "a2c"}, "clip_range_schedule='linear'", "objective='a2c'"),
        ({"num_minibatches": 5000}, "num_minibatches=5000", "num_envs x num_steps"),
    ],
)
def test_contradictions_name_both_settings(settings, first, second):
    with pytest.raises(ValueError) as caught:
        classic.PPO("CartPole-v1", PPOArgs(**settings))
    assert first in str(caught.value) and second in str(caught.value)


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
        {"hidden_sizes": ()},
        {"hidden_sizes": (8, 0)},
        {"lr_schedule": "cosine"},
        {"autoreset_mode": "disabled"},
        {"clip_range_schedule": "cosine"},
        {"ent_coef_schedule": "cosine"},
        {"activation": "gelu"},
        {"recurrent": "transformer"},
        {"recurrent_size": 0},
        {"log_std_init": 3.0},
        {"vectorization": "threads"},
        {"gamma": 1.5},
        {"objective": "trpo"},
    ],
)
def test_values_out_of_range_name_the_setting(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        PPOArgs(**settings).resolve("CartPole-v1")


@pytest.mark.parametrize("objective", ["a2c", "reinforce"])
def test_data_reuse_without_a_ratio_warns(objective):
    with pytest.warns(UserWarning, match="num_epochs=3 reuses it off-policy"):
        PPOArgs(objective=objective, num_epochs=3).resolve("CartPole-v1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PPOArgs(objective=objective).resolve("CartPole-v1").num_epochs == 1
