"""Train PPO on CartPole until the pole stays up.

What you will see: a progress line whose return climbs from about 20 to 300 or more (a mean of the last 100 episodes, so
it lags behind), then the mean of 20 evaluation episodes (475 counts as solved, 500 is the maximum), one episode
of the same agent loaded from disk, and the path of its learning curve.
How long: 5 to 10 seconds on an idle CPU core, half a minute on a busy machine.

    python examples/cartpole.py [--seed 1] [--total-timesteps N] [--output-dir runs/cartpole]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import gymnasium

import classic


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, save, load, and play one episode by hand."""
    parser = argparse.ArgumentParser(description="Train PPO on CartPole-v1.")
    parser.add_argument("--seed", type=int, default=1, help="seed of all random numbers")
    parser.add_argument("--total-timesteps", type=int, default=None, help="training steps (default: the preset's)")
    parser.add_argument("--output-dir", default="runs/cartpole", help="folder for the agent, its metrics and its curve")
    options = parser.parse_args(argv)

    agent = classic.PPO("CartPole-v1", classic.PPOArgs(seed=options.seed, output_dir=options.output_dir))
    agent.learn(total_timesteps=options.total_timesteps)
    print(f"mean return of 20 episodes: {agent.evaluate(episodes=20)['mean_return']:.1f}")
    agent.save(options.output_dir)

    agent = classic.PPO.load(options.output_dir)
    env = gymnasium.make("CartPole-v1")
    observation, _ = env.reset(seed=0)
    total, over = 0.0, False
    while not over:
        action, _ = agent.predict(observation)
        observation, reward, terminated, truncated, _ = env.step(action)
        total, over = total + float(reward), terminated or truncated
    print(f"one episode with the loaded agent: {total:.0f}")
    print(f"learning curve: {options.output_dir}/curve.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
