"""Training a reward model: Bradley-Terry on pairs of a chosen and a rejected answer, with its calibration measured."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase, get_scheduler

from rlhf_ppo.config.reward_training import RewardTrainingArgs
from rlhf_ppo.data.chat import with_chat_template
from rlhf_ppo.data.mixtures import load_mixture
from rlhf_ppo.data.preferences import Preference, read_preferences, split_by_prompt
from rlhf_ppo.data.tokenization import encode_text, require_vocabulary
from rlhf_ppo.models.compare import probe_logits, require_saved
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
from rlhf_ppo.models.quantization import round_weights
from rlhf_ppo.models.quiet_libraries import without_library_bars
from rlhf_ppo.pipeline.comparison import wilson
from rlhf_ppo.rewards.reward_model import ONE_STACK, padding_is_harmless, text_scores
from rlhf_ppo.runtime.device import autocast, compute_in_bf16, resolve_device
from rlhf_ppo.runtime.errors import NonFiniteGradientError
from rlhf_ppo.runtime.files import require_space, save_or_rescue
from rlhf_ppo.runtime.package import versions
from rlhf_ppo.runtime.plots import plot_calibration
from rlhf_ppo.runtime.processes import require_one_process, torch_threads
from rlhf_ppo.runtime.progress import ProgressDisplay, model_rows, print_summary
from rlhf_ppo.runtime.run_directory import RunDirectory, run_lock
from rlhf_ppo.runtime.seeding import seed_everything
from rlhf_ppo.training.optimizer import fit_warmup
from rlhf_ppo.training.stability import nonfinite_parameters


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | float = 0.0, centering: float = 0.0
) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) + centering (chosen + rejected)^2, for scores [B] each: [B].

    Sources: Bradley and Terry (1952); the margin: Touvron et al., "Llama 2" (2023); the centering, which fixes the
    constant that the first term leaves open: Eisenstein et al., "Helping or Herding?" (2023).
    """
    return -logsigmoid(chosen - rejected - margin) + centering * (chosen + rejected).square()


def train_reward_model(args: RewardTrainingArgs) -> dict[str, float]:
    """Train, measure on held-out prompts, and save a folder that :class:`rlhf_ppo.RewardModel` opens.

    Returns:
        Held-out accuracy, loss, calibration error and scores, and what was counted.
    Raises:
        ValueError: bad settings, data or model, or another run is writing into ``output_dir``; says which.
        NonFiniteGradientError: a gradient, a score or a weight is not finite; nothing is saved.
        SavedModelError: what was saved is another model than the one that was trained.
    """
    require_one_process()
    run = RunDirectory(args.output_dir, quiet=args.quiet)
    with run_lock(run.path), without_library_bars():
        return _train(args, run)


def _train(args: RewardTrainingArgs, run: RunDirectory) -> dict[str, float]:
    device = resolve_device(args.device)
    bf16 = compute_in_bf16(args.precision, device)
    name = resolve_model(args.model)
    config = find_config(name)
    refuse_encoder_decoder(config, f"model {args.model}", f"start from {ONE_STACK}")
    if adapter_base(name) is not None:
        raise ValueError(f"model {args.model} is an adapter: merge it into its base, and start from the merged folder")
    longest = min(args.max_length, context_length(config) or args.max_length)
    # Both settings are saved with the tokenizer, so that RewardModel cuts a text exactly as it was cut here. The end is
    # kept: answers differ there.
    tokenizer = load_tokenizer(name, model_max_length=longest, truncation_side="left")
    tokenizer = with_chat_template(tokenizer, args.chat_template)
    rows = load_mixture(args.dataset, args.split, weights=args.dataset_weights, seed=args.seed)
    pairs = read_preferences(
        rows,
        tokenizer,
        prompt_column=args.prompt_column,
        chosen_column=args.chosen_column,
        rejected_column=args.rejected_column,
        margin_column=args.margin_column,
    )
    train_pairs, eval_pairs = split_by_prompt(pairs, args.eval_fraction, args.seed)
    vocab_size = vocabulary_size(config)
    train_ids, cut = encode_pairs(train_pairs, tokenizer, vocab_size)
    eval_ids, eval_cut = encode_pairs(eval_pairs, tokenizer, vocab_size)
    if cut + eval_cut:
        warnings.warn(
            f"{cut + eval_cut} of {len(pairs)} pairs have a text longer than {longest} tokens and keep its end only",
            stacklevel=2,
        )
    seed_everything(args.seed)
    model: Any = load_classifier(name, new_head=True)
    model.to(device)
    if args.lora_rank is not None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, task_type="SEQ_CLS"))

    needed = saved_bytes(model, adapted=args.lora_rank is not None)
    require_space(run.path, needed, f"the model that is saved into {run.path}")

    padded = padding_is_harmless(model.eval(), tokenizer, args.model)

    def scores(part: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        """Chosen and rejected scores [B] each, read in one pass."""
        with autocast(bf16, device):
            rows = [ids for side in zip(*part, strict=True) for ids in side]
            both = text_scores(model, tokenizer, rows, padded=padded)
        return both[: len(part)], both[len(part) :]

    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        fused=True,
    )
    steps = args.num_epochs * math.ceil(len(train_ids) / args.batch_size)
    scheduler = get_scheduler("cosine", optimizer, fit_warmup(args.warmup_steps, steps, quiet=args.quiet), steps)
    margins = torch.tensor([pair.margin for pair in train_pairs], device=device)
    shuffle = torch.Generator().manual_seed(args.seed)
    model.train()
    pairs_in_all, done = args.num_epochs * len(train_ids), 0
    with torch_threads(args.num_threads, model):
        print_summary(
            {
                **model_rows(args.model, model, device=device, bf16=bf16),
                "pairs": f"{len(train_ids)} train, {len(eval_ids)} held out",
                "run": f"{steps} optimizer steps of {args.batch_size} pairs",
                "folder": str(run.path),
            },
            quiet=args.quiet,
        )
        with ProgressDisplay("pairs", pairs_in_all, each="step", quiet=args.quiet) as progress:
            progress.phase("update")
            for _ in range(args.num_epochs):
                for batch in torch.randperm(len(train_ids), generator=shuffle).split(args.batch_size):
                    chosen, rejected = scores([train_ids[i] for i in batch.tolist()])
                    loss = bradley_terry_loss(
                        chosen, rejected, margin=margins[batch.to(device)], centering=args.centering
                    ).mean()
                    loss.backward()
                    loss = loss.detach()
                    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    if not torch.isfinite(norm):
                        raise NonFiniteGradientError(
                            f"the gradient is not finite after {done} pairs (loss {float(loss):.3g}), so nothing was "
                            "saved; lower learning_rate, or use --precision fp32"
                        )
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                    done += len(batch)
                    progress.update(done, loss=float(loss), correct=float((chosen > rejected).float().mean()))
            model.eval()
            with torch.no_grad(), progress.aside("evaluating"):
                parts = [scores(eval_ids[i : i + args.batch_size]) for i in range(0, len(eval_ids), args.batch_size)]
    chosen, rejected = (torch.cat(side) for side in zip(*parts, strict=True))
    # A frozen base is not saved, and is loaded again as it was.
    round_weights([p for p in model.parameters() if p.requires_grad], getattr(torch, args.save_dtype))
    broken = nonfinite_parameters(model)
    if broken or not torch.isfinite(chosen - rejected).all():
        raise NonFiniteGradientError(
            f"after all {done} pairs {broken[0] if broken else 'a held-out score'} is not finite "
            f"(save_dtype={args.save_dtype}), so nothing was saved; lower learning_rate"
        )
    bins = calibration(chosen - rejected)
    metrics = {
        **preference_metrics(chosen, rejected),
        "train_pairs": len(train_pairs),
        "eval_pairs": len(eval_pairs),
        "eval_prompts": len({pair.prompt for pair in eval_pairs}),
        "cut_pairs": cut + eval_cut,
    }
    run.start({**dataclasses.asdict(args), "versions": versions("torch", "transformers", "peft")})
    run.write_json("reward_metrics.json", {**metrics, "calibration": bins})
    plot_calibration(bins, run.path / "calibration.png", title=f"{len(eval_pairs)} held-out pairs")
    _save(model, tokenizer, run.path)
    require_saved(run.path, probe_logits(model.float()), load_classifier)
    return metrics


def encode_pairs(
    pairs: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[list[tuple[list[int], list[int]]], int]:
    """Token ids of (chosen, rejected), cut to the tokenizer's model_max_length, and how many pairs were cut.

    Raises:
        ValueError: an id is not below ``vocab_size``; names the row.
    """

    def encode(texts: list[str], limit: int | None = None) -> list[list[int]]:
        return [encode_text(tokenizer, text, ended=True, limit=limit) for text in texts]

    sides = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    whole = [encode(side) for side in sides]
    for pair, chosen, rejected in zip(pairs, *whole, strict=True):
        require_vocabulary(chosen + rejected, vocab_size, pair.where)
    limit = tokenizer.model_max_length
    cut = sum(max(len(a), len(b)) > limit for a, b in zip(*whole, strict=True))
    kept = [encode(side, limit) for side in sides] if cut else whole
    return list(zip(*kept, strict=True)), cut


def preference_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """Accuracy (ties count half), loss, expected calibration error and mean scores of scores [N] each."""
    gap = chosen - rejected
    return {
        "accuracy": float(((gap > 0).float() + 0.5 * (gap == 0).float()).mean()),
        "loss": float(bradley_terry_loss(chosen, rejected).mean()),
        "calibration_error": sum(row["pairs"] * abs(row["predicted"] - row["observed"]) for row in calibration(gap))
        / len(gap),
        "chosen_score": float(chosen.mean()),
        "rejected_score": float(rejected.mean()),
    }


def calibration(gap: Tensor) -> list[dict[str, float]]:
    """How often the answer that the model prefers is the chosen one, by how sure the model says it is.

    A pair has no natural order, so each is asked about the answer with the higher score: predicted is sigmoid(|gap|),
    from 0.5 to 1; observed is the share in which that answer was the chosen one (a tie counts half).

    Args:
        gap: [N] chosen - rejected score.
    Returns:
        One row per bin, from unsure to sure: pairs, mean prediction, observed share and its 95 % interval. The bins
        hold equal numbers of pairs, 25 or more; there are at most 10.
    """
    predicted, order = gap.double().abs().sigmoid().sort()
    right = ((gap > 0).double() + 0.5 * (gap == 0).double())[order]
    bins = min(10, max(1, len(gap) // 25))
    rows: list[dict[str, float]] = []
    for says, was in zip(predicted.tensor_split(bins), right.tensor_split(bins), strict=True):
        low, high = wilson(float(was.mean()), len(was))
        rows.append(
            {
                "pairs": len(was),
                "predicted": float(says.mean()),
                "observed": float(was.mean()),
                "low": low,
                "high": high,
            }
        )
    return rows


def _save(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    config = model.config
    # RewardModel pads by length whatever stands here; other readers need some pad token to score a batch.
    config.get_text_config().pad_token_id = (
        tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )

    def write(new: Path) -> None:
        model.save_pretrained(new)
        config.save_pretrained(new)  # beside an adapter it says that there is one label
        tokenizer.save_pretrained(new)

    save_or_rescue(folder, write, needed=saved_bytes(model, adapted=hasattr(model, "peft_config")))


def reward_command(args: RewardTrainingArgs) -> None:
    """Run the `reward` command."""
    for name, value in train_reward_model(args).items():
        print(f"{name:<18} {value:.4g}")
    print(f"calibration        {args.output_dir}/calibration.png")
    print(f"model              {args.output_dir}")
