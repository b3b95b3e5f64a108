"""Supervised fine-tuning: train a language model on text or on prompts with completions, or make a new one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from itertools import chain, islice, repeat
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_pt_utils import LengthGroupedSampler, get_parameter_names

from rlhf_ppo.config.arguments.sft import SFTArgs
from rlhf_ppo.core import token_logprobs
from rlhf_ppo.data.chat import with_chat_template
from rlhf_ppo.data.examples import IGNORED, Example, collate, encode_examples, hold_out, read_examples
from rlhf_ppo.data.mixtures import load_data
from rlhf_ppo.models.forward.forward_checks import require_decoder
from rlhf_ppo.models.forward.hidden_states import call
from rlhf_ppo.models.loading import (
    context_length,
    load_config,
    load_policy,
    load_tokenizer,
    resolve_model,
    saved_bytes,
    vocabulary_size,
)
from rlhf_ppo.models.quiet_libraries import without_library_bars
from rlhf_ppo.pipeline.labelled.new_model import new_model
from rlhf_ppo.pipeline.labelled.supervised import (
    make_optimizer,
    round_trained,
    save_model,
    supervised_run,
    take_step,
)
from rlhf_ppo.runtime.errors import NonFiniteGradientError
from rlhf_ppo.runtime.files import require_space
from rlhf_ppo.runtime.logs.run_directory import RunDirectory, run_lock
from rlhf_ppo.runtime.logs.trackers import require_installed
from rlhf_ppo.runtime.machine.device import resolve_device
from rlhf_ppo.runtime.processes.group import ALONE, ProcessGroup
from rlhf_ppo.runtime.processes.join import join_for
from rlhf_ppo.runtime.processes.launch import own_gpu
from rlhf_ppo.runtime.processes.voice import first_alone
from rlhf_ppo.runtime.seeding import seed_everything
from rlhf_ppo.training.checkpoints.fingerprints import require_same_data

__all__ = ["Example", "SFTArgs", "encode_examples", "hold_out", "nats_per_token", "sft", "sft_command"]

Row = dict[str, Any]
"""A row of :func:`encode_examples`."""

MAX_GRAD_NORM = 1.0

NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Names of parameters without weight decay, as transformers' Trainer chooses them."""


def sft(args: SFTArgs) -> dict[str, float]:
    """Train, save to ``args.output_dir``, and return the held-out loss (nats per learned token) and perplexity.

    Raises:
        ValueError: bad settings, data or model, or another run is writing into ``output_dir``; says which.
        NonFiniteGradientError: a non-finite loss, gradient or weight; nothing is saved.
        SavedModelError: the saved folder holds another model than the one that was trained.
    """
    require_installed(args.report_to)
    processes = join_for(args)
    args = args if processes.first else dataclasses.replace(args, quiet=True, report_to=())
    run = RunDirectory(args.output_dir, quiet=args.quiet, writes=processes.first)
    folder, device = run.path, own_gpu(resolve_device())
    with run_lock(folder, processes), without_library_bars():
        seed_everything(args.seed)
        config, tokenizer, data = _prepare(args, processes)
        model = _load_model(args, config)
        require_decoder(model)
        needed = saved_bytes(model, adapted=False)
        processes.on_first(lambda: require_space(folder, needed, f"the model that is saved into {folder}"))
        cast(nn.Module, model).to(device)
        metrics = _train(model, data["train"], data["test"], args, processes, run)
        _stop_at(model, cast(int, tokenizer.eos_token_id))
        save_model(model, tokenizer, folder, load_policy, processes)
    return metrics


def _prepare(
    args: SFTArgs, processes: ProcessGroup
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, dict[str, Dataset]]:
    """Load the model's configuration, its tokenizer, and the tokenized rows; every row is checked before the model."""
    rows = load_data(args, seed=args.seed)
    require_same_data(processes, {"dataset": rows})
    if len(rows) < 2:
        raise ValueError(f"{args.dataset} has {len(rows)} row; at least 2 are needed, one of them held out")
    parts = {name: read_examples(part, args) for name, part in hold_out(rows, args).items()}
    if args.model is not None:
        source = resolve_model(args.model)
        config, tokenizer = load_config(source), load_tokenizer(source)
    else:
        texts = [row.prompt + row.completion for row in parts["train"] if isinstance(row.prompt, str)]
        config, tokenizer = new_model(str(args.architecture), texts, args.max_length, processes)
    if not processes.alone and getattr(config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            f"{args.model or args.architecture} has output_router_logits=true in its config: its loss has a term over "
            f"all tokens of a batch, which {processes.size} processes that hold parts of it cannot compute. Set it to "
            "false, or start one process"
        )
    tokenizer = with_chat_template(tokenizer, args.chat_template)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {args.model} names no end-of-text token, which ends every row: give it one")
    longest, size = min(args.max_length, context_length(config) or args.max_length), vocabulary_size(config)
    return config, tokenizer, {n: encode_examples(p, tokenizer, longest, n, vocab_size=size) for n, p in parts.items()}


def _load_model(args: SFTArgs, config: PretrainedConfig) -> PreTrainedModel:
    """Load the model, or initialize a new one of this configuration."""
    if args.model is None:
        return AutoModelForCausalLM.from_config(config)
    return load_policy(resolve_model(args.model))


def _train(
    model: PreTrainedModel,
    train_rows: Dataset,
    held_out: Dataset,
    args: SFTArgs,
    processes: ProcessGroup,
    run: RunDirectory,
) -> dict[str, float]:
    """Train and round the model in place; return its loss and perplexity on the held-out rows."""
    seed_everything(args.seed)  # neither order nor dropout depends on what initialization drew
    steps = math.ceil(args.num_epochs * math.ceil(len(train_rows) / args.batch_size))
    optimizer, scheduler = make_optimizer(_parameter_groups(model, args.weight_decay), args, steps)
    about = {
        "rows": f"{len(train_rows)} train, {len(held_out)} held out",
        "run": f"{steps} optimizer steps of {args.batch_size} rows",
    }
    with supervised_run(model, args, about, steps, run=run, processes=processes, unit="steps") as progress:
        model.train()
        for step, rows in enumerate(islice(_batches(train_rows, args, processes), steps), start=1):
            numbers = take_step(
                model,
                lambda rows=rows: {"loss": _own_loss(model, rows, processes)},
                optimizer,
                scheduler,
                processes=processes,
                max_grad_norm=MAX_GRAD_NORM,
                where=f"step {step}",
            )
            progress.update(step, **numbers)
            rate = float(scheduler.get_last_lr()[0])
            run.log({"progress/optimizer_steps": step, "sft/loss": numbers["loss"], "optim/learning_rate": rate})
        with progress.aside("evaluating"):
            loss = nats_per_token(model, held_out, args.batch_size, processes)
        where = f"after the last step ({steps})"
        if not math.isfinite(loss):
            raise NonFiniteGradientError(
                f"{where}, on the held-out rows: the loss is {loss}, so nothing was saved; lower learning_rate"
            )
        metrics = {"eval/loss_nats_per_token": loss, "eval/perplexity": math.exp(loss) if loss < 700 else math.inf}
        run.log({"progress/optimizer_steps": steps, **metrics})
    round_trained(model, args.save_dtype, where)
    return metrics


def _batches(rows: Dataset, args: SFTArgs, processes: ProcessGroup) -> Iterator[list[Row]]:
    """Yield batches of rows of similar length, epoch after epoch, each in a new random order."""
    # Not from the global generator, from which each process's dropout draws; without dropout the order is the same.
    draws = None if processes.alone else torch.Generator().manual_seed(args.seed)
    order = LengthGroupedSampler(args.batch_size, lengths=rows["length"], generator=draws)
    epoch = DataLoader(cast(Any, rows), args.batch_size, sampler=order, collate_fn=list, generator=draws)
    return chain.from_iterable(repeat(epoch))


def _own_loss(model: PreTrainedModel, rows: Sequence[Row], processes: ProcessGroup) -> Tensor:
    """Compute this process's part of a batch's loss []: its rows' loss times their share of the learned tokens."""
    own = [rows[i] for i in processes.shares([row["length"] for row in rows])[processes.rank]]
    if not own:
        return torch.zeros((), device=model.device)
    learned, all_learned = (sum(x != IGNORED for row in some for x in row["labels"]) for some in (own, rows))
    return _forward(model, collate(own)).loss * (learned / all_learned)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Separate the parameters with weight decay from biases and norms, which have none."""
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NOT_DECAYED))
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]


def _forward(model: PreTrainedModel, batch: dict[str, Tensor]) -> Any:
    """Run the model on a batch of :func:`collate`; with labels in it, its own loss is in the output, too."""
    on_device = {name: x.to(model.device) for name, x in batch.items()}
    return call(model, on_device.pop("input_ids"), attention=on_device.pop("attention_mask"), **on_device)


@torch.no_grad()
def nats_per_token(model: PreTrainedModel, rows: Dataset, batch_size: int, processes: ProcessGroup = ALONE) -> float:
    """Compute the mean negative log-likelihood of all learned tokens, whatever the batches.

    It comes from the logits, because the model's own loss may hold more, such as a mixture of experts' router loss.

    Args:
        model: is left in evaluation mode.
        rows: of :func:`encode_examples`.
        batch_size: rows in one forward pass.
        processes: those that share the rows.
    """
    model.eval()
    own = processes.shares(rows["length"])[processes.rank]

    def add_up() -> tuple[float, int]:
        total, count = 0.0, 0
        for start in range(0, len(own), batch_size):
            batch = collate([dict(rows[i]) for i in own[start : start + batch_size]])
            labels = batch.pop("labels").to(model.device)[:, 1:]
            learned = labels != IGNORED
            logits = _forward(model, batch).logits[:, :-1]
            total -= float(token_logprobs(logits[learned], labels[learned]).double().sum())
            count += int(learned.sum())
        return total, count

    totals, counts = zip(*processes.facts(add_up), strict=True)
    return sum(totals) / sum(counts)


def _stop_at(model: PreTrainedModel, end: int) -> None:
    """Name the end-of-text token in the generation config, which says where responses end."""
    if model.generation_config is None:
        model.generation_config = GenerationConfig()
    named = model.generation_config.eos_token_id
    others = [named] if isinstance(named, int) else list(named or [])
    if end not in others:
        model.generation_config.eos_token_id = [end, *others] if others else end


def sft_command(args: SFTArgs) -> None:
    """Run the `sft` command."""
    metrics = sft(args)
    with first_alone():
        for name, value in metrics.items():
            print(f"{name}  {value:.4g}")
        print(f"model    {args.output_dir}")
