"""Device and precision: where a run computes, and in which number format its matrix products are."""

from __future__ import annotations

from typing import Literal

import torch


def resolve_device(name: str | None = None) -> torch.device:
    """Return the device that the user named, else cuda, else mps, else cpu.

    Raises:
        ValueError: the name is unknown, or this machine has no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return float64, in which scores keep their spread beside a large offset; float32 where a device lacks it."""
    return torch.float32 if device.type == "mps" else torch.float64


def compute_in_bf16(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> bool:
    """Whether matrix products run in bfloat16: under "bf16", or under "auto" where they are faster than in float32.

    They are on GPUs since Ampere and on CPUs with AVX512-BF16 or AMX.

    Raises:
        ValueError: bf16 on a GPU that cannot compute in it.
    """
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not able:
            raise ValueError(f"precision='bf16' needs a newer GPU than {torch.cuda.get_device_name()}; use fp32")
    else:
        able = device.type == "cpu" and cpu_multiplies_bf16()
    return precision == "bf16" or (precision == "auto" and able)


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 numbers."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
