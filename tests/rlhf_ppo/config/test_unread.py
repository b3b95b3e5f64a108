"""No setting is taken and then left unread: changed beside any others, it is refused, or the trained weights differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch

ANOTHER: dict[str, Any] = {
    # Values so far from the default that they must show within two rollouts.
    "clip_range": 1e-3,
    "clip_range_high": 2e-3,
    "ratio_level": "sequence",
    "dual_clip": 1.001,
    "penalty_beta": 50.0,
    "clip_range_vf": 1e-3,
    "vf_coef": 0.9,
    "ent_coef": 0.5,
    "kl_loss_coef": 0.5,
    "kl_loss": "exact",
    "positive_loss_coef": 0.5,
    "positive_score_above": 0.4,
    "loss_aggregation": "sequence_sum",
    "gamma": 0.5,
    "gae_lambda": 0.2,
    "normalize_advantages": False,
    "num_epochs": 3,
    "num_minibatches": 4,
    "max_grad_norm": 1e-3,
    "target_kl": 1e-5,
    "num_generations": 2,
    "max_new_tokens": 5,
    "min_new_tokens": 2,
    "temperature": 0.7,
    "stop_strings": ("a",),
    "recompute_logprobs": True,
    "importance_weight_cap": 1.1,
    "importance_weights": "sequence",
    "importance_weight_mode": "mask",
    "normalize_scores": True,
    "score_clip": 0.2,
    "missing_eos_penalty": 1.0,
    "missing_eos_mode": "replace",
    "kl_coef": 0.7,
    "kl_target": 0.01,
    "kl_horizon": 20.0,
    "kl_estimator": "k3",
    "advantage_estimator": "reinforce",
    "gae_lambda_value": 0.1,
    "adaptive_lambda_alpha": 0.5,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "weight_decay": 0.5,
    "turn_credit": "turn",
    "gamma_turn": 0.5,
    "value_learning_rate": 5e-2,
    "critic_warmup_rollouts": 1,
    "critic_epochs": 4,
    "critic_minibatches": 1,
    "critic_frozen": "attention",
    "max_turns": 2,
}

GROUPS = {"num_generations": 4}
TURNS = {"max_turns": 2, "respond": lambda messages: "so"}

BASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "penalty": {"objective": "penalty"},
    "adaptive penalty": {"objective": "penalty", "target_kl": 0.01},
    "adaptive clip": {"objective": "adaptive_clip"},
    "dual clip": {"objective": "dual_clip"},
    "cispo": {"objective": "cispo"},
    "cispo, its own cap": {"objective": "cispo", "clip_range_high": 0.1},
    "dis": {"objective": "dis"},
    "a2c": {"objective": "a2c"},
    "positive examples": {"positive_loss_coef": 0.3},
    "critic's epochs": {"critic_epochs": 3, "num_epochs": 1},
    "reinforce": {"objective": "reinforce"},
    "rloo": {"advantage_estimator": "rloo", **GROUPS},
    "grpo": {"advantage_estimator": "grpo", **GROUPS},
    "grpo, no spread": {"advantage_estimator": "grpo", "normalize_advantages": False, **GROUPS},
    "returns alone": {"advantage_estimator": "reinforce"},
    "critic without loss": {"vf_coef": 0.0},
    "critic without loss, adaptive lambda": {"vf_coef": 0.0, "adaptive_lambda_alpha": 0.5},
    "separate critic": {"value_model": True},
    "LoRA": {"peft_config": True},
    "adapter critic": {"peft_config": True, "critic": "adapter"},
    "critic's warm-up": {"critic_warmup_rollouts": 1},
    "two lambdas": {"gae_lambda_value": 1.0},
    "adaptive lambda": {"adaptive_lambda_alpha": 0.5},
    "adaptive lambda, two lambdas": {"adaptive_lambda_alpha": 0.5, "gae_lambda_value": 1.0},
    "turns": TURNS,
    "credit by turn": {**TURNS, "turn_credit": "turn"},
    "credit by turn, no critic": {**TURNS, "turn_credit": "turn", "advantage_estimator": "reinforce"},
    "ratios of turns": {**TURNS, "ratio_level": "turn"},
    "k2 loss": {"kl_loss_coef": 0.3},
    "exact KL loss": {"kl_loss_coef": 0.3, "kl_loss": "exact"},
    "KL controller": {"kl_target": 0.05},
    "no KL": {"kl_coef": 0.0},
    "importance weights": {"recompute_logprobs": True, "importance_weight_cap": 1.0},
    "shaped scores": {"normalize_scores": True, "score_clip": 1.0},
    "replaced scores": {"missing_eos_penalty": 1.0, "missing_eos_mode": "replace"},
    "a least length": {"min_new_tokens": 2},
}

# Where the KL is far above both targets, a controller moves by the same bounded step.
OTHERWISE: dict[tuple[str, str], Any] = {
    ("adaptive penalty", "target_kl"): 1e3,
    ("adaptive clip", "target_kl"): 1e3,
}

SAME = {
    ("KL controller", "kl_target"),  # in the first rollout the KL is 0, and one step down the most there is
    ("reinforce", "advantage_estimator"),  # reinforce beside reinforce says the same twice
    ("critic's warm-up", "kl_target"),  # controllers begin after the warm-up, too late for the second rollout
}
"""(base, setting) that trains the same weights for a good reason."""


def weights_after_two_rollouts(make_trainer, make_model, **settings) -> list[torch.Tensor]:
    from peft import LoraConfig

    if settings.pop("value_model", False):
        settings["value_model"] = make_model(seed=3)
    if settings.pop("peft_config", False):
        settings["peft_config"] = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    prompts = ["once upon", "the cat", "a", "dog and cow", "she said", "blue", "no", "why not go"]
    trainer = make_trainer(**{"learning_rate": 2e-2, "lr_scheduler_type": "linear", "ref_model": None, **settings})
    count = trainer.args.rollout_batch_size // trainer.args.num_generations
    for _ in range(2):
        trainer.step(trainer.rollout(prompts[:count]))
    return [p.detach().clone() for p in trainer.model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_a_setting_is_refused_or_shows(make_trainer, make_model, base):
    plain = weights_after_two_rollouts(make_trainer, make_model, **BASES[base])
    unread = []
    for name, value in ANOTHER.items():
        settings = {**BASES[base], name: OTHERWISE.get((base, name), value)}
        if settings == BASES[base]:
            continue
        if name == "max_turns" and "respond" not in settings:
            settings["respond"] = TURNS["respond"]
        try:
            changed = weights_after_two_rollouts(make_trainer, make_model, **settings)
        except ValueError as error:
            # Refused, with its name beside the other's.
            assert name in str(error), (name, error)
            continue
        if all(torch.equal(a, b) for a, b in zip(plain, changed, strict=True)) and (base, name) not in SAME:
            unread.append(name)
    assert not unread
