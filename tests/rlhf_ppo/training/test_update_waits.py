"""An update never waits for its device: not for a number, a shape, or a copy from memory that is not pinned.

On torch's meta device tensors have no numbers at all, and it is no CPU, so the ways of GPUs are taken.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from attention_kernels import as_on_a_gpu
from helpers import moved
from torch.optim import adam
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from rlhf_ppo.generation import rollout as rollout_module
from rlhf_ppo.models.forward import layout as layouts
from rlhf_ppo.models.forward import packing, varlen
from rlhf_ppo.models.forward.runner import ModelRunner
from rlhf_ppo.runtime.logs import metrics
from rlhf_ppo.training import gradients, stability, update
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.optimizer import make_optimizer
from rlhf_ppo.training.rewards import shape_rewards
from rlhf_ppo.training.stability import StepWatch

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero}


def tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def is_away(tree: Any) -> bool:
    return any(x.device.type != "cpu" for x in tensors(tree))


class NoReads(TorchDispatchMode):
    """Fail where an operator reads numbers of another device than the CPU, or mixes both devices' tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if is_away((args, kwargs, out)):
            here = [x for x in tensors((args, kwargs)) if x.device.type == "cpu"]
            assert func.overloadpacket not in READS and not here, f"{func} waits for the device"
        return out


class NoCopies(TorchFunctionMode):
    """Fail where Python's numbers become a tensor on another device than the CPU, which copies them from the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor) and is_away(out) and not tensors(args)
        indexed = func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and is_away(args)
        index = args[1] if indexed else ()
        lists = any(isinstance(x, list) for x in (index if isinstance(index, tuple) else (index,)))
        assert not made and not lists, f"{func} copies from the host"
        return out


class Zeros:
    """A reading of a tensor without numbers: 0, or True."""

    def __init__(self, x: torch.Tensor) -> None:
        self.numbers = torch.full(x.shape, x.dtype == torch.bool, dtype=x.dtype)

    def wait(self) -> torch.Tensor:
        return self.numbers


def epochs(trainer: Any, rollout: Any, estimates: Any) -> Any:
    """Run the minibatches of an update, and nothing around them."""
    run, state = trainer.fixed, trainer.state
    watch = StepWatch(0, 3, on_skip=lambda step: None)
    return update._run_epochs(state, run, run.args, rollout, estimates, watch)


def estimated(trainer: Any, prompts: list[str]) -> tuple[Any, Any]:
    rollout = trainer.rollout(prompts)
    estimates = estimate(rollout, shape_rewards(rollout, trainer.args, trainer.kl_coef), trainer.args)
    assert rollout.token_counts  # read from the device once, before the first minibatch
    return rollout, estimates


SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "all losses": {"ent_coef": 0.1, "kl_loss_coef": 0.1, "kl_loss": "exact", "positive_loss_coef": 0.1},
    "turns": {"ratio_level": "sequence", "loss_aggregation": "sequence_mean"},
    "the critic's epochs": {"critic_epochs": 3},
    "several microbatches": {"microbatch_tokens": 40},
    "banned tokens": {"min_new_tokens": 3},
    "checkpointed": {"gradient_checkpointing": True},
}


CASES = [("gpt2", True, "defaults"), *(("llama", True, name) for name in SETTINGS), ("llama", False, "all losses")]


@pytest.mark.parametrize(("kind", "packs", "name"), CASES)
def test_no_minibatch_waits(make_trainer, make_model, prompts, monkeypatch, kind, packs, name):
    trainer = make_trainer(make_model(kind), **SETTINGS[name])
    rollout, estimates = estimated(trainer, prompts)
    layout = dataclasses.replace(rollout.layout, device=torch.device("meta"))
    rollout = moved(rollout, "meta")
    rollout.__dict__["layout"] = layout
    estimates = estimates._replace(experience=moved(estimates.experience, "meta"))
    trainer.model.to("meta")
    trainer.reference.root.to("meta")
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda _: None)  # torch's list of devices lacks meta
    trainer.state.optimizer, trainer.state.scheduler = make_optimizer(trainer.model, trainer.args)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta has none
    monkeypatch.setattr(ModelRunner, "packs_on", lambda *_: packs)
    calls = as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(varlen, "_require_right", lambda *_: None)  # reads numbers, once, before the first update
    # What may cross between host and device.
    for module in (gradients, rollout_module):
        monkeypatch.setattr(
            module, "indices_on", lambda device, x: torch.empty(len(x), dtype=torch.long, device=device)
        )
    for module in (layouts, packing):
        monkeypatch.setattr(module, "from_host", lambda x, device: torch.empty(x.shape, dtype=x.dtype, device=device))
    for module in (metrics, stability):
        monkeypatch.setattr(module, "Reading", Zeros)
    # transformers' own question whether anything is padded
    monkeypatch.setattr(masking_utils, "_ignore_causal_mask_sdpa", lambda *_, **__: False, raising=False)
    with NoReads(), NoCopies():
        epochs(trainer, rollout, estimates)
    assert bool(calls) == packs


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", [*SETTINGS, "offloaded"])
def test_no_minibatch_waits_for_the_gpu(make_trainer, make_model, prompts, kind, name):
    settings = {**SETTINGS, "offloaded": {"offload_activations": True}}[name]
    settings |= {"device": "cuda", "generation": "dynamic", "precision": "bf16", "max_initial_log_ratio": 10.0}
    trainer = make_trainer(make_model(kind), **settings)
    trainer.step(trainer.rollout(prompts))  # libraries wait when they are first used
    rollout, estimates = estimated(trainer, prompts)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        epochs(trainer, rollout, estimates)
    finally:
        torch.cuda.set_sync_debug_mode("default")
