"""Attention and layer kernels by the names that transformers gives them: checked before loading, set on the device."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_kernels_available

from rlhf_ppo.config.run_groups import RunSettings
from rlhf_ppo.models.forward.hidden_states import without_adapter_wrapper
from rlhf_ppo.models.forward.runner import ModelRunner
from rlhf_ppo.models.loading import find_config


def check_kernels(args: RunSettings, device: torch.device, *, bf16: bool) -> None:
    """Refuse kernels and attention that this machine cannot run, before any model is loaded.

    Args:
        args: the settings that name them.
        device: the run's.
        bf16: the run computes in bfloat16.
    Raises:
        ValueError: flash attention, but not in bfloat16 on a CUDA GPU.
        ModuleNotFoundError: the package kernels is not installed.
    """
    if args.use_kernels and not is_kernels_available():
        raise ModuleNotFoundError(
            "use_kernels=True takes layers from the package kernels, which is missing, or not of a version that this "
            "transformers works with: pip install kernels"
        )
    if is_flash(args.attn_implementation) and not (device.type == "cuda" and bf16):
        raise ValueError(
            f"attn_implementation={args.attn_implementation!r} computes in bfloat16 on a CUDA GPU, but device is "
            f"{device.type!r} and products are in {'bf16' if bf16 else 'fp32'}: leave it out"
        )


def check_attention(args: RunSettings, role: str, model: Any, kind: Any = AutoModelForCausalLM) -> None:
    """Raise a ValueError unless transformers can give a model the attention that is asked for, without its weights.

    Args:
        args: the settings.
        role: of the model, for the message.
        model: folder, hub id or model.
        kind: the Auto class that builds it.
    """
    if args.attn_implementation is None:
        return
    config = copy.deepcopy(find_config(model))  # transformers would write the name into it
    try:
        with torch.device("meta"):
            kind.from_config(config, attn_implementation=args.attn_implementation, trust_remote_code=False)
    except Exception as error:
        why = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"attn_implementation={args.attn_implementation!r} does not work for {role} with what is installed here "
            f"({why:.300}): leave it out, which takes transformers' own choice"
        ) from error


def is_flash(attention: str | None) -> bool:
    """Return whether attention of this name computes in half precision only."""
    return attention is not None and "flash" in attention


def set_kernels(
    model: nn.Module, args: RunSettings, runner: ModelRunner | None = None, *, trains: bool = False
) -> None:
    """Let a model on its device use the attention and the kernels that the settings name.

    Args:
        model: with its weights; adapters in place.
        args: the settings.
        runner: the model's; it packs no sequences under attention that packing does not know.
        trains: kernels need a backward pass.
    Raises:
        ValueError: the model's class computes attention itself.
    """
    base, name = without_adapter_wrapper(model), args.attn_implementation
    if name is not None and base.config._attn_implementation != name:
        before = base.config._attn_implementation
        base.set_attn_implementation(name)
        if base.config._attn_implementation == before:  # another name may be the same attention, from another package
            raise ValueError(
                f"attn_implementation={name!r}: {type(base).__name__} computes attention itself: leave it out"
            )
        if runner is not None:
            runner.packs = False
    if args.use_kernels:
        # transformers takes kernels with a backward pass for models in training mode; dropout stays off.
        base.training, evaluates = trains, base.training
        cast(Any, base).set_use_kernels(True)
        base.training = evaluates
