"""One seed fixes every global generator; a device is found or refused by name."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from rlhf_ppo.runtime.machine.device import resolve_device
from rlhf_ppo.runtime.seeding import global_rng_state, restore_rng_state, seed_everything


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_the_same_seed_gives_the_same_draws(seed):
    seed_everything(seed)
    first = draws()
    seed_everything(seed)
    assert draws() == first
    seed_everything(seed + 1)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_global_generators_go_on_where_they_were():
    seed_everything(3)
    random.gauss(0, 1), np.random.randn(), torch.randn(3)  # leaves a second normal draw waiting in two of them
    state = global_rng_state()
    following = draws(), random.gauss(0, 1), float(np.random.randn()), torch.randn(5).tolist()
    seed_everything(4)
    restore_rng_state({name: x.clone() for name, x in state.items()})
    assert (draws(), random.gauss(0, 1), float(np.random.randn()), torch.randn(5).tolist()) == following


def test_the_generators_of_each_gpu_are_kept_and_those_of_gpus_that_are_here_go_on(monkeypatch):
    """Two GPUs then, one now, both pretended: what torch is asked and told."""
    states = [torch.full((16,), i + 1, dtype=torch.uint8) for i in range(2)]
    told = {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: told.update({device: state}))
    kept = global_rng_state()
    assert torch.equal(kept["cuda.0"], states[0]) and torch.equal(kept["cuda.1"], states[1])
    restore_rng_state({name: x.clone() for name, x in kept.items()})
    assert told.keys() == {0} and torch.equal(told[0], states[0])


@pytest.mark.cuda
def test_a_gpus_generator_goes_on_where_it_was():
    torch.rand(3, device="cuda")
    state = global_rng_state()
    following = torch.rand(5, device="cuda").tolist()
    restore_rng_state(state)
    assert torch.rand(5, device="cuda").tolist() == following


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device().type in ("cuda", "mps", "cpu")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{name}' cannot be used here"):
            resolve_device(name)
