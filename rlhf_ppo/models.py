"""Models: loading policies, critics' trunks and tokenizers, and what their configs say."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation

EMBEDDED_MODEL = str(Path(__file__).parent / "assets" / "stories-gpt2")
"""Folder of the small GPT-2 that comes with the package, by name "embedded"."""


def resolve_model(model: Any) -> Any:
    """The folder behind the name "embedded"; anything else unchanged."""
    return EMBEDDED_MODEL if isinstance(model, str) and model == "embedded" else model


def find_config(model: str | PreTrainedModel) -> PretrainedConfig:
    """The config of a model or of a folder or hub id.

    Raises:
        ValueError: it is neither a folder with a config nor to be had from the hub; says which was tried.
    """
    if isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        return cast(PreTrainedModel, model).config
    if not isinstance(model, str):
        raise ValueError(f"a model must be a hub id, a folder or a transformers model, got {type(model).__name__}")
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if Path(model).is_dir():
            why = f"the folder holds no model that transformers can read ({str(error).splitlines()[0]})"
        else:
            why = 'no such folder, and the hub has no such model or is out of reach (offline: a folder, or "embedded")'
        raise ValueError(f"model {model!r} cannot be loaded: {why}") from error


def load_config(model: str | PreTrainedModel) -> PretrainedConfig:
    """The model's config, refused if it is not a decoder-only language model.

    Raises:
        ValueError: nothing to load under that name, or an encoder-decoder model; names its type.
    """
    config = find_config(model)
    if config.is_encoder_decoder:
        raise ValueError(
            f"{config.model_type!r} is an encoder-decoder model; PPO here treats prompt and response as one sequence "
            "and needs a decoder-only causal language model (GPT-2, Llama, Qwen, ...)"
        )
    return cast(PretrainedConfig, config)


def load_tokenizer(model: str | PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        ValueError: a model object that does not say where it came from.
    """
    name = model if isinstance(model, str) else model.config._name_or_path
    if not name:
        raise ValueError("this model was not loaded from a folder or hub id; pass its tokenizer as processing_class")
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def load_policy(model: str | PreTrainedModel) -> PreTrainedModel:
    """A causal language model in float32, from a hub id or folder, or the given one."""
    if isinstance(model, str):
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)
    return model


def load_trunk(model: str | PreTrainedModel) -> PreTrainedModel:
    """The model without its head, for a critic of its own."""
    if isinstance(model, str):
        return AutoModel.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)
    return cast(PreTrainedModel, model.base_model)


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The config that holds vocabulary and hidden size (a multimodal model's lies one level down)."""
    return model.config.get_text_config()


def context_length(config: PretrainedConfig) -> int | None:
    """Most tokens the model can read, or None where its config sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def prompt_room(config: PretrainedConfig, max_new_tokens: int) -> int | None:
    """Most tokens a prompt may have beside ``max_new_tokens`` of response; None: the model sets no limit."""
    limit = context_length(config)
    return None if limit is None else limit - max_new_tokens


def freeze(model: nn.Module) -> nn.Module:
    """The model in evaluation mode without gradients."""
    return model.eval().requires_grad_(False)


def fuse_activations(model: nn.Module) -> None:
    """Let one kernel compute GPT-2's "gelu_new", which transformers spells out in eight passes: the same function."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh").eval())
