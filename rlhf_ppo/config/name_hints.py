"""Names that are no settings here: other libraries' names for ours, and settings that were removed."""

from __future__ import annotations

from typing import Any

from rlhf_ppo.config.migration_table import Row, rows_of


def _ours(row: Row) -> str:
    if not row.ours:
        return f"not needed, or not supported. {row.note}".rstrip()
    return f"here it is {' and '.join(row.ours)}" + (f". {row.note}" if row.fate == "converted" else "")


_OTHERS = {
    # TRL's trainers without a critic
    "beta": "kl_coef (in the rewards) or kl_loss_coef (in the loss)",
    "epsilon": "clip_range",
    "epsilon_high": "clip_range_high",
    "num_iterations": "num_epochs",
    "rloo_k": "num_generations",
    "max_completion_length": "max_new_tokens",
    "log_completions": "samples_per_rollout (and report_to, for trackers)",
    "filter_groups": "zero_signal_prompts",
    "dynamic_sampling": "zero_signal_prompts",
    "max_length": "max_new_tokens",
    "max_prompt_length": "overlong_prompts",
    "scale_rewards": "normalize_scores, or normalize_advantages within a group",
    # Stable-Baselines3
    "n_steps": "rollout_batch_size",
    "n_epochs": "num_epochs",
    "total_timesteps": "total_episodes",
    "normalize_advantage": "normalize_advantages",
    "verbose": "quiet",
    # others
    "lr": "learning_rate",
    "warmup_ratio": "warmup_steps (a number of optimizer steps)",
    "max_steps": "total_episodes",
    "logging_dir": "output_dir",
    "max_tokens": "max_new_tokens",
}

SETTINGS: dict[str, str] = {
    name: _ours(row)
    for source in ("ms-swift", "llama-factory", "trl", "trl-0x")  # of a name that several have, the last counts
    for name, row in rows_of(source).items()
    if name not in row.ours
} | {name: f"here it is {ours}" for name, ours in _OTHERS.items()}
"""Name of a setting in another library -> ours, or why there is none."""

ARGUMENTS: dict[str, str] = {
    "config": "here it is args, an RLHFConfig",
    "tokenizer": "here it is processing_class",
    "reward_model": "here it is reward_funcs, which takes a model, a function, a name, or a list of them",
    "reward_fn": "here it is reward_funcs",
    "reward_processing_classes": "a reward model brings its tokenizer: reward_funcs=[RewardModel(model, tokenizer)]",
    "dataset": "here it is train_dataset",
    "policy": "here it is model",
    "policy_model": "here it is model",
    "ref_policy": "here it is ref_model",
    "critic": "here it is value_model, or the setting critic",
    "critic_model": "here it is value_model",
    "data_collator": "prompts are text here, so there is nothing to collate",
    "optimizer": "AdamW is made from the settings learning_rate, weight_decay and value_learning_rate",
    "optimizers": "AdamW is made from the settings learning_rate, weight_decay and value_learning_rate",
    "lr_scheduler": "the schedule is made from the settings lr_scheduler_type and warmup_steps",
    "num_shared_layers": "the critic shares the policy's trunk unless value_model is given",
    "environment_factory": "here it is environment, a class or what makes an instance",
}
"""Name of a trainer's argument in another library -> ours, or why there is none."""

_LENGTH = (
    "add a reward function that subtracts it, such as: def shorter(prompts, completions, completion_ids, **columns): "
    "return [-0.01 * max(0, len(ids) - 40) for ids in completion_ids]"
)

REMOVED: dict[str, tuple[Any, str]] = {
    "score_scale": (1.0, "multiply in the reward function, or use reward_weights"),
    "length_penalty": (0.0, _LENGTH),
    "length_penalty_from": (0, _LENGTH),
    "share_reward_base": (False, "leave it out: a reward adapter loads a base of its own"),
}
"""Setting -> (its old default, what to do instead)."""

REMOVED_VALUES: dict[str, dict[str, str]] = {
    "generation": {"continuous": "use generation='auto', 'dynamic' or 'static'"},
}
"""Setting -> value that was removed -> what to do instead."""
