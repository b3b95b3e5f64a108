"""Rebuild policy and critic from a checkpoint's or black box's model facts and weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ppo.core import ValueScale
from rlhf_ppo.data.chat import with_chat_template
from rlhf_ppo.models.acceleration.named_kernels import is_flash
from rlhf_ppo.models.actor_critic import ActorCritic, build_actor_critic
from rlhf_ppo.models.adapters.lora import with_current_names
from rlhf_ppo.models.adapters.policy_adapter import prepare_policy
from rlhf_ppo.models.compare import OBJECT
from rlhf_ppo.models.frozen_critic import FrozenParts, freeze_critic
from rlhf_ppo.models.loading import load_policy, load_tokenizer, resolve_model
from rlhf_ppo.runtime.checkpoints.checkpoint import Checkpoint


def build_policy(models: Mapping[str, Any]) -> PreTrainedModel:
    """Build a policy that is trained whole, with random weights."""
    policy: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**models["policy_config"]),
        dtype=torch.float32,
        # Flash attention runs on some GPUs alone.
        attn_implementation=None if is_flash(models["attention"]) else models["attention"],
        trust_remote_code=False,
    )
    return policy.requires_grad_(True)


def build_trunk(models: Mapping[str, Any], frozen: FrozenParts) -> PreTrainedModel | None:
    """Build the trunk of a separate critic, with random weights; None: the critic has none."""
    if models["critic_config"] is None:
        return None
    config = AutoConfig.for_model(**models["critic_config"])
    trunk: Any = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False).requires_grad_(True)
    freeze_critic(trunk, frozen)
    return trunk


def adapter_config(facts: Mapping[str, Any]) -> Any:
    """Return an adapter's configuration from the facts about it."""
    from peft import PeftConfig

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "adapter_config.json").write_text(json.dumps(facts), encoding="utf-8")
        return PeftConfig.from_pretrained(folder)


def restore_weights(model: ActorCritic, weights: Mapping[str, Tensor], where: str) -> None:
    """Copy weights into the model, one after the other.

    Raises:
        ValueError: their names or shapes differ from the model's; begins with ``where`` they are from.
    """
    parameters = model.saved_parameters()
    sources = with_current_names({name: name for name in weights}, parameters)
    different = sorted(set(parameters) ^ set(sources))[:3]
    with torch.no_grad():
        for name, parameter in parameters.items() if not different else ():
            weight = weights[sources[name]]
            if weight.shape != parameter.shape:
                different = [name]
                break
            parameter.copy_(weight)
    if different:
        raise ValueError(f"{where} are not this model's ({different} differ): name its base with --model")


def model_facts_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint says of its models.

    Raises:
        ValueError: it says nothing.
    """
    if (facts := checkpoint.state.get("models")) is None:
        raise ValueError(
            f"{checkpoint.folder} does not say what its model is, because an earlier version wrote it: resume the run, "
            "which saves the model at its end"
        )
    return facts


def source_of(facts: Mapping[str, Any], model: str | None) -> str | None:
    """Return where the policy's base and tokenizer are: ``model`` if given, else where they were; None: unknown."""
    return resolve_model(model or (facts["model"] if facts["model"] != OBJECT else facts["base"]))


def rebuild_actor_critic(checkpoint: Checkpoint, name: str | None) -> ActorCritic:
    """Build policy and critic with the weights of a checkpoint; ``name``: where an adapter's base is.

    Raises:
        ValueError: the base of an adapter is unknown, or is another model.
    """
    facts = model_facts_of(checkpoint)
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


def find_tokenizer(run: Path, name: str | None, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a run saved in its folder, or that of the model that it started from (``name``).

    Raises:
        ValueError: neither is there.
    """
    source = str(run) if (run / "tokenizer_config.json").is_file() else name
    if source is None:
        raise ValueError(
            f"neither {run} nor the run's model, which was an object, names a tokenizer: say where the model and its "
            "tokenizer are with --model"
        )
    return with_chat_template(load_tokenizer(source), chat_template)
