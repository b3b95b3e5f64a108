"""Other names: what Stable-Baselines3 and CleanRL call settings that have other names here."""

from __future__ import annotations

SETTINGS: dict[str, str] = {
    "n_steps": "here it is num_steps",
    "n_envs": "here it is num_envs",
    "n_epochs": "here it is num_epochs",
    "n_timesteps": "here it is total_timesteps",
    "update_epochs": "here it is num_epochs",
    "batch_size": "here it is num_minibatches: num_steps x num_envs / batch_size of them",
    "minibatch_size": "here it is num_minibatches: num_steps x num_envs / minibatch_size of them",
    "normalize_advantage": "here it is normalize_advantages",
    "norm_adv": "here it is normalize_advantages",
    "normalize": "here it is normalize_observations and normalize_rewards",
    "clip_coef": "here it is clip_range",
    "clip_vloss": "here it is clip_range_vf, the range itself",
    "anneal_lr": "here it is lr_schedule, linear or constant",
    "lr": "here it is learning_rate",
    "policy_kwargs": "here they are hidden_sizes, activation, shared_network, log_std_init and others",
    "net_arch": "here it is hidden_sizes and shared_network",
    "activation_fn": "here it is activation, tanh or relu",
    "use_sde": "gSDE is not here; state_dependent_std is another thing",
    "env_wrapper": "here it is wrappers",
    "tensorboard_log": "here it is report_to=('tensorboard',), written into output_dir",
    "verbose": "here it is quiet",
    "device": "networks this small run on the CPU alone",
}
"""Their setting -> ours, or why there is none."""
