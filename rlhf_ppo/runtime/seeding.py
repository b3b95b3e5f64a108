"""Seeds and random streams: one seed, one machine, one result."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, which reward functions and initialisers may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def global_rng_state() -> dict[str, torch.Tensor]:
    """Return the states of Python's, NumPy's and torch's global generators (CPU and each CUDA device) as tensors."""
    version, words, python_gauss = random.getstate()
    _, key, position, has_gauss, numpy_gauss = np.random.get_state()
    state = {
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([] if python_gauss is None else [python_gauss], dtype=torch.float64),
        "numpy": torch.tensor([*np.asarray(key).tolist(), position, has_gauss]),
        "numpy_gauss": torch.tensor([numpy_gauss], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # otherwise asking would allocate GPU memory in a CPU run
        state |= {f"cuda.{i}": x for i, x in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_rng_state(state: Mapping[str, torch.Tensor]) -> None:
    """Restore the states of :func:`global_rng_state`, as far as their devices exist here."""
    version, *words = state["python"].tolist()
    random.setstate((version, tuple(words), next(iter(state["python_gauss"].tolist()), None)))
    *key, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, has_gauss, float(state["numpy_gauss"])))
    torch.set_rng_state(state["torch"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        if (saved := state.get(f"cuda.{i}")) is not None:
            torch.cuda.set_rng_state(saved, i)


TRAIN, SHUFFLE, EVALUATION, TURNS = range(4)
"""Purposes of random streams. A stream is numbered, never advanced, so that any draw can be repeated."""


def numbered_generator(seed: int, stream: int, number: int, device: torch.device | str) -> torch.Generator:
    """Return a generator that depends on seed, stream and number alone."""
    state = np.random.SeedSequence([seed, stream, number]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
