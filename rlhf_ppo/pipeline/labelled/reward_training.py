"""Train a reward model: Bradley-Terry on pairs of a chosen and a rejected answer, with its calibration measured."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.config.arguments.reward_training import RewardTrainingArgs
from rlhf_ppo.data.chat import with_chat_template
from rlhf_ppo.data.mixtures import load_data
from rlhf_ppo.data.preferences import PairIds, Preference, encode_pairs, read_preferences, split_by_prompt
from rlhf_ppo.data.rows import Rows
from rlhf_ppo.data.template_options import TemplateDefaults
from rlhf_ppo.models.acceleration.working_copy import computing
from rlhf_ppo.models.loading import (
    adapter_base,
    context_length,
    find_config,
    load_classifier,
    load_tokenizer,
    refuse_encoder_decoder,
    resolve_model,
    saved_bytes,
    vocabulary_size,
)
from rlhf_ppo.models.quiet_libraries import without_library_bars
from rlhf_ppo.pipeline.evaluation.intervals import calibration
from rlhf_ppo.pipeline.labelled.bradley_terry import bradley_terry_loss, preference_metrics
from rlhf_ppo.pipeline.labelled.supervised import make_optimizer, round_trained, save_model, supervised_run, take_step
from rlhf_ppo.rewards.reward_model import ONE_STACK, padding_is_harmless, text_scores
from rlhf_ppo.runtime.errors import NonFiniteGradientError
from rlhf_ppo.runtime.files import require_space
from rlhf_ppo.runtime.logs.run_directory import RunDirectory, run_lock
from rlhf_ppo.runtime.logs.trackers import require_installed
from rlhf_ppo.runtime.machine.device import compute_in_bf16, resolve_device
from rlhf_ppo.runtime.plots import plot_calibration
from rlhf_ppo.runtime.processes.group import ProcessGroup
from rlhf_ppo.runtime.processes.join import join_for
from rlhf_ppo.runtime.processes.launch import own_gpu
from rlhf_ppo.runtime.processes.voice import first_alone
from rlhf_ppo.runtime.seeding import seed_everything
from rlhf_ppo.training.checkpoints.fingerprints import require_same_data

Scorer = Callable[[Sequence[PairIds]], tuple[Tensor, Tensor]]
"""Scores pairs in one forward pass: chosen and rejected scores [B] each."""


class Pairs(NamedTuple):
    """The comparisons, split by prompt and tokenized."""

    train: list[Preference]
    held_out: list[Preference]
    train_ids: list[PairIds]
    held_out_ids: list[PairIds]
    cut: int
    """Number of pairs with a text that was truncated."""


def train_reward_model(args: RewardTrainingArgs) -> dict[str, float]:
    """Train, measure on held-out prompts, and save a folder that :class:`rlhf_ppo.RewardModel` opens.

    Returns:
        Held-out accuracy, loss, calibration error and scores, and the numbers of pairs.
    Raises:
        ValueError: bad settings, data or model, or another run is writing into ``output_dir``; says which.
        NonFiniteGradientError: a non-finite loss, gradient, score or weight; nothing is saved.
        SavedModelError: the saved folder holds another model than the one that was trained.
    """
    require_installed(args.report_to)
    processes = join_for(args)
    args = args if processes.first else dataclasses.replace(args, quiet=True, report_to=())
    run = RunDirectory(args.output_dir, quiet=args.quiet, writes=processes.first)
    device = own_gpu(resolve_device(args.device))
    with run_lock(run.path, processes), without_library_bars():
        bf16 = compute_in_bf16(args.precision, device)
        source = resolve_model(args.model)
        tokenizer = _load_tokenizer(args, source)
        rows = load_data(args, seed=args.seed)
        require_same_data(processes, {"dataset": rows})
        pairs = _load_pairs(args, rows, tokenizer, vocabulary_size(find_config(source)))
        model = _load_model(args, source).to(device)
        needed = saved_bytes(model, adapted=args.lora_rank is not None)
        processes.on_first(lambda: require_space(run.path, needed, f"the model that is saved into {run.path}"))
        chosen, rejected = _train(model, tokenizer, pairs, args, processes, run, bf16=bf16)
        metrics = {
            **preference_metrics(chosen, rejected),
            "train_pairs": len(pairs.train),
            "eval_pairs": len(pairs.held_out),
            "eval_prompts": len({pair.prompt for pair in pairs.held_out}),
            "cut_pairs": pairs.cut,
        }
        processes.on_first(lambda: _write_report(run, metrics, chosen - rejected))
        # RewardModel pads by length whatever stands here; other readers need some pad token to score a batch.
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        model.config.get_text_config().pad_token_id = pad
        save_model(model, tokenizer, run.path, load_classifier, processes)
    return metrics


def _write_report(run: RunDirectory, metrics: dict[str, float], gaps: Tensor) -> None:
    """Write metrics and calibration; ``gaps`` [N] are chosen minus rejected scores."""
    bins = calibration(gaps)
    run.write_json("reward_metrics.json", {**metrics, "calibration": bins})
    plot_calibration(bins, run.path / "calibration.png", title=f"{len(gaps)} held-out pairs")


def _load_tokenizer(args: RewardTrainingArgs, source: str) -> PreTrainedTokenizerBase:
    """Check the model's configuration, and load its tokenizer.

    It truncates texts on the left, because answers differ at their end. That and the maximum length are saved with it,
    so that RewardModel truncates a text exactly as training did.
    """
    config = find_config(source)
    refuse_encoder_decoder(config, f"model {args.model}", f"start from {ONE_STACK}")
    if adapter_base(source) is not None:
        raise ValueError(f"model {args.model} is an adapter: merge it into its base, and start from the merged folder")
    longest = min(args.max_length, context_length(config) or args.max_length)
    tokenizer = load_tokenizer(source, model_max_length=longest, truncation_side="left")
    return with_chat_template(tokenizer, args.chat_template)


def _load_pairs(args: RewardTrainingArgs, rows: Rows, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Pairs:
    """Read the comparisons, split them by prompt, and tokenize them."""
    pairs = read_preferences(
        rows,
        tokenizer,
        prompt_column=args.prompt_column,
        chosen_column=args.chosen_column,
        rejected_column=args.rejected_column,
        margin_column=args.margin_column,
        template=TemplateDefaults(args.chat_template_kwargs),
    )
    train, held_out = split_by_prompt(pairs, args.eval_fraction, args.seed)
    train_ids, train_cut = encode_pairs(train, tokenizer, vocab_size)
    held_out_ids, held_out_cut = encode_pairs(held_out, tokenizer, vocab_size)
    if cut := train_cut + held_out_cut:
        warnings.warn(
            f"{cut} of {len(pairs)} pairs have a text longer than {tokenizer.model_max_length} tokens and keep its "
            "end only",
            stacklevel=3,
        )
    return Pairs(train, held_out, train_ids, held_out_ids, cut)


def _load_model(args: RewardTrainingArgs, source: str) -> Any:
    """Load the model with a new score head, and wrap it in a LoRA adapter if ``lora_rank`` is set."""
    seed_everything(args.seed)
    model: Any = load_classifier(source, new_head=True)
    if args.lora_rank is None:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, task_type="SEQ_CLS"))


def _train(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    args: RewardTrainingArgs,
    processes: ProcessGroup,
    run: RunDirectory,
    *,
    bf16: bool,
) -> tuple[Tensor, Tensor]:
    """Train and round the model in place; return its chosen and rejected scores [N] of the held-out pairs."""
    scores = _scorer(model.eval(), tokenizer, args.model, bf16=bf16)
    steps = args.num_epochs * math.ceil(len(pairs.train) / args.batch_size)
    optimizer, scheduler = make_optimizer([p for p in model.parameters() if p.requires_grad], args, steps)
    margins = torch.tensor([pair.margin for pair in pairs.train], device=model.device)
    about = {
        "pairs": f"{len(pairs.train)} train, {len(pairs.held_out)} held out",
        "run": f"{steps} optimizer steps of {args.batch_size} pairs",
    }
    total, done = args.num_epochs * len(pairs.train), 0
    with supervised_run(model, args, about, total, run=run, processes=processes, unit="pairs", bf16=bf16) as progress:
        model.train()
        for step, batch in enumerate(_batches(len(pairs.train), args), start=1):
            numbers = take_step(
                model,
                partial(_own_losses, scores, pairs.train_ids, margins, batch.tolist(), args, processes),
                optimizer,
                scheduler,
                processes=processes,
                max_grad_norm=args.max_grad_norm,
                where=f"after {done} pairs",
                bf16=bf16,
            )
            done += len(batch)
            progress.update(done, **numbers)
            run.log(_step_metrics(step, numbers, scheduler))
        with progress.aside("evaluating"):
            chosen, rejected = _held_out_scores(model, scores, pairs.held_out_ids, args.batch_size, processes)
        finite = bool(torch.isfinite(chosen - rejected).all())
        measured = preference_metrics(chosen, rejected) if finite else {}
        run.log({"progress/optimizer_steps": steps, **{f"eval/{name}": x for name, x in measured.items()}})
    round_trained(model, args.save_dtype, f"after all {done} pairs")
    if not finite:
        raise NonFiniteGradientError(
            f"after all {done} pairs a held-out score is non-finite, so nothing was saved; lower learning_rate"
        )
    return chosen, rejected


def _step_metrics(step: int, numbers: dict[str, float], scheduler: LRScheduler) -> dict[str, float]:
    return {
        "progress/optimizer_steps": step,
        "preference/loss": numbers["loss"],
        "preference/accuracy": numbers["correct"],
        "optim/learning_rate": float(scheduler.get_last_lr()[0]),
    }


def _own_losses(
    scores: Scorer,
    ids: Sequence[PairIds],
    margins: Tensor,
    batch: Sequence[int],
    args: RewardTrainingArgs,
    processes: ProcessGroup,
) -> dict[str, Tensor]:
    """Compute this process's part of a batch's mean ``loss`` [], and of the share that is ``correct`` []."""
    own = [batch[i] for i in _shares([ids[pair] for pair in batch], processes)[processes.rank]]
    if not own:
        return {name: torch.zeros((), device=margins.device) for name in ("loss", "correct")}
    chosen, rejected = scores([ids[pair] for pair in own])
    loss = bradley_terry_loss(chosen, rejected, margin=margins[own], centering=args.centering)
    return {"loss": loss.sum() / len(batch), "correct": (chosen > rejected).float().sum() / len(batch)}


def _shares(ids: Sequence[PairIds], processes: ProcessGroup) -> list[list[int]]:
    """Divide pairs among the processes by their tokens."""
    return processes.shares([len(chosen) + len(rejected) for chosen, rejected in ids])


def _scorer(model: Any, tokenizer: PreTrainedTokenizerBase, name: str, *, bf16: bool) -> Scorer:
    """Make a function that scores pairs in one forward pass: chosen and rejected scores [B] each."""
    padded = padding_is_harmless(model, tokenizer, name)

    def scores(part: Sequence[PairIds]) -> tuple[Tensor, Tensor]:
        rows = [ids for side in zip(*part, strict=True) for ids in side]
        with computing(model, bf16=bf16):
            both = text_scores(model, tokenizer, rows, padded=padded)
        return both[: len(part)], both[len(part) :]

    return scores


def _batches(count: int, args: RewardTrainingArgs) -> Iterator[Tensor]:
    """Yield the batches' pair numbers, in a new random order each epoch."""
    shuffle = torch.Generator().manual_seed(args.seed)
    for _ in range(args.num_epochs):
        yield from torch.randperm(count, generator=shuffle).split(args.batch_size)


@torch.no_grad()
def _held_out_scores(
    model: Any, scores: Scorer, ids: list[PairIds], batch_size: int, processes: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Score the held-out pairs: chosen and rejected scores [N] each, process after process."""
    model.eval()
    own = [ids[pair] for pair in _shares(ids, processes)[processes.rank]]

    def score_own() -> tuple[dict[str, Tensor], None]:
        parts = [torch.stack(scores(own[i : i + batch_size])) for i in range(0, len(own), batch_size)]
        return {"scores": torch.cat(parts, dim=1)} if parts else {}, None

    parts = [part.tensors["scores"].to(model.device) for part in processes.exchange(score_own) if part.tensors]
    chosen, rejected = torch.cat(parts, dim=1)
    return chosen, rejected


def reward_command(args: RewardTrainingArgs) -> None:
    """Run the `reward` command."""
    metrics = train_reward_model(args)
    with first_alone():
        for name, value in metrics.items():
            print(f"{name:<18} {value:.4g}")
        print(f"calibration        {args.output_dir}/calibration.png")
        print(f"model              {args.output_dir}")
