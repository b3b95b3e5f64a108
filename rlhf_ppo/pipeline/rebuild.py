"""Rebuild policy and critic from a checkpoint's or black box's model facts and weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from rlhf_ppo.models.acceleration.named_kernels import is_flash
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.adapters.lora import with_current_names
from rlhf_ppo.models.frozen_critic import FrozenParts, freeze_critic


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
