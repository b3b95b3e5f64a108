"""The `rlhf-ppo` command: demo, train, sft, reward and the rest, each from the dataclass that its code reads."""

from __future__ import annotations

import shlex
import sys
import traceback
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core.validation import is_changed
from rlhf_ppo.data.mixtures import load_mixture, require_weights
from rlhf_ppo.data.rows import Rows, prompt_rows
from rlhf_ppo.generation.multi_turn import RespondError
from rlhf_ppo.models.compare import SavedModelError
from rlhf_ppo.models.lora import lora_config
from rlhf_ppo.models.quiet_libraries import quiet_libraries
from rlhf_ppo.pipeline.before_after import print_before_after
from rlhf_ppo.pipeline.chat_session import chat
from rlhf_ppo.pipeline.demo import DemoArgs, demo, print_paths
from rlhf_ppo.pipeline.evaluate import EvaluateArgs, evaluate, print_evaluation
from rlhf_ppo.pipeline.generate import GenerateArgs, generate
from rlhf_ppo.pipeline.replay import ReplayArgs, print_replay
from rlhf_ppo.pipeline.reward_training import RewardTrainingArgs, train_reward_model
from rlhf_ppo.pipeline.sft import SFTArgs, sft
from rlhf_ppo.rewards.validation import RewardError
from rlhf_ppo.runtime.advice import AdviseArgs, print_advice
from rlhf_ppo.runtime.errors import NonFiniteGradientError
from rlhf_ppo.runtime.resume import CheckArgs, check
from rlhf_ppo.runtime.settings import Command, run_command
from rlhf_ppo.runtime.signals import Interrupted
from rlhf_ppo.runtime.user_code import load_function
from rlhf_ppo.trainer import PPOTrainer, RatioTripwireError
from rlhf_ppo.training.stability import PolicyDriftError
from rlhf_ppo.trl.migrate import MigrateArgs, join_command_line, migrate


@dataclass(frozen=True, kw_only=True)
class TrainArgs(RLHFConfig):
    """Fine-tune a language model from a reward with PPO."""

    model: str
    """The policy: a hub id or folder, or "embedded" (the small GPT-2 in the package)."""
    reward: tuple[str, ...]
    """One or more rewards: file.py:function, module:function, a sequence-classification model's folder or hub id, or a
    reward server's http(s) address (its token comes from the environment: RLHF_PPO_REWARD_TOKEN)."""
    dataset: tuple[str, ...]
    """Prompts: one or more hub ids, folders, or csv, jsonl or parquet files (also .gz)."""
    dataset_weights: tuple[float, ...] | None = None
    """Share of each data set in the mixture; None: all rows of all of them."""
    split: str = "train"
    """Split of the data set."""
    prompt_column: str = "prompt"
    """Column with the prompts; the other columns reach the reward functions."""
    eval_dataset: str | None = None
    """Held-out prompts of the same form; None: eval_size rows of the data set are set aside."""
    eval_split: str | None = None
    """Split of eval_dataset; None: split."""
    eval_size: int = 64
    """Rows set aside for the evaluation before and after training when there is no eval_dataset; 0: no evaluation."""
    respond: str | None = None
    """What answers the policy's turns where max_turns is above 1: file.py:function or module:function."""
    ref_model: str | None = None
    """Reference for the KL; None: the policy as it starts."""
    value_model: str | None = None
    """Trunk of a separate critic; None: a value head on the policy's own trunk."""
    lora_rank: int | None = None
    """Train a LoRA adapter of this rank instead of all weights."""
    lora_alpha: int | None = None
    """With lora_rank: what the adapter adds is scaled by this over the rank. None: twice the rank."""
    lora_target_modules: tuple[str, ...] | None = None
    """With lora_rank: names of the layers that get the adapter, or "all-linear" (all but the output layer). None: the
    ones that PEFT chooses for the architecture."""
    merge_adapter: bool = False
    """With lora_rank: also save the merged model, in the run's folder merged/."""

    resume_from_checkpoint: Annotated[str | None, tyro.conf.arg(aliases=("--resume",))] = None
    """Go on with the same command's earlier run (made with save_every): its folder checkpoint-<n>, or the run's folder
    for its newest good one. "auto": the newest good one in output_dir, or a fresh start if there is none at all."""
    resume_override: bool = False
    """Go on although settings or data differ from those of the checkpoint (the error shows how)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weights(self.dataset, self.dataset_weights)
        self._require_at_least(0, "eval_size")
        if self.eval_dataset is None and self.eval_split is not None:
            raise ValueError(f"eval_split={self.eval_split!r} is a split of eval_dataset, which is not given: name it")
        if self.eval_dataset is not None and is_changed(self, "eval_size"):
            raise ValueError(
                f"eval_size={self.eval_size} sets rows of dataset aside, but the evaluation reads eval_dataset="
                f"{self.eval_dataset!r}: drop one of them"
            )
        if self.resume_override and self.resume_from_checkpoint is None:
            raise ValueError("resume_override=True is about a checkpoint to go on from: set resume_from_checkpoint")
        self._require_at_least(1, "lora_rank", "lora_alpha")
        for name in ("lora_alpha", "lora_target_modules"):
            if getattr(self, name) is not None and self.lora_rank is None:
                raise ValueError(f"{name}={getattr(self, name)!r} is about a LoRA adapter: set lora_rank")
        if self.merge_adapter and self.lora_rank is None:
            raise ValueError("merge_adapter=True needs an adapter to merge: set lora_rank, or drop merge_adapter")


def train(args: TrainArgs) -> None:
    """The `train` command."""
    mixture = load_mixture(args.dataset, args.split, weights=args.dataset_weights, seed=args.seed)
    train_rows = prompt_rows(mixture, args.prompt_column)
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


def _sft(args: SFTArgs) -> None:
    for name, value in sft(args).items():
        print(f"{name}  {value:.4g}")
    print(f"model    {args.output_dir}")


def _reward(args: RewardTrainingArgs) -> None:
    for name, value in train_reward_model(args).items():
        print(f"{name:<18} {value:.4g}")
    print(f"calibration        {args.output_dir}/calibration.png")
    print(f"model              {args.output_dir}")


def _evaluate(args: EvaluateArgs) -> None:
    print_evaluation(evaluate(args))
    print(f"figures  {args.output_dir}/evaluation.json")
    print(f"samples  {args.output_dir}/evaluation_samples.jsonl")


def _generate(args: GenerateArgs) -> None:
    if args.chat:
        chat(args)
        return
    pairs = generate(args)
    if args.output is not None:
        print(f"{len(pairs)} completions  {args.output}")
        return
    for prompt, completion in pairs:
        print(f"{prompt}|{completion}\n")


def _migrate(args: MigrateArgs) -> None:
    text = migrate(args, TrainArgs)
    print(text if args.output is None else f"settings  {args.output}", end="" if args.output is None else "\n")


COMMANDS: dict[str, Command] = {
    "demo": (DemoArgs, demo),
    "train": (TrainArgs, train),
    "sft": (SFTArgs, _sft),
    "reward": (RewardTrainingArgs, _reward),
    "evaluate": (EvaluateArgs, _evaluate),
    "generate": (GenerateArgs, _generate),
    "migrate": (MigrateArgs, _migrate),
    "replay": (ReplayArgs, print_replay),
    "check": (CheckArgs, check),
    "advise": (AdviseArgs, print_advice),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0, 1 for a failed run, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM.
    """
    words = join_command_line(sys.argv[1:] if argv is None else argv)
    try:
        with quiet_libraries():
            return run_command("rlhf-ppo", COMMANDS, words)
    except Interrupted as stop:
        # Without a checkpoint (a full disk) a warning has said what there is.
        print(stop if stop.saved is None else f"{stop}. {_how_to_go_on(words, stop)}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (
        *(RewardError, RespondError, RatioTripwireError, NonFiniteGradientError, PolicyDriftError, SavedModelError),
        OSError,  # a full disk
    ) as error:
        # The user's own code failed there; what was merely a bad answer, or a full disk, is in the message.
        if error.__cause__ is not None and not isinstance(error, OSError):
            traceback.print_exception(error.__cause__)
        print(f"error: {error}", file=sys.stderr)
        return 1


def _how_to_go_on(words: list[str], stop: Interrupted) -> str:
    if words[0] != "train":
        return "Go on from Python: PPOTrainer(...).train(resume_from_checkpoint=...)"
    flag = "--resume-from-checkpoint"
    # The command may itself have gone on from somewhere: that flag and its value go.
    earlier = [word.partition("=")[0].replace("_", "-") in (flag, "--resume") for word in words]
    values = [old and "=" not in word for old, word in zip(earlier, words, strict=True)]
    kept = [word for word, old, value in zip(words, earlier, [False, *values], strict=False) if not old and not value]
    return f"Go on with: {shlex.join(['rlhf-ppo', *kept, flag, str(stop.saved)])}"


if __name__ == "__main__":
    sys.exit(main())
