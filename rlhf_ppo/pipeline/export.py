"""Export: make a checkpoint, however many processes wrote it, a folder that transformers loads; no GPU is needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_ppo.config.commands import ExportArgs
from rlhf_ppo.core import ValueScale
from rlhf_ppo.data.chat import with_chat_template
from rlhf_ppo.models.actor_critic import ActorCritic, build_actor_critic
from rlhf_ppo.models.adapters.policy_adapter import prepare_policy
from rlhf_ppo.models.compare import OBJECT
from rlhf_ppo.models.loading import load_policy, load_tokenizer, resolve_model
from rlhf_ppo.models.saving import save_actor_critic
from rlhf_ppo.pipeline.rebuild import adapter_config, build_policy, build_trunk, restore_weights
from rlhf_ppo.runtime.checkpoints.checkpoint import Checkpoint, checkpoint_step
from rlhf_ppo.runtime.checkpoints.resume import find_checkpoint
from rlhf_ppo.runtime.threads import torch_threads


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
    facts = checkpoint.state.get("models")
    if facts is None:
        raise ValueError(
            f"{checkpoint.folder} does not say what its model is, because an earlier version wrote it: resume the run, "
            "which saves the model at its end"
        )
    name = resolve_model(model or (facts["model"] if facts["model"] != OBJECT else facts["base"]))
    tokenizer = _find_tokenizer(checkpoint, name)
    actor_critic = _rebuild(checkpoint, facts, name)
    base = facts["base"] if model is None else model
    save_actor_critic(actor_critic, tokenizer, Path(folder), base=base, merged=merge_adapter)
    return checkpoint


def _rebuild(checkpoint: Checkpoint, facts: Mapping[str, Any], name: str | None) -> ActorCritic:
    policy: Any
    if facts["adapter"] is None:
        policy = build_policy(facts)
    elif name is None:
        raise ValueError(
            f"{checkpoint.folder} holds an adapter alone, and the model under it was an object: say where that is with "
            "--model"
        )
    else:
        policy = prepare_policy(load_policy(name), adapter_config(facts["adapter"])).policy
    trunk = build_trunk(facts, checkpoint.settings.get("critic_frozen", "none"))
    model = build_actor_critic(policy, facts["critic"], trunk=trunk, head=None, head_from=None)
    restore_weights(model, checkpoint.tensors["trainable"], f"the weights in {checkpoint.folder}")
    scale = checkpoint.state.get("value_scale", {})
    model.value_scale = None if scale is None else ValueScale(**scale)
    return model


def _find_tokenizer(checkpoint: Checkpoint, name: str | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the run saved beside its checkpoints, or that of the model it started from."""
    run = checkpoint.folder.parent if checkpoint_step(checkpoint.folder) is not None else checkpoint.folder
    source = str(run) if (run / "tokenizer_config.json").is_file() else name
    if source is None:
        raise ValueError(
            f"neither {run} nor the checkpoint's model, which was an object, names a tokenizer: say where the model "
            "and its tokenizer are with --model"
        )
    return with_chat_template(load_tokenizer(source), checkpoint.settings.get("chat_template"))
