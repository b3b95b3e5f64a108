"""Run one side of benchmarks/classic_speed.py on one task with one seed, on one thread.

python benchmarks/classic_speed_worker.py ours|sb3 CartPole-v1 SEED
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import torch

# Target return, environment steps between two evaluations, and the step at which to give up.
TASKS: dict[str, tuple[float, int, int]] = {
    "CartPole-v1": (475.0, 2_048, 100_000),
    "Pendulum-v1": (-250.0, 4_096, 300_000),
    "LunarLander-v3": (200.0, 16_384, 1_500_000),
}

# The RL Zoo's presets of PPO for these environments (its gSDE for Pendulum included).
ZOO: dict[str, dict[str, Any]] = {
    "CartPole-v1": {
        "total": 100_000,
        "n_envs": 8,
        "n_steps": 32,
        "batch_size": 256,
        "gae_lambda": 0.8,
        "gamma": 0.98,
        "n_epochs": 20,
        "ent_coef": 0.0,
        "learning_rate": lambda left: 0.001 * left,
        "clip_range": lambda left: 0.2 * left,
    },
    "Pendulum-v1": {
        "total": 100_000,
        "n_envs": 4,
        "n_steps": 1024,
        "gae_lambda": 0.95,
        "gamma": 0.9,
        "n_epochs": 10,
        "ent_coef": 0.0,
        "learning_rate": 1e-3,
        "clip_range": 0.2,
        "use_sde": True,
        "sde_sample_freq": 4,
    },
    "LunarLander-v3": {
        "total": 1_000_000,
        "n_envs": 16,
        "n_steps": 1024,
        "batch_size": 64,
        "gae_lambda": 0.98,
        "gamma": 0.999,
        "n_epochs": 4,
        "ent_coef": 0.01,
    },
}

# HalfCheetah: the same work on both sides (SB3's own defaults).
CHEETAH, CHEETAH_STEPS = "HalfCheetah-v5", 20_480


def derived(seed: int, purpose: int, count: int = 1) -> list[int]:
    """Return seeds that no neighbouring seed shares (Stable-Baselines3 seeds copy i with seed + i)."""
    return (np.random.SeedSequence([purpose, seed]).generate_state(count) >> 1).tolist()


class Watch:
    """Evaluates the policy at intervals with the clock stopped, and tells when the return is reached."""

    def __init__(self, task: str, seed: int, predict: Callable[[np.ndarray], np.ndarray]) -> None:
        self.target, self.every, self.limit = TASKS[task]
        self.envs = gymnasium.make_vec(task, num_envs=20, vectorization_mode="sync")
        self.predict, self.seeds = predict, derived(seed, 1, 20)
        self.due, self.excluded, self.excluded_cpu = self.every, 0.0, 0.0
        self.reached = False
        self.start, self.start_cpu = time.perf_counter(), time.process_time()

    def done(self, steps: int) -> bool:
        """Tell whether training is over after ``steps`` environment steps."""
        if steps < self.due:
            return False
        wall, cpu = time.perf_counter(), time.process_time()
        self.due = (steps // self.every + 1) * self.every
        self.reached = self._mean_return() >= self.target
        self.excluded += time.perf_counter() - wall
        self.excluded_cpu += time.process_time() - cpu
        return self.reached or steps >= self.limit

    def result(self, steps: int) -> dict[str, Any]:
        seconds = time.perf_counter() - self.start - self.excluded
        cpu = time.process_time() - self.start_cpu - self.excluded_cpu
        return {"reached": self.reached, "env_steps": steps, "seconds": seconds, "cpu_seconds": cpu}

    def _mean_return(self) -> float:
        """Average one deterministic episode in each of 20 environments, with a seed's own starts each time."""
        observation, _ = self.envs.reset(seed=self.seeds)
        returns, running = np.zeros(20), np.ones(20, dtype=bool)
        while running.any():
            observation, reward, terminated, truncated, _ = self.envs.step(self.predict(observation))
            returns += reward * running
            running &= ~(terminated | truncated)
        return float(returns.mean())


def ours(task: str, seed: int) -> dict[str, Any]:
    """Run this project with its preset."""
    import classic

    agent = classic.PPO(task, classic.PPOArgs(seed=seed, quiet=True))
    watch = Watch(task, seed, lambda observation: agent.predict(observation)[0])
    agent.learn(callbacks=[lambda agent, _: watch.done(agent.counters["env_steps"])])
    result = watch.result(agent.counters["env_steps"])
    rows = agent.args.num_envs * agent.args.num_steps // agent.args.num_minibatches
    sizes = (agent.envs.observation_shape[0], *agent.args.hidden_sizes)
    return {**result, "floor_seconds": agent.counters["optimizer_steps"] * products_alone(sizes, rows)}


def products_alone(sizes: tuple[int, ...], rows: int) -> float:
    """Time an optimizer step's matrix products (hidden layers of actor and critic, forward and backward)."""
    layers = [(torch.randn(rows, i), torch.randn(i, o), torch.randn(rows, o)) for i, o in pairwise(sizes)]
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(2 * 10):
            for k, (x, weight, gradient) in enumerate(layers):
                torch.mm(x, weight)
                torch.mm(x.T, gradient)
                if k:
                    torch.mm(gradient, weight.T)
        best = min(best, (time.perf_counter() - start) / 10)
    return best


def sb3(task: str, seed: int) -> dict[str, Any]:
    """Run Stable-Baselines3 with the RL Zoo's preset."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    settings = dict(ZOO[task])
    total, copies = settings.pop("total"), settings.pop("n_envs")
    envs = make_vec_env(task, n_envs=copies, seed=derived(seed, 0)[0])
    model = PPO("MlpPolicy", envs, seed=seed, device="cpu", **settings)
    watch = Watch(task, seed, lambda observation: model.predict(observation, deterministic=True)[0])

    class Look(BaseCallback):
        over = False

        def _on_rollout_start(self) -> None:  # the update on the last rollout is done
            self.over = watch.done(self.num_timesteps)

        def _on_step(self) -> bool:
            return not self.over

    model.learn(total, callback=Look())
    if not watch.reached:
        watch.done(10**9)  # the last update
    return watch.result(model.num_timesteps)


def cheetah(side: str, seed: int) -> dict[str, Any]:
    """Time 1,000 steps of HalfCheetah beyond the environment's own; the same settings on both sides."""
    env = gymnasium.make(CHEETAH)
    env.reset(seed=seed)
    env.action_space.seed(seed)
    start, start_cpu = time.perf_counter(), time.process_time()
    for _ in range(CHEETAH_STEPS):
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    bare, bare_cpu = time.perf_counter() - start, time.process_time() - start_cpu
    if side == "ours":
        import classic

        settings = {"num_envs": 1, "num_steps": 2048, "num_minibatches": 32, "num_epochs": 10, "learning_rate": 3e-4}
        plain = {"hidden_sizes": (64, 64), "activation": "tanh", "normalize_observations": False}
        args = classic.PPOArgs(seed=seed, quiet=True, **settings, **plain, normalize_rewards=False)
        agent = classic.PPO(CHEETAH, args)
        start, start_cpu = time.perf_counter(), time.process_time()
        agent.learn(CHEETAH_STEPS)
    else:
        from stable_baselines3 import PPO

        model = PPO("MlpPolicy", CHEETAH, seed=seed, device="cpu")
        start, start_cpu = time.perf_counter(), time.process_time()
        model.learn(CHEETAH_STEPS)
    thousands = CHEETAH_STEPS / 1000
    return {
        "overhead": (time.perf_counter() - start - bare) / thousands,
        "overhead_cpu": (time.process_time() - start_cpu - bare_cpu) / thousands,
        "bare": bare / thousands,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["ours", "sb3"])
    parser.add_argument("task", choices=[*TASKS, CHEETAH])
    parser.add_argument("seed", type=int)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    if flags.task == CHEETAH:
        result = cheetah(flags.side, flags.seed)
    else:
        result = {"ours": ours, "sb3": sb3}[flags.side](flags.task, flags.seed)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
