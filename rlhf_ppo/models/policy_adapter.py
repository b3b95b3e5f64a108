"""The policy's adapter: made on a base, with what that did to the base, and refused where it could not be saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlhf_ppo.models.compare import answers, difference, named_base
from rlhf_ppo.models.loading import adapter_base
from rlhf_ppo.models.lora import without_adapters
from rlhf_ppo.models.merging import require_mergeable

_SAME = 1e-5
"""Float32 rounding: answers that are no further apart than this are those of one model."""


@dataclass(frozen=True)
class Adapted:
    """A policy with its adapter, and what making it did to the base."""

    policy: Any
    changed: bool
    """The base's weights or layers were changed in making the adapter (PiSSA, OLoRA and their like)."""
    trained: bool
    """Some of the base's own weights are trained beside the adapter (biases)."""
    new_start: bool
    """The policy is another model than the one that it was made from."""

    @property
    def off_is_start(self) -> bool:
        """With the adapter off the policy is, and stays, the model that training starts from."""
        return not (self.changed or self.trained or self.new_start)

    def base(self, source: Any) -> str | None:
        """The folder or hub id that holds the model under the adapter as it is now, or None if none does.

        Args:
            source: what the policy was made from: a folder, hub id or model.
        """
        known = isinstance(source, str) and not self.changed and adapter_base(source) is None
        return source if known else named_base(self.policy, source)

    def start(self, source: Any, base: str | None) -> str | None:
        """The folder or hub id that holds the policy as it starts, or None if none does; ``base`` is :meth:`base`'s."""
        if self.new_start or (self.changed and not isinstance(source, str)):
            return None
        return source if isinstance(source, str) else base


def without_new_adapter(policy: Any) -> Adapted:
    """A policy that is trained as it was given: all of it, or the adapter that it has.

    Raises:
        ValueError: see :func:`require_own_adapter`.
    """
    has_adapter = hasattr(policy, "peft_config")
    if has_adapter:
        require_own_adapter(policy)
    else:
        policy.requires_grad_(True)
    return Adapted(policy, changed=False, trained=True, new_start=has_adapter)


def make_adapter(model: Any, config: Any) -> Adapted:
    """Give a model an adapter by ``get_peft_model``, and find out by a few tokens what became of its base.

    Raises:
        ValueError: the adapter cannot be merged, bears a layer's name, or does not work on this model.
    """
    from peft import get_peft_model

    before = answers(model)
    policy = get_peft_model(model, config)
    require_own_adapter(policy)
    try:
        on = answers(policy)
        with without_adapters(policy):
            off = answers(policy, grad=True)
        trained = [p for p in policy.parameters() if p.requires_grad] if off.requires_grad else []
        reached = torch.autograd.grad(off.sum(), trained, allow_unused=True) if trained else ()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a router that is a linear layer and returns a tuple, and the like
        raise ValueError(
            f"this peft_config does not work on {model.config.model_type!r} ({type(model).__name__}): "
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}. Name the layers that get the adapter in "
            "target_modules (--lora-target-modules), without those that are no plain products"
        ) from error
    return Adapted(
        policy,
        changed=not difference(off.detach(), before) <= _SAME,
        trained=any(gradient is not None for gradient in reached),
        new_start=not difference(on, before) <= _SAME,
    )


def require_own_adapter(policy: Any) -> None:
    """Refuse a PEFT model whose adapter could not be saved and loaded again as what it is.

    Raises:
        ValueError: several adapters are in force at once, one bears a layer's name, or it cannot be merged.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(path.split("."), x) for path, x in policy.named_modules() if isinstance(x, BaseTunerLayer)]
    active = sorted({name for _, layer in layers for name in layer.active_adapters})
    if len(active) > 1:
        raise ValueError(
            f"the model has {len(active)} adapters in force at once ({', '.join(active)}), and one can be trained and "
            "saved: leave one by set_adapter, or make one of them by add_weighted_adapter"
        )
    for name in policy.peft_config:
        if any(name in path for path, _ in layers):
            raise ValueError(
                f"the model's adapter {name!r} has the name of a layer, and PEFT takes one for the other: load it "
                "under another, PeftModel.from_pretrained(base, folder, adapter_name=..., is_trainable=True)"
            )
    require_mergeable(policy)
