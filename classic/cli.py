"""The command line: `classic-ppo train ENV` and `classic-ppo evaluate FOLDER`."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from classic.config import PPOArgs
from classic.train import PPO
from rlhf_ppo.runtime.run_directory import RunDirectory
from rlhf_ppo.runtime.settings import run_command


@dataclass(frozen=True, kw_only=True)
class TrainCommand(PPOArgs):
    """Train an agent on a Gymnasium environment, evaluate it and save it."""

    env: tyro.conf.Positional[str]
    """Environment id, such as CartPole-v1, or module:id to import a module first."""
    eval_episodes: int = 20
    """Episodes of the evaluation at the end."""


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """Evaluate a saved agent."""

    folder: tyro.conf.Positional[str]
    """Folder of a run, or any folder written by agent.save."""
    episodes: int = 20
    """Episodes to play."""
    seed: int | None = None
    """Seed of the environments; None: the one that training's own evaluation used."""
    deterministic: bool = True
    """Take the most likely action; False samples from the policy."""


def train(command: TrainCommand) -> int:
    """`classic-ppo train ENV`: learn, save, evaluate, and say where everything is; 130 after Ctrl-C."""
    if command.eval_episodes < 1:
        raise ValueError(f"eval_episodes must be 1 or more, got {command.eval_episodes}")
    name = command.env.replace("/", "-").replace(":", "-")
    given = {field.name: getattr(command, field.name) for field in dataclasses.fields(PPOArgs)}
    given["output_dir"] = command.output_dir or f"runs/{name}-seed{command.seed}"
    agent = PPO(command.env, PPOArgs(**given))
    start = time.perf_counter()
    try:
        agent.learn()
    except KeyboardInterrupt:
        print(f"interrupted; the agent as it is lies in {agent.save(given['output_dir'])}", file=sys.stderr)
        return 130
    seconds = time.perf_counter() - start
    folder = agent.save(given["output_dir"])
    result = agent.evaluate(episodes=command.eval_episodes)
    run = RunDirectory(folder)
    steps = agent.counters["env_steps"]
    run.log({"progress/env_steps": steps, **{f"eval/{key}": value for key, value in result.items()}})

    table = Table(title=f"{command.env}: {steps:,} steps in {seconds:.1f} s", show_header=False)
    for row in _result_rows(result, command.eval_episodes):
        table.add_row(*row)
    for what, file in (("model", "model.safetensors"), ("metrics", "metrics.jsonl"), ("curve", "curve.png")):
        table.add_row(what, str(Path(folder) / file))
    _print(table)
    return 0


def evaluate(command: EvaluateCommand) -> None:
    """`classic-ppo evaluate FOLDER`: play episodes with a saved agent."""
    agent = PPO.load(command.folder)
    result = agent.evaluate(episodes=command.episodes, deterministic=command.deterministic, seed=command.seed)
    table = Table(title=f"{agent.env_id} from {command.folder}", show_header=False)
    for row in _result_rows(result, command.episodes):
        table.add_row(*row)
    _print(table)


def _result_rows(result: dict[str, float], episodes: int) -> list[tuple[str, str]]:
    return [
        (f"mean return, {episodes} episodes", f"{result['mean_return']:.1f} +- {result['std_return']:.1f}"),
        ("mean length, steps", f"{result['mean_length']:.1f}"),
    ]


def _print(table: Table) -> None:
    console = Console()
    # A pipe or a log has no width: a path must not be wrapped there.
    console.print(table, width=None if console.is_terminal else 200)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `classic-ppo`."""
    return run_command("classic-ppo", {"train": (TrainCommand, train), "evaluate": (EvaluateCommand, evaluate)}, argv)


if __name__ == "__main__":
    raise SystemExit(main())
