"""Training: what `rlhf-ppo train` does around a PPOTrainer."""

from __future__ import annotations

from typing import Any

from rlhf_ppo.config.train import TrainArgs
from rlhf_ppo.data.mixtures import load_data, load_mixture
from rlhf_ppo.data.rows import Rows, prompt_rows
from rlhf_ppo.models.lora import lora_config
from rlhf_ppo.pipeline.before_after import print_before_after
from rlhf_ppo.pipeline.demo import print_paths
from rlhf_ppo.runtime.user_code import load_function
from rlhf_ppo.trainer import PPOTrainer


def train(args: TrainArgs) -> None:
    """Run the `train` command."""
    train_rows = prompt_rows(load_data(args, seed=args.seed), args.prompt_column)
    eval_rows: Rows | None = None
    if args.eval_dataset is not None:
        eval_rows = prompt_rows(load_mixture(args.eval_dataset, args.eval_split or args.split), args.prompt_column)
    elif args.eval_size:
        if args.eval_size >= len(train_rows):
            raise ValueError(
                f"eval_size={args.eval_size} leaves nothing of the {len(train_rows)} prompts to train on: lower "
                "eval_size (0: no evaluation), or name an eval_dataset"
            )
        parts = train_rows.train_test_split(args.eval_size, seed=args.seed)
        train_rows, eval_rows = parts["train"], parts["test"]
    trainer = PPOTrainer(
        model=args.model,
        reward_funcs=list(args.reward),
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        ref_model=args.ref_model,
        value_model=args.value_model,
        peft_config=_lora(args),
        respond=None if args.respond is None else load_function(args.respond, "respond"),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint, resume_override=args.resume_override)
    merged = trainer.save_model(trainer.run.path / "merged", merge_adapter=True) if args.merge_adapter else None
    if eval_rows is not None:
        print_before_after(trainer.run)
    if merged is not None:
        print(f"merged   {merged}")
    print_paths(trainer.run.path)


def _lora(args: TrainArgs) -> Any:
    if args.lora_rank is None:
        return None
    return lora_config(args.lora_rank, alpha=args.lora_alpha, target_modules=args.lora_target_modules)
