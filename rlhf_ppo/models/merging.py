"""Merging: an adapter's weights added to its base's own, also where two layers of the base share one weight."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn


def merge(policy: Any) -> Any:
    """Merge a PEFT model's active adapter into its base and return the base, which is changed.

    A weight that an adapted layer shares with another (tied embeddings, repeated layers) becomes two first: the adapter
    changes one of the layers alone. The config then says that embeddings are not tied.
    """
    shared = Counter(id(p) for module in policy.modules() for p in module.parameters(recurse=False))
    repeats = getattr(policy.peft_config[policy.active_adapter], "layer_replication", None)
    for base in policy.modules() if repeats else [layer.get_base_layer() for layer in _layers(policy)]:
        for name, p in list(base.named_parameters(recurse=False)):
            if shared[id(p)] > 1:
                setattr(base, name, nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))
    model = policy.merge_and_unload()
    head = model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is not getattr(model.get_input_embeddings(), "weight", None):
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    return model


def require_mergeable(policy: Any) -> None:
    """Refuse an adapter that cannot be merged: generate, evaluate and later runs read an adapter by merging it.

    One layer of each kind is tried, on a copy.

    Raises:
        ValueError: it cannot be; names the kind of adapter.
    """
    config = policy.peft_config[policy.active_adapter]
    tried = {
        (type(x), type(base := x.get_base_layer()), getattr(base, "bias", None) is None): x for x in _layers(policy)
    }
    try:
        if not hasattr(policy, "merge_and_unload"):
            raise NotImplementedError("it is not made of layers")
        for layer in tried.values():
            copy.deepcopy(layer).merge()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"an adapter of the kind {config.peft_type.value} cannot be merged into this base ({error}), which is how "
            "generate, evaluate and later runs read it: change peft_config, for instance to LoraConfig(r=8)"
        ) from error


def _layers(policy: Any) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in policy.modules() if isinstance(module, BaseTunerLayer))
