"""Preflight: folder, disk and trackers before the models are loaded; tokenizer, prompts and device after."""

from __future__ import annotations

import netrc
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.data.chat import render_prompt
from rlhf_ppo.data.template_options import template_of_rows
from rlhf_ppo.data.tokenization import tokenize_prompt
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.loading import vocabulary_size
from rlhf_ppo.models.saving import bytes_to_save
from rlhf_ppo.pipeline.doctor.findings import Section
from rlhf_ppo.runtime.logs.progress import model_rows
from rlhf_ppo.runtime.logs.run_directory import is_locked
from rlhf_ppo.training.run import Run

GB = 1e9


def check_folder(section: Section, folder: str) -> None:
    """Check that the run's folder can be written, without writing into it."""
    path = Path(folder)
    above = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not above.is_dir():
        section.stop(f"{above} is a file", "name a folder as output_dir")
    elif not os.access(above, os.W_OK | os.X_OK):
        section.stop(f"{above} cannot be written", "name another output_dir, or change its rights")
    elif is_locked(path):
        section.warn(f"a run is writing into {path} now", "wait for it, or name another output_dir")
    elif (path / "metrics.jsonl").exists():
        section.ok(f"{path} holds an earlier run, which will be kept in previous-<n>/")
    else:
        section.ok(f"{path} can be written")


def check_trackers(section: Section, names: tuple[str, ...]) -> None:
    """Check that no tracker will ask for a log-in while the run waits for it."""
    for name in names:
        if name == "wandb" and not _wandb_knows_who():
            section.warn(
                "wandb has no API key on this machine, so the run would go unreported",
                "`wandb login`, or WANDB_API_KEY; WANDB_MODE=offline to send it later",
            )
        else:
            section.ok(f"tracker {name}")


def _wandb_knows_who() -> bool:
    """Whether W&B finds a key, or needs none."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    file = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(file).authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def check_tokens(section: Section, run: Run, model: ActorCritic) -> None:
    """Check the tokenizer against the model, and say where responses end."""
    config: Any = model.policy.config
    tokenizer, size = run.tokenizer, vocabulary_size(config)
    known = len(tokenizer)
    words = f"{type(tokenizer).__name__}, {known:,} tokens; the model has {size:,}"
    if known > size:
        section.stop(f"{words}: some ids have no embedding", "name the model's own tokenizer, or resize its embeddings")
    else:
        section.ok(words)
    assert run.train_prompts is not None
    rows = run.train_prompts.rows
    template = run.template.of_row(rows[0], rows.names[0])
    chat = not isinstance(rows["prompt"][0], str)
    if not chat and tokenizer.chat_template is not None:
        section.warn(
            "the tokenizer has a chat template, but the prompts are plain text, which a chat model has rarely seen",
            "make the prompts chat messages; leave it if the model is a base model",
        )
    if chat:
        first = render_prompt(tokenizer, rows["prompt"][0], rows.names[0], template)
        section.ok(f"the chat template ends a prompt in {first[-60:]!r}")
    ends = [repr(tokenizer.decode([token])) for token in run.sampling.stop_token_ids]
    strings = [repr(text) for text in run.sampling.stop_strings]
    if ends or strings:
        section.ok(f"responses end at {', '.join([*ends, *strings])}, or after {run.sampling.max_new_tokens} tokens")
    else:
        section.warn(
            f"responses end after {run.sampling.max_new_tokens} tokens alone", "set stop_token_ids or stop_strings"
        )
    twice = tokenizer.bos_token_id
    ids = tokenize_prompt(rows["prompt"][0], tokenizer, "prompt", template)
    if twice is not None and ids[:2] == [twice, twice]:
        section.warn("prompts begin with two start tokens", "remove the start token from the chat template or the data")


def check_lengths(section: Section, run: Run) -> list[int]:
    """Say how long prompts are and whether responses have room; returns lengths in tokens."""
    assert run.train_prompts is not None
    rows = run.train_prompts.rows
    given = zip(rows["prompt"], rows.names, template_of_rows(rows, run.template), strict=True)
    lengths = [len(tokenize_prompt(prompt, run.tokenizer, name, template)) for prompt, name, template in given]
    longest, middle = max(lengths), int(np.median(lengths))
    room = "" if run.room is None else f", room for {run.room:,}"
    section.ok(f"{len(lengths):,} prompts of {min(lengths)} to {longest} tokens, median {middle}{room}")
    texts = [str(prompt) for prompt in rows["prompt"]]
    if (double := len(texts) - len(set(texts))) > 0.1 * len(texts):
        section.warn(f"{double:,} of {len(texts):,} prompts repeat others", "remove the copies, or mean it")
    section.pages.append("tokens of a prompt\n" + histogram(lengths))
    section.facts["prompt_tokens"] = {"shortest": min(lengths), "median": middle, "longest": longest}
    return lengths


def histogram(lengths: list[int], bins: int = 8, width: int = 40) -> str:
    """Draw how many numbers lie in each of a few ranges, as lines of text."""
    low, high = min(lengths), max(lengths)
    step = max(1, -(-(high - low + 1) // bins))
    counts = [0] * ((high - low) // step + 1)
    for length in lengths:
        counts[(length - low) // step] += 1
    label = len(f"{high}-{high}")
    return "\n".join(
        f"{f'{low + i * step}-{low + (i + 1) * step - 1}':>{label}}  "
        f"{'#' * (-(-width * count // max(counts)))} {count}".rstrip()
        for i, count in enumerate(counts)
    )


def check_device(section: Section, run: Run, model: ActorCritic) -> None:
    """Say where the run computes, in which format and with what."""
    rows = model_rows(run.sources["model"] or "object", model, device=run.device, bf16=run.bf16)
    section.ok("; ".join(f"{name} {rows[name]}" for name in ("device", "precision", "threads", "trained")))
    if run.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(run.device)
        held = torch.cuda.memory_reserved(run.device)
        if free + held < 0.9 * total:
            section.warn(
                f"{(total - free - held) / GB:.1f} GB of the GPU's {total / GB:.0f} are taken by other processes",
                "stop them, or choose another GPU with CUDA_VISIBLE_DEVICES",
            )


def check_disk(section: Section, run: Run, model: ActorCritic, args: RLHFConfig) -> None:
    """Compare the disk's free space with the model and the checkpoints that the run will keep."""
    path = Path(args.output_dir)
    above = next(place for place in (path, *path.absolute().parents) if place.exists())
    free, saved = shutil.disk_usage(above).free, bytes_to_save(model, base=run.base)
    trained = sum(p.numel() for p in model.trainable_parameters())
    kept = args.num_rollouts // args.save_every if args.save_every else 0
    kept = min(kept, args.save_total_limit or kept)
    # Weights and AdamW's two moments, in fp32; one more is written before an old one goes.
    needed = saved + (kept + (kept > 0)) * 12 * trained + args.save_rollouts * args.save_rollouts_gb * GB
    words = f"the run needs {needed / GB:.2g} GB of disk ({kept} checkpoints), and {free / GB:.3g} GB are free"
    if needed > free:
        section.stop(words, "set save_total_limit, raise save_every, or name an output_dir on another disk")
    elif needed > 0.5 * free:
        section.warn(words, "set save_total_limit, or raise save_every")
    else:
        section.ok(words)
    section.facts["disk_bytes"] = {"needed": int(needed), "free": free}
