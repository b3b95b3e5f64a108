"""RLHFConfig: defaults that fit together, and contradictions that name both sides."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import rlhf_ppo
from rlhf_ppo import RLHFConfig
from rlhf_ppo.runtime.command_line.settings_help import sentences


def config(**settings) -> RLHFConfig:
    return RLHFConfig(**{"output_dir": "run", **settings})


def test_only_output_dir_is_required():
    with pytest.raises(TypeError, match="output_dir"):
        RLHFConfig()
    assert config().rollout_batch_size <= 32


@pytest.mark.parametrize(
    ("batch", "minibatches", "valid"), [(30, 4, "28 or 32"), (3, 4, "4"), (9, 8, "8 or 16"), (7, 5, "5 or 10")]
)
def test_fault_9_a_batch_that_does_not_divide_names_the_nearest_valid_sizes(batch, minibatches, valid):
    with pytest.raises(ValueError, match=f"rollout_batch_size={batch} .*num_minibatches={minibatches}.* is {valid}$"):
        config(rollout_batch_size=batch, num_minibatches=minibatches)


@pytest.mark.parametrize(
    ("batch", "minibatches", "group", "named", "valid"),
    [
        (30, 2, 4, "num_generations=4", "28 or 32"),
        (12, 4, 8, "num_generations=8", "8 or 16"),
        (12, 8, 4, "num_minibatches=8", "8 or 16"),  # groups fit, minibatches do not
        (2, 1, 4, "num_generations=4", "4"),
    ],
)
def test_fault_9_groups_too_must_divide_the_batch(batch, minibatches, group, named, valid):
    with pytest.raises(ValueError, match=f"rollout_batch_size={batch} .*{named}.* is {valid}$"):
        config(rollout_batch_size=batch, num_minibatches=minibatches, num_generations=group)
    assert config(rollout_batch_size=int(valid.split()[-1]), num_minibatches=minibatches, num_generations=group)


@pytest.mark.parametrize(
    ("settings", "critic"),
    [
        ({}, True),
        ({"num_generations": 4}, True),
        ({"objective": "reinforce"}, False),
        ({"advantage_estimator": "reinforce"}, False),
        ({"advantage_estimator": "rloo", "num_generations": 2, "objective": "a2c"}, False),
        ({"advantage_estimator": "grpo", "num_generations": 2}, False),
    ],
)
def test_a_critic_is_there_where_values_are_read(settings, critic):
    assert config(**settings).has_critic == critic


def test_total_episodes_round_up_to_whole_rollouts():
    # 100 / 32 = 3.125 -> 4 rollouts; 4 rollouts x 4 epochs x 4 minibatches = 64 steps.
    rounded = config(total_episodes=100)
    assert (rounded.num_rollouts, rounded.num_optimizer_steps) == (4, 64)
    assert config(total_episodes=96).num_rollouts == 3
    assert config(total_episodes=1).num_rollouts == 1


@pytest.mark.parametrize(
    ("settings", "both"),
    [
        ({"advantage_estimator": "rloo"}, ("advantage_estimator='rloo'", "num_generations=1")),
        ({"advantage_estimator": "grpo"}, ("advantage_estimator='grpo'", "num_generations=1")),
        (
            {"advantage_estimator": "rloo", "num_generations": 4, "gamma": 0.9},
            ("advantage_estimator='rloo'", "gamma=0.9"),
        ),
        (
            {"advantage_estimator": "reinforce", "gae_lambda_value": 1.0},
            ("gae_lambda_value=1.0", "advantage_estimator='reinforce'"),
        ),
        ({"objective": "reinforce", "gae_lambda_value": 0.0}, ("gae_lambda_value=0.0", "objective='reinforce'")),
        (
            {"advantage_estimator": "grpo", "num_generations": 4, "adaptive_lambda_alpha": 0.05},
            ("adaptive_lambda_alpha=0.05", "advantage_estimator='grpo'"),
        ),
        (
            {"advantage_estimator": "rloo", "num_generations": 4, "max_turns": 2, "turn_credit": "turn"},
            ("advantage_estimator='rloo'", "turn_credit='turn'"),
        ),
        *(
            ({"advantage_estimator": "rloo", "num_generations": 4, name: value}, (f"{name}={value}", "'rloo'"))
            for name, value in (("vf_coef", 0.5), ("clip_range_vf", 0.3), ("gae_lambda", 0.9))
        ),
        ({"total_episodes": 64, "warmup_steps": 33}, ("warmup_steps=33", "total_episodes=64", "32 optimizer steps")),
        ({"vf_coef": 0.0, "clip_range_vf": 0.1}, ("clip_range_vf=0.1", "vf_coef=0")),
        ({"vf_coef": 0.0, "value_learning_rate": 0.1}, ("value_learning_rate=0.1", "vf_coef=0")),
        ({"vf_coef": 0.0, "gae_lambda_value": 1.0}, ("gae_lambda_value=1.0", "vf_coef=0")),
        ({"vf_coef": 0.0, "critic": "separate"}, ("critic='separate'", "vf_coef=0")),
        (
            {"vf_coef": 0.0, "adaptive_lambda_alpha": 0.5, "gae_lambda": 0.9},
            ("gae_lambda=0.9", "adaptive_lambda_alpha=0.5", "vf_coef=0"),
        ),
        (
            {"adaptive_lambda_alpha": 0.05, "gae_lambda_value": 1.0, "gae_lambda": 0.9},
            ("gae_lambda=0.9", "adaptive_lambda_alpha=0.05", "gae_lambda_value=1.0"),
        ),
        ({"objective": "penalty", "clip_range": 0.1}, ("clip_range=0.1", "objective='penalty'")),
        ({"objective": "a2c", "clip_range_high": 0.3}, ("clip_range_high=0.3", "objective='a2c'")),
        (
            {"objective": "cispo", "clip_range_high": 3.0, "clip_range": 0.1},
            ("clip_range=0.1", "objective='cispo'", "clip_range_high=3.0"),
        ),
        ({"dual_clip": 4.0}, ("dual_clip=4.0", "objective='clip'")),
        ({"penalty_beta": 2.0}, ("penalty_beta=2.0", "objective='clip'")),
        ({"kl_horizon": 100.0}, ("kl_horizon=100.0", "kl_target=None")),
        ({"kl_coef": 0.0, "kl_estimator": "k3"}, ("kl_estimator='k3'", "kl_coef=0")),
        ({"importance_weight_cap": 2.0}, ("importance_weight_cap=2.0", "recompute_logprobs=False")),
        ({"objective": "penalty", "ratio_level": "sequence"}, ("ratio_level='sequence'", "objective='penalty'")),
        ({"kl_loss": "exact"}, ("kl_loss='exact'", "kl_loss_coef=0")),
        ({"kl_target": 6.0, "kl_coef": 0.0}, ("kl_target=6.0", "kl_coef=0")),
        ({"kl_target": 6.0, "kl_horizon": 8.0}, ("kl_horizon=8.0", "rollout_batch_size=32")),
        (
            {"objective": "adaptive_clip", "target_kl": 0.1, "clip_range_high": 0.3},
            ("objective='adaptive_clip'", "clip_range_high"),
        ),
    ],
)
def test_fault_30_contradicting_settings_are_named_together(settings, both):
    with pytest.raises(ValueError) as error:
        config(**settings)
    assert all(name in str(error.value) for name in both)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", 0.0, "positive"),
        ("temperature", float("nan"), "a number"),
        ("max_new_tokens", 0, "1 or more"),
        ("total_episodes", 0, "1 or more"),
        ("num_epochs", 0, "1 or more"),
        ("learning_rate", -1.0, "0 or more"),
        ("learning_rate", float("inf"), "a number"),
        ("kl_coef", -0.1, "0 or more"),
        ("gamma", 1.5, "between 0 and 1"),
        ("clip_range", 0.0, "positive"),
        ("num_generations", 0, "1 or more"),
        ("gae_lambda_value", 1.5, "between 0 and 1, or None"),
        ("adaptive_lambda_alpha", 0.0, "positive or None"),
        ("importance_weight_cap", 0.9, "1 or more, or None"),
        ("kl_loss_coef", -0.1, "0 or more"),
        ("advantage_estimator", "vtrace", "known: gae, rloo, grpo, reinforce"),
        ("ratio_level", "word", "known: token, turn, sequence"),
        ("kl_loss", "k3", "known: k2, exact"),
        ("reward_timeout_s", 0.0, "positive or None"),
        ("microbatch_tokens", 0, "positive or None"),
        ("max_grad_norm", 0.0, "positive"),
        ("dual_clip", 1.0, "above 1"),
        ("objective", "trpo", "known: clip, penalty"),
        ("kl_estimator", "k4", "known: k1, k2, k3"),
        ("overlong_prompts", "cut", "known: error, truncate, drop"),
        ("loss_aggregation", "sum", "known: token_mean"),
        ("lr_scheduler_type", "step", "known: constant, linear, cosine"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_value(name, value, expected):
    with pytest.raises(ValueError, match=name) as error:
        config(**{name: value})
    assert expected in str(error.value) and str(value) in str(error.value)


@pytest.mark.parametrize("name", ["top_k", "top_p", "repetition_penalty"])
def test_filters_of_the_distribution_are_refused_with_reason_and_remedy(name):
    with pytest.raises(ValueError, match=rf"^{name} is not supported: .*another distribution.*use temperature"):
        config(**{name: 5})
    with pytest.raises(TypeError, match="top_j"):
        config(top_j=5)


def test_settings_are_frozen_and_every_one_has_a_sentence():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().seed = 1  # pyright: ignore[reportAttributeAccessIssue]
    assert {field.name for field in dataclasses.fields(RLHFConfig)} <= set(sentences(RLHFConfig))


def test_every_setting_is_read_somewhere():
    """A setting that nothing reads would promise what does not happen."""
    folder = Path(rlhf_ppo.__file__).parent
    code = "".join(file.read_text() for file in folder.rglob("*.py"))
    for field in dataclasses.fields(RLHFConfig):
        assert any(f"{owner}.{field.name}" in code for owner in ("args", "config", "self", "objective")), field.name
