"""Export: make a checkpoint, however many processes wrote it, a folder that transformers loads; no GPU is needed."""

from __future__ import annotations

from pathlib import Path

from rlhf_ppo.config.arguments.commands import ExportArgs
from rlhf_ppo.models.saving import save_actor_critic
from rlhf_ppo.pipeline.rebuild import find_tokenizer, model_facts_of, rebuild_actor_critic, source_of
from rlhf_ppo.runtime.checkpoints.checkpoint import Checkpoint, checkpoint_step
from rlhf_ppo.runtime.checkpoints.resume import find_checkpoint
from rlhf_ppo.runtime.machine.threads import torch_threads


def export_command(args: ExportArgs) -> int:
    """Run the `export` command."""
    with torch_threads(None):
        checkpoint = export(args.checkpoint, args.folder, model=args.model, merge_adapter=args.merge_adapter)
    print(f"{checkpoint.folder} is now a model in {args.folder}")
    return 0


def export(source: str, folder: str, *, model: str | None = None, merge_adapter: bool = False) -> Checkpoint:
    """Save the policy of a checkpoint, with its value head and tokenizer, as the run would save it at its end.

    Args:
        source: a checkpoint's folder, or a run's for its newest good one.
        folder: where the model goes; files of the same names in it are replaced.
        model: where the policy's base and tokenizer are; None: where they were in the run.
        merge_adapter: save the whole model with the adapter merged in, instead of the adapter alone.
    Returns:
        The checkpoint.
    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged, or does not say what its model is or where the base or the tokenizer is.
    """
    checkpoint = find_checkpoint(source, None)
    assert checkpoint is not None  # find_checkpoint returns None for "auto" alone
    facts = model_facts_of(checkpoint)
    name = source_of(facts, model)
    run = checkpoint.folder.parent if checkpoint_step(checkpoint.folder) is not None else checkpoint.folder
    tokenizer = find_tokenizer(run, name, checkpoint.settings.get("chat_template"))
    actor_critic = rebuild_actor_critic(checkpoint, name)
    base = facts["base"] if model is None else model
    save_actor_critic(actor_critic, tokenizer, Path(folder), base=base, merged=merge_adapter)
    return checkpoint
