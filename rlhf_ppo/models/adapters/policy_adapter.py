"""The policy's adapter: add it, detect whether that changed the base, refuse one that cannot be saved and loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.models.adapters.lora import require_mergeable, without_adapters
from rlhf_ppo.models.compare import probe_logits, relative_difference
from rlhf_ppo.models.forward.hidden_states import without_adapter_wrapper
from rlhf_ppo.models.loading import adapter_base, load_policy

_SAME = 1e-5
"""Relative difference of logits that float32 rounding explains."""


@dataclass(frozen=True)
class PreparedPolicy:
    """A policy as it is trained, and what adding its adapter did to the base."""

    policy: Any
    base_changed: bool
    """Adding the adapter changed the base's weights or layers (PiSSA, OLoRA and the like)."""
    base_trained: bool
    """Some of the base's own weights are trained beside the adapter (biases)."""
    start_changed: bool
    """The policy's logits differ from those of the model that the adapter was added to."""

    @property
    def off_is_start(self) -> bool:
        """True if the policy with its adapter off is the model that training starts from, and stays so."""
        return not (self.base_changed or self.base_trained or self.start_changed)

    def find_base(self, source: Any) -> str | None:
        """Return the folder or hub id that holds the model under the adapter as it is now, or None.

        Args:
            source: the folder, hub id or model that the policy was made from.
        """
        known = isinstance(source, str) and not self.base_changed and adapter_base(source) is None
        return source if known else _same_base(self.policy, source)

    def find_start(self, source: Any, base: str | None) -> str | None:
        """Return the folder or hub id that holds the policy as it starts, or None; ``base`` is :meth:`find_base`'s."""
        if self.start_changed or (self.base_changed and not isinstance(source, str)):
            return None
        return source if isinstance(source, str) else base


def prepare_policy(model: Any, peft_config: Any = None) -> PreparedPolicy:
    """Add an adapter to a model; without ``peft_config`` train the model as given, or the adapter that it has.

    Raises:
        ValueError: the adapter does not work on this model; see :func:`require_own_adapter` also.
    """
    if peft_config is not None:
        return _add_adapter(model, peft_config)
    has_adapter = hasattr(model, "peft_config")
    if has_adapter:
        require_own_adapter(model)
    else:
        model.requires_grad_(True)
    return PreparedPolicy(model, base_changed=False, base_trained=True, start_changed=has_adapter)


def _add_adapter(model: Any, config: Any) -> PreparedPolicy:
    """Add an adapter by ``get_peft_model``, and detect by the logits of a few tokens what that did to the base."""
    from peft import get_peft_model

    before = probe_logits(model)
    policy = get_peft_model(model, config)
    require_own_adapter(policy)
    try:
        on = probe_logits(policy)
        with without_adapters(policy):
            off = probe_logits(policy, grad=True)
        trained = [p for p in policy.parameters() if p.requires_grad] if off.requires_grad else []
        reached = torch.autograd.grad(off.sum(), trained, allow_unused=True) if trained else ()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a router that is a linear layer and returns a tuple, and the like
        raise ValueError(
            f"this peft_config does not work on {model.config.model_type!r} ({type(model).__name__}): "
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}. Name the layers that get the adapter in "
            "target_modules (--lora-target-modules), without those that are not plain linear layers"
        ) from error
    return PreparedPolicy(
        policy,
        base_changed=not relative_difference(off.detach(), before) <= _SAME,
        base_trained=any(gradient is not None for gradient in reached),
        start_changed=not relative_difference(on, before) <= _SAME,
    )


def require_own_adapter(policy: Any) -> None:
    """Refuse a PEFT model whose adapter would not be the same after saving and loading.

    Raises:
        ValueError: several adapters are active at once, one has a layer's name, or it cannot be merged.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(path.split("."), x) for path, x in policy.named_modules() if isinstance(x, BaseTunerLayer)]
    active = sorted({name for _, layer in layers for name in layer.active_adapters})
    if len(active) > 1:
        raise ValueError(
            f"the model has {len(active)} active adapters ({', '.join(active)}), but only one can be trained and "
            "saved: keep one by set_adapter, or combine them by add_weighted_adapter"
        )
    for name in policy.peft_config:
        if any(name in path for path, _ in layers):
            raise ValueError(
                f"the model's adapter {name!r} has the name of a layer, and PEFT confuses the two: load it "
                "under another name, PeftModel.from_pretrained(base, folder, adapter_name=..., is_trainable=True)"
            )
    require_mergeable(policy)


def _same_base(policy: Any, source: Any) -> str | None:
    """Return the name of ``source`` if the model loaded from there has exactly the policy's base weights, else None.

    An adapter's folder does not count: PEFT's own loaders would put a second adapter on another model.
    """
    name = source if isinstance(source, str) else source.name_or_path
    try:
        if not name or adapter_base(name) is not None:
            return None
        with torch.random.fork_rng():
            loaded = load_policy(name).state_dict()
    except ValueError:
        return None  # the folder is gone, or never was one
    held = _base_weights(policy)
    same = all(key in held and _equal(held[key], weight) for key, weight in loaded.items())
    return name if same else None


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to("cpu", other.dtype), other)


def _base_weights(policy: Any) -> dict[str, Tensor]:
    """Return a model's weights by their names without an adapter."""
    held: dict[str, Tensor] = {}
    for key, weight in without_adapter_wrapper(policy).state_dict().items():
        for wrapper in (".base_layer", ".original_module"):
            key = key.replace(wrapper, "")
        held[key] = weight
    return held
