"""Skeletons: models without weights, to be filled with weights that are gathered or read later."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from rlhf_ppo.models.sharded.sharding import is_sharded, whole_tensor

Model = TypeVar("Model", bound=nn.Module)

_SKELETONS: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
"""Model that will be sharded -> its skeleton: a sharded model cannot be copied."""


def remember_skeleton(model: nn.Module) -> None:
    """Make the skeleton that :func:`whole_copy` fills once this model is sharded."""
    # Its parameters take no memory (they are on the meta device).
    without = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    _SKELETONS[model] = copy.deepcopy(model, memo=dict(without))


@contextmanager
def whole_copy(model: Model, *, keep: bool) -> Iterator[Model]:
    """Yield a copy of a sharded model with all its weights, on the CPU; a model that is not sharded itself.

    All processes call together, and exchange one tensor at a time.

    Args:
        model: see :func:`remember_skeleton`.
        keep: False: yield the skeleton, on processes that have no use for the copy.
    """
    if not is_sharded(model):
        yield model
        return
    skeleton, weights = cast(Model, _SKELETONS[model]), dict[str, Tensor]()
    for name, parameter in model.named_parameters():
        whole = whole_tensor(parameter.detach())
        if keep:
            weights[name] = whole.cpu()
    if keep:
        fill(skeleton, weights)
    try:
        yield skeleton
    finally:
        fill(skeleton, {name: p.detach().to("meta") for name, p in skeleton.named_parameters()})


def fill(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put weights by name in place of a model's parameters, of any device; what is tied stays tied."""
    named = dict(model.named_parameters())
    new = {id(p): nn.Parameter(weights[name], requires_grad=p.requires_grad) for name, p in named.items()}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, new[id(parameter)])
