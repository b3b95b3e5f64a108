"""Run `rlhf-ppo train` and `critic record`: load the prompts, train and print the change, or only record."""

from __future__ import annotations

from typing import Any

from rlhf_ppo.config.arguments.train import CriticRecordArgs, TrainArgs
from rlhf_ppo.data.mixtures import load_data, load_mixture
from rlhf_ppo.data.rows import Rows, prompt_rows
from rlhf_ppo.models.adapters.lora import lora_config
from rlhf_ppo.pipeline.before_after import print_before_after
from rlhf_ppo.pipeline.demo import print_paths
from rlhf_ppo.runtime.command_line.user_code import load_factory, load_function, load_functions
from rlhf_ppo.trainer import PPOTrainer


def train(args: TrainArgs) -> None:
    """Run the `train` command."""
    train_rows, eval_rows = load_prompts(args)
    trainer = make_trainer(args, train_rows, eval_rows)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint, resume_override=args.resume_override)
    merged = trainer.save_model(trainer.run.path / "merged", merge_adapter=True) if args.merge_adapter else None
    if not trainer.fixed.processes.first:
        return
    if eval_rows is not None:
        print_before_after(trainer.run)
    if merged is not None:
        print(f"merged   {merged}")
    print_paths(trainer.run.path)


def record_command(args: CriticRecordArgs) -> None:
    """Run the `critic record` command."""
    trainer = make_trainer(args, load_prompts(args)[0], None)
    recording = trainer.record()
    if not trainer.fixed.processes.first:
        return
    rollouts = f"{len(recording)} rollout{'s' if len(recording) != 1 else ''}"
    print(f"{rollouts}, {recording.num_responses} responses, {recording.num_tokens} tokens")
    print(f"recorded in {recording.folder}")


def make_trainer(args: TrainArgs, train_rows: Rows, eval_rows: Rows | None) -> PPOTrainer:
    """Make the trainer of a `train` command."""
    return PPOTrainer(**trainer_arguments(args), train_dataset=train_rows, eval_dataset=eval_rows)


def trainer_arguments(args: TrainArgs) -> dict[str, Any]:
    """Return the arguments of :class:`PPOTrainer` but for the data."""
    return {
        "model": args.model,
        "reward_funcs": list(args.reward),
        "args": args,
        "ref_model": args.ref_model,
        "value_model": args.value_model,
        "peft_config": _lora(args),
        "respond": None if args.respond is None else load_function(args.respond, "respond"),
        "tools": load_functions(args.tools, "tools"),
        "environment": None if args.environment is None else load_factory(args.environment, "environment"),
        "judge_funcs": list(args.judge),
    }


def load_prompts(args: TrainArgs) -> tuple[Rows, Rows | None]:
    """Load the prompts to train on and to evaluate on (None: no evaluation).

    Raises:
        ValueError: nothing is left to train on.
    """
    column, required = args.prompt_column, args.environment is None
    rows = prompt_rows(load_data(args, seed=args.seed), column, required=required)
    if args.eval_dataset is not None:
        held_out = load_mixture(args.eval_dataset, args.eval_split or args.split)
        return rows, prompt_rows(held_out, column, required=required)
    if not args.eval_size:
        return rows, None
    if args.eval_size >= len(rows):
        raise ValueError(
            f"eval_size={args.eval_size} leaves nothing of the {len(rows)} prompts to train on: lower eval_size (0: no "
            "evaluation), or name an eval_dataset"
        )
    parts = rows.train_test_split(args.eval_size, seed=args.seed)
    return parts["train"], parts["test"]


def _lora(args: TrainArgs) -> Any:
    if args.lora_rank is None:
        return None
    return lora_config(args.lora_rank, alpha=args.lora_alpha, target_modules=args.lora_target_modules)
