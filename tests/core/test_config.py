"""Proves that PPOConfig takes every sensible setting and refuses the rest by name."""

import dataclasses
import math

import pytest

from rlhf_ppo.core import PPOConfig
from rlhf_ppo.core.config import AGGREGATIONS, KL_LOSSES, OBJECTIVES, RATIO_LEVELS


def test_defaults():
    # The published settings of PPO; a change here changes every run that names none.
    assert dataclasses.asdict(PPOConfig()) == {
        "objective": "clip",
        "clip_range": 0.2,
        "clip_range_high": None,
        "ratio_level": "token",
        "dual_clip": 3.0,
        "penalty_beta": 1.0,
        "clip_range_vf": None,
        "vf_coef": 0.5,
        "ent_coef": 0.0,
        "kl_loss_coef": 0.0,
        "kl_loss": "k2",
        "positive_loss_coef": 0.0,
        "loss_aggregation": "token_mean",
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "normalize_advantages": True,
        "num_epochs": 4,
        "num_minibatches": 4,
        "max_grad_norm": 0.5,
        "target_kl": None,
    }


def test_names():
    assert OBJECTIVES == ("clip", "penalty", "adaptive_clip", "dual_clip", "cispo", "dis", "a2c", "reinforce")
    assert RATIO_LEVELS == ("token", "turn", "sequence")
    assert KL_LOSSES == ("k2", "exact")
    assert AGGREGATIONS == ("token_mean", "sequence_mean", "sequence_sum")
    for objective in OBJECTIVES:
        assert PPOConfig(objective=objective, target_kl=0.01).objective == objective
    for aggregation in AGGREGATIONS:
        assert PPOConfig(loss_aggregation=aggregation).loss_aggregation == aggregation


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma", 0.0),
        ("gamma", 1.0),
        ("gae_lambda", 0.0),
        ("gae_lambda", 1.0),
        ("vf_coef", 0.0),
        ("ent_coef", 0.0),
        ("penalty_beta", 0.0),
        ("num_epochs", 1),
        ("num_minibatches", 1),
        ("dual_clip", 1.1),
        ("clip_range", 1e-6),
        ("clip_range_high", 1e-6),
        ("clip_range_vf", 1e-6),
        ("target_kl", 1e-6),
        ("max_grad_norm", 1e-6),
        ("clip_range", 1),  # an int is a number too
    ],
)
def test_the_edges_are_allowed(name, value):
    assert getattr(PPOConfig(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("clip_range", 0.0, "positive"),
        ("clip_range", -0.2, "positive"),
        ("max_grad_norm", 0.0, "positive"),
        ("clip_range_high", 0.0, "positive or None"),
        ("clip_range_vf", 0.0, "positive or None"),
        ("target_kl", 0.0, "positive or None"),
        ("vf_coef", -0.1, "0 or more"),
        ("ent_coef", -0.1, "0 or more"),
        ("kl_loss_coef", -0.1, "0 or more"),
        ("penalty_beta", -0.1, "0 or more"),
        ("gamma", 1.01, "between 0 and 1"),
        ("gamma", -0.01, "between 0 and 1"),
        ("gae_lambda", 1.01, "between 0 and 1"),
        ("gae_lambda", -0.01, "between 0 and 1"),
        ("num_epochs", 0, "1 or more"),
        ("num_minibatches", 0, "1 or more"),
        ("dual_clip", 1.0, "above 1"),
    ],
)
def test_out_of_range(name, value, what):
    with pytest.raises(ValueError, match=f"{name} must be {what}, got {value}"):
        PPOConfig(**{name: value})


NUMBERS = [f.name for f in dataclasses.fields(PPOConfig) if "float" in f.type]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        PPOConfig(**{name: value})


def test_all_numbers_are_covered():
    assert len(NUMBERS) == 13


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("objective", OBJECTIVES),
        ("loss_aggregation", AGGREGATIONS),
        ("ratio_level", RATIO_LEVELS),
        ("kl_loss", KL_LOSSES),
    ],
)
def test_unknown_names_list_the_known_ones(name, known):
    with pytest.raises(ValueError, match=f"unknown {name} 'ppo'; known: {', '.join(known)}"):
        PPOConfig(**{name: "ppo"})
    with pytest.raises(ValueError, match=rf"unknown {name} '{known[0]}_' \(did you mean '{known[0]}'\?\); known: "):
        PPOConfig(**{name: f"{known[0]}_"})


@pytest.mark.parametrize("name", [*NUMBERS, "num_epochs", "num_minibatches"])
def test_text_is_no_number(name):
    with pytest.raises(ValueError, match=rf"{name} must be a (whole )?number( or None)?, got the text '1e-5'"):
        PPOConfig(**{name: "1e-5"})


def test_contradictions():
    with pytest.raises(ValueError, match="clip_range_high"):
        PPOConfig(objective="adaptive_clip", target_kl=0.01, clip_range_high=0.3)
    assert PPOConfig(objective="clip", clip_range_high=0.3).clip_range_high == 0.3


@pytest.mark.parametrize(
    ("objective", "target_kl", "steering", "stopping"),
    [
        ("clip", None, None, None),
        ("clip", 0.02, None, 0.03),
        ("dual_clip", 0.02, None, 0.03),
        ("cispo", 0.02, None, 0.03),
        ("a2c", 0.02, None, 0.03),
        ("penalty", None, None, None),
        ("penalty", 0.02, 0.02, None),
        ("adaptive_clip", None, 0.01, None),
        ("adaptive_clip", 0.02, 0.02, None),
    ],
)
def test_target_kl_steers_or_stops(objective, target_kl, steering, stopping):
    config = PPOConfig(objective=objective, target_kl=target_kl)
    assert config.steering_kl == steering
    assert config.stopping_kl == (None if stopping is None else pytest.approx(stopping))


def test_frozen_and_named():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PPOConfig().gamma = 0.5
    with pytest.raises(TypeError):
        PPOConfig("clip")
