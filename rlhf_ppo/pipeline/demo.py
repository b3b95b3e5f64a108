"""Demo: a small GPT-2 learns from a toy reward, on CPU, in about three minutes."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

from rlhf_ppo.config.arguments.commands import DemoArgs
from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.data.files import load_rows
from rlhf_ppo.pipeline.before_after import print_before_after
from rlhf_ppo.trainer import PPOTrainer

OPENINGS = str(Path(__file__).parents[1] / "assets" / "story-openings.jsonl")
"""First words of stories that the embedded model was not trained on."""

HELD_OUT = 96


def demo_trainer(args: DemoArgs) -> PPOTrainer:
    """Make a trainer on the packaged story openings, which evaluates on held-out ones."""
    openings = load_rows(OPENINGS)
    return PPOTrainer(
        model=args.model,
        reward_funcs=args.reward,
        args=RLHFConfig(
            output_dir=args.output_dir,
            total_episodes=args.total_episodes,
            learning_rate=args.learning_rate,
            kl_coef=args.kl_coef,
            num_epochs=2,
            precision=args.precision,
            num_threads=args.num_threads,
            seed=args.seed,
        ),
        train_dataset=openings.select(range(HELD_OUT, len(openings))),
        eval_dataset=openings.select(range(HELD_OUT)),
    )


def demo(args: DemoArgs) -> None:
    """Run the `demo` command: train, then print scores, KL, samples and paths."""
    trainer = demo_trainer(args)
    trainer.train()
    print_before_after(trainer.run)
    print_paths(trainer.run.path)


def print_paths(folder: Path) -> None:
    """Print where a run's results are, and a command to try next."""
    if (folder / "report.html").is_file():
        print(f"report   {folder / 'report.html'}")
    print(f"curve    {folder / 'curve.png'}")
    print(f"metrics  {folder / 'metrics.jsonl'}")
    print(f"model    {folder}")
    print(f'try it   {_command()} generate --model {shlex.quote(str(folder))} --prompt "One day"')


def _command() -> str:
    """Return how to call `rlhf-ppo` from this folder, also where it is not on the PATH."""
    if shutil.which("rlhf-ppo"):
        return "rlhf-ppo"
    script = Path(sys.executable).with_name("rlhf-ppo")
    if not script.is_file():
        return f"{shlex.quote(sys.executable)} -m rlhf_ppo.cli"
    return shlex.quote(str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script))
