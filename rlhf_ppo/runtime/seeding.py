"""Seeds and devices: one seed, one machine, one result."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (reward functions and initialisers may draw from them)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def global_rng_state() -> dict[str, torch.Tensor]:
    """The state of Python's, NumPy's and torch's global generators (CPU, and each CUDA device), as tensors."""
    version, words, python_gauss = random.getstate()
    _, key, position, has_gauss, numpy_gauss = np.random.get_state()
    state = {
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([] if python_gauss is None else [python_gauss], dtype=torch.float64),
        "numpy": torch.tensor([*np.asarray(key).tolist(), position, has_gauss]),
        "numpy_gauss": torch.tensor([numpy_gauss], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # asking would make a run on the CPU take a GPU's memory
        state |= {f"cuda.{i}": x for i, x in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_rng_state(state: Mapping[str, torch.Tensor]) -> None:
    """Put the global generators where :func:`global_rng_state` found them (those of devices that are here)."""
    version, *words = state["python"].tolist()
    random.setstate((version, tuple(words), next(iter(state["python_gauss"].tolist()), None)))
    *key, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, has_gauss, float(state["numpy_gauss"])))
    torch.set_rng_state(state["torch"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        if (saved := state.get(f"cuda.{i}")) is not None:
            torch.cuda.set_rng_state(saved, i)


def resolve_device(name: str | None = None) -> torch.device:
    """The device the user named, else cuda, else mps, else cpu.

    Raises:
        ValueError: the name is no device, or no such device is here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
