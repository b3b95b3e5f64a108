"""Train Stable-Baselines3 with the RL Zoo's presets; benchmarks/classic_returns.py runs this in build/sb3.

python benchmarks/sb3_returns.py LunarLander-v3 SEED EPISODES RESULT.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from classic_speed_worker import ZOO, derived
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

STEPS = 1_000_000

MUJOCO: dict[str, Any] = {
    "normalize": True,
    "n_steps": 512,
    "batch_size": 64,
    "policy_kwargs": {
        "log_std_init": -2,
        "ortho_init": False,
        "activation_fn": torch.nn.ReLU,
        "net_arch": {"pi": [256, 256], "vf": [256, 256]},
    },
}
# The RL Zoo's presets, made for earlier versions of these environments.
PRESETS: dict[str, dict[str, Any]] = {
    "LunarLander-v3": ZOO["LunarLander-v3"],
    "LunarLanderContinuous-v3": ZOO["LunarLander-v3"],
    "HalfCheetah-v5": {
        **MUJOCO,
        "gamma": 0.98,
        "learning_rate": 2.0633e-5,
        "ent_coef": 0.000401762,
        "clip_range": 0.1,
        "n_epochs": 20,
        "gae_lambda": 0.92,
        "max_grad_norm": 0.8,
        "vf_coef": 0.58096,
    },
    "Hopper-v5": {
        **MUJOCO,
        "batch_size": 32,
        "gamma": 0.999,
        "learning_rate": 9.80828e-5,
        "ent_coef": 0.00229519,
        "clip_range": 0.2,
        "n_epochs": 5,
        "gae_lambda": 0.99,
        "max_grad_norm": 0.7,
        "vf_coef": 0.835671,
    },
    "Walker2d-v5": {
        "normalize": True,
        "n_steps": 512,
        "batch_size": 32,
        "gamma": 0.99,
        "learning_rate": 5.05041e-5,
        "ent_coef": 0.000585045,
        "clip_range": 0.1,
        "n_epochs": 20,
        "gae_lambda": 0.95,
        "max_grad_norm": 1,
        "vf_coef": 0.871923,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", choices=list(PRESETS))
    parser.add_argument("seed", type=int)
    parser.add_argument("episodes", type=int)
    parser.add_argument("result", type=Path)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    settings = dict(PRESETS[flags.env])
    copies, normalize = settings.pop("n_envs", 1), settings.pop("normalize", False)
    steps = settings.pop("total", STEPS)
    envs = make_vec_env(flags.env, n_envs=copies, seed=derived(flags.seed, 0)[0])
    test = make_vec_env(flags.env, seed=derived(flags.seed, 1)[0])
    if normalize:
        envs = VecNormalize(envs, gamma=settings["gamma"])
    model = PPO("MlpPolicy", envs, seed=flags.seed, device="cpu", **settings).learn(steps)
    if normalize:
        test = VecNormalize(test, training=False, norm_reward=False)
        test.obs_rms = envs.obs_rms
    mean, _ = evaluate_policy(model, test, n_eval_episodes=flags.episodes, deterministic=True)
    flags.result.write_text(json.dumps({"env_steps": model.num_timesteps, "mean_return": mean}) + "\n", "utf-8")


if __name__ == "__main__":
    main()
