"""Load models in 8 or 4 bits (bitsandbytes), or round them to bfloat16; check that device and settings allow it."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from rlhf_ppo.config.run_groups import MemorySettings
from rlhf_ppo.data.hub import read_weights
from rlhf_ppo.models.loading import in_float32, load_policy

Bits = Literal["8bit", "4bit"]


def check_precision(args: MemorySettings, model: Any, ref_model: Any, peft_config: Any, device: torch.device) -> None:
    """Refuse memory and precision settings that models or device do not support, before any model is loaded."""
    if args.offload_activations and device.type != "cuda":
        raise ValueError(
            f"offload_activations=True moves activations from a GPU to main memory, but device is {device.type!r}, "
            "where it saves nothing: leave it out (gradient_checkpointing saves memory everywhere)"
        )
    if args.quantization != "none":
        if peft_config is None:
            raise ValueError(
                f"quantization={args.quantization!r} freezes the policy's weights, so an adapter must be trained: give "
                "peft_config (lora_rank on the command line)"
            )
        check_quantization("quantization", args.quantization, model, device)
    if args.reference_dtype not in ("auto", "float32"):
        if peft_config is not None:
            raise ValueError(
                f"reference_dtype={args.reference_dtype!r} sets the precision of a reference with its own weights, but "
                "with peft_config the reference is the policy with its adapter off: drop one of them"
            )
        if args.reference_dtype != "bfloat16":
            source = model if ref_model is None else ref_model
            check_quantization("reference_dtype", args.reference_dtype, source, device)


def check_quantization(setting: str, bits: Bits, model: Any, device: torch.device) -> None:
    """Check that bitsandbytes can quantise this model here, before any model is loaded.

    Args:
        setting: name of the setting, for messages.
        bits: its value.
        model: folder, hub id or model to quantise.
        device: the run's.
    Raises:
        ValueError: the model is loaded already, or there is no CUDA GPU.
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
    """Return QLoRA's configuration for 4 bits (nf4, double quantisation), or LLM.int8's for 8.

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
    """Load a frozen causal language model with its linear layers in 8 or 4 bits, the rest in float32."""
    config = quantization_config(bits, bf16=bf16)
    loaded = read_weights(AutoModelForCausalLM, model, quantization_config=config, device_map={"": device})
    return cast(PreTrainedModel, loaded.requires_grad_(False))


def round_weights(weights: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Round weights in place; a model's buffers, such as the frequencies of rotary positions, stay exact."""
    for parameter in weights:
        parameter.data = parameter.data.to(dtype)


def load_reference(model: Any, ref_model: Any, args: MemorySettings, device: torch.device, *, bf16: bool) -> Any:
    """Load a reference with its own weights; None where a copy of the policy, or its adapter off, will do."""
    match args.reference_format(bf16=bf16):
        case "float32":
            return None if ref_model is None else in_float32(load_policy(ref_model))
        case "bfloat16":
            # Reference rounds it; a model object of the user's stays unchanged.
            return None if ref_model is None else copy.deepcopy(in_float32(load_policy(ref_model)))
        case bits:
            return load_quantized(model if ref_model is None else ref_model, bits, device=device, bf16=bf16)
