"""Low precision: models loaded in 8 or 4 bits, or kept in bfloat16."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

Bits = Literal["8bit", "4bit"]


def check_quantization(setting: str, bits: Bits, model: Any, device: torch.device) -> None:
    """Refuse what bitsandbytes cannot do here, before any model is loaded.

    Args:
        setting: the setting's name, for messages.
        bits: its value.
        model: folder, hub id or model that is to be quantised.
        device: of the run.
    Raises:
        ValueError: a model that is loaded already, or no CUDA GPU.
        ModuleNotFoundError: bitsandbytes is not installed.
    """
    if not isinstance(model, str):
        raise ValueError(
            f"{setting}={bits!r} quantises while loading, but a model object is loaded already: give its folder or hub "
            "id"
        )
    if device.type != "cuda":
        raise ValueError(
            f"{setting}={bits!r} is done by bitsandbytes (pip install bitsandbytes) and needs a CUDA GPU, but device "
            f"is {device.type!r}: leave {setting} out"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(f"{setting}={bits!r} is done by bitsandbytes: pip install bitsandbytes")


def quantization_config(bits: Bits, *, bf16: bool) -> BitsAndBytesConfig:
    """QLoRA's own choice for 4 bits (nf4, the constants quantised again), LLM.int8 for 8.

    Args:
        bits: 8bit or 4bit.
        bf16: multiply in bfloat16 instead of float32.
    Source: Dettmers et al., "QLoRA" (2023); "LLM.int8()" (2022).
    """
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
    )


def load_quantized(model: str, bits: Bits, *, device: torch.device, bf16: bool) -> PreTrainedModel:
    """A causal language model with its linear layers in 8 or 4 bits, the rest in float32; all of it frozen."""
    loaded = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=torch.float32,
        quantization_config=quantization_config(bits, bf16=bf16),
        device_map={"": device},
        trust_remote_code=False,
    )
    return cast(PreTrainedModel, loaded.requires_grad_(False))


def to_bfloat16(model: nn.Module) -> None:
    """Round the weights to bfloat16, in place; buffers, such as the frequencies of rotary positions, stay exact."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
