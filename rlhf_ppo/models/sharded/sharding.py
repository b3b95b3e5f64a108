"""Sharding (FSDP2): each process holds a share of every weight matrix, and a layer's are gathered while it computes.

Weights of linear layers and embeddings are sharded. Vectors (norms, biases) and matrices of one row (the value head)
stay whole on every process: they are a few in ten thousand of a model, and are read in float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils._pytree import register_dataclass
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from rlhf_ppo.core import PolicyOutput
from rlhf_ppo.models.sharded.sharded_traffic import count_traffic
from rlhf_ppo.runtime.checkpoints.stored_tensors import Piece, StoredTensors

# FSDP gathers a model's weights where backward enters it; torch 2.11 finds the place only in outputs that are trees.
register_dataclass(PolicyOutput)

_GATHERED: WeakSet[FSDPModule] = WeakSet()
"""The modules whose own weights are whole at this moment, because code around them said so."""


@dataclass(frozen=True)
class Sharding:
    """How a run's weights are spread over its processes."""

    mesh: DeviceMesh
    """One dimension; or two, replicated over the first (nodes) and sharded over the second (processes of a node)."""
    device: torch.device
    bf16: bool
    """Layers are gathered in bfloat16; gradients are summed in float32."""
    count: Callable[[int], object]
    """Called with the bytes that this process contributes whenever weights are gathered or gradients summed."""


def make_sharding(
    *, hybrid: bool, device: torch.device, bf16: bool, count: Callable[[int], object] = lambda _: None
) -> Sharding:
    """Return the sharding over all processes, or over those of each node (``hybrid``); ``count`` is its.

    Raises:
        ValueError: hybrid, but nodes run different numbers of processes.
    """
    processes = dist.get_world_size()
    if not hybrid:
        return Sharding(init_device_mesh(device.type, (processes,)), device, bf16, count)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if processes % local:
        raise ValueError(
            f"sharding='hybrid' needs the same number of processes on every node, but {processes} processes do not "
            f"divide into {local} a node: start as many on each, or set sharding='full'"
        )
    names = ("machines", "processes")
    mesh = init_device_mesh(device.type, (processes // local, local), mesh_dim_names=names)
    return Sharding(mesh, device, bf16, count)


def shard(root: nn.Module, sharding: Sharding) -> None:
    """Shard a model's matrices in place, each transformer layer apart and what is outside of them together.

    Gradients become sums over processes; those of parameters that stay whole (:func:`whole_parameters`) stay this
    process's own. Nothing but ``forward``, the methods ``decode`` and ``head_values``, and code inside
    :func:`gathered` may use the weights.

    Args:
        root: on the CPU or on its device.
        sharding: see :class:`Sharding`.
    Raises:
        ValueError: the model has no transformer layers that are known as such.
    """
    layers = transformer_layers(root)
    matrices = {id(p) for p in _matrices(root)}
    whole = {p for p in root.parameters() if id(p) not in matrices}
    # With the residual stream in float32, embeddings and output layer are read as one process reads them: in float32.
    rounded = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    split = partial(fully_shard, mesh=sharding.mesh, reshard_after_forward=True, ignored_params=whole)
    for layer in layers:
        split(layer, mp_policy=rounded if sharding.bf16 else exact)
    split(root, mp_policy=exact)
    for module in _shards(root):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        count_traffic(module, sharding.count, repeated=sharding.mesh.ndim > 1)
    for name in ("decode", "head_values"):
        if hasattr(root, name):
            register_fsdp_forward_method(root, name)
    _become_root(root)


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """Return a model's transformer layers.

    Raises:
        ValueError: it has none of transformers' own.
    """
    layers: list[nn.Module] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        kind = type(getattr(model, "policy", model)).__name__
        raise ValueError(
            f"sharding gathers one transformer layer at a time, but {kind} has none that transformers marks as such: "
            "set sharding='none'"
        )
    return layers


def has_layers(model: nn.Module) -> bool:
    """Return whether a model has layers that are known as such, so that it can be sharded."""
    return any(isinstance(module, GradientCheckpointingLayer) for module in model.modules())


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are sharded: matrices of linear layers, embeddings, and experts' stacks of them."""
    layers = (nn.Linear, nn.Embedding, Conv1D)
    weights = {id(module.weight) for module in model.modules() if isinstance(module, layers)}
    matrices = [p for p in model.parameters() if id(p) in weights or p.ndim > 2]
    return [p for p in matrices if p.is_floating_point() and min(p.shape) > 1]


def _become_root(root: nn.Module) -> None:
    """Let FSDP know now that this is the outermost module; otherwise the first layer that runs would be."""
    module: Any = root
    module.begin_sharding = lambda: None
    register_fsdp_forward_method(root, "begin_sharding")
    module.begin_sharding()


def _shards(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model's matrices are sharded."""
    return isinstance(model, FSDPModule)


def is_share(tensor: Tensor) -> bool:
    """Return whether this process holds only some rows of a tensor."""
    return isinstance(tensor, DTensor)


def whole_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters that every process holds whole, and whose gradients nothing has summed yet."""
    return [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]


@contextmanager
def gathered(root: nn.Module) -> Iterator[None]:
    """Let code inside use embeddings and output layer, without gradients; layers gather their own weights.

    All processes enter together. A model that is not sharded stays as it is.
    """
    with _whole([root] if isinstance(root, FSDPModule) else []):
        yield


@contextmanager
def whole_weights(root: nn.Module, part: nn.Module) -> Iterator[None]:
    """Gather once all weights that ``part`` of a model needs: inside, processes need not compute together.

    Args:
        root: sharded model.
        part: such as the policy in it; embeddings and output layers of all parts are gathered.
    """
    with _whole([cast(FSDPModule, root), *_shards(part)]):
        yield


def keep_gathered(root: nn.Module) -> None:
    """Keep the embeddings and the output layer of a frozen model gathered for good."""
    module = cast(FSDPModule, root)
    module.set_reshard_after_forward(False, recurse=False)
    module.unshard()
    _GATHERED.add(module)


@contextmanager
def _whole(modules: list[FSDPModule]) -> Iterator[None]:
    modules = [module for module in modules if module not in _GATHERED]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
        _GATHERED.add(module)
    try:
        yield
    finally:
        for module in modules:
            _GATHERED.discard(module)
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)


def local_part(parameter: nn.Parameter) -> nn.Parameter:
    """Return what this process holds of a parameter, with its gradient, on the same memory; all of one that is whole.

    Optimizers work on these parts: their fused kernels take no mixture of sharded and whole tensors.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    part = getattr(parameter, "_rlhf_ppo_part", None)
    if part is None:
        part = nn.Parameter(parameter.to_local().detach())
        cast(Any, parameter)._rlhf_ppo_part = part
    part.data = parameter.to_local().detach()  # a model that was converted has other memory
    gradient = parameter.grad
    part.grad = gradient.to_local() if isinstance(gradient, DTensor) else None
    return part


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from all processes, which call together; a whole one itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Compute the global norm [] of gradients, sharded and whole ones; all processes call together."""
    kinds = [[g for g in gradients if isinstance(g, DTensor) == sharded] for sharded in (True, False)]
    norms = [whole_tensor(torch.nn.utils.get_total_norm(kind)) for kind in kinds if kind]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def held_rows(parameter: nn.Parameter) -> tuple[int, int]:
    """Return which rows of a parameter this process holds: the first, and how many."""
    if not isinstance(parameter, DTensor):
        return 0, len(parameter) if parameter.ndim else 1
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    each = -(-rows // mesh.size(mesh.ndim - 1))
    return min(mesh.get_local_rank(mesh.ndim - 1) * each, rows), parameter.to_local().shape[0]


def as_piece(parameter: nn.Parameter, held: Tensor) -> Tensor | Piece:
    """Return ``held``, which goes with this process's part of a parameter, as a checkpoint stores it.

    Of several processes that hold the same rows one has them all, the others none.
    """
    if not isinstance(parameter, DTensor) or held.ndim == 0:
        return held
    mesh = parameter.device_mesh
    copies = mesh.ndim > 1 and mesh.get_local_rank(0) > 0
    return Piece(held[:0] if copies else held, held_rows(parameter)[0], tuple(parameter.shape))


def read_part(parameter: nn.Parameter, stored: StoredTensors, name: str) -> Tensor:
    """Read what goes with this process's part of a parameter, and no more; a single number is everyone's."""
    if not isinstance(parameter, DTensor) or not stored.shapes[name]:
        return stored[name]
    return stored.rows(name, *held_rows(parameter))
