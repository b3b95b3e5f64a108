"""Identity: whether two models are one, by what they answer and by what they hold; a name says nothing about that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ppo.models.forward.hidden_states import call, probe_ids, without_adapter_wrapper
from rlhf_ppo.models.loading import adapter_base, load_policy
from rlhf_ppo.runtime.errors import RunError

OBJECT = "object"
"""How run.json names a model that was given as an object: what that is now called says nothing about its weights."""


class SavedModelError(RunError):
    """What lies in a folder is not the model that was saved there."""


def source_name(model: Any) -> str:
    """How run.json names a model: its folder or hub id, or "object"."""
    return model if isinstance(model, str) else OBJECT


def answers(model: nn.Module, *, grad: bool = False) -> Tensor:
    """Logits of eight tokens in float32 on CPU: [8, V] of a language model, [labels] of a classifier.

    Args:
        model: in evaluation mode from here on: dropout would answer otherwise each time.
        grad: let them carry gradients.
    """
    ids = probe_ids(model.eval())
    with torch.set_grad_enabled(grad), torch.autocast(ids.device.type, enabled=False):
        return call(model, ids).logits[0].float().cpu()


def difference(one: Tensor, other: Tensor) -> float:
    """How far two models' answers are from each other, relative to their size; NaN where only one is not finite."""
    gap = torch.where((one == other) | (one.isnan() & other.isnan()), 0.0, one - other)
    return float(gap.norm() / other[other.isfinite()].norm().clamp(min=1e-30))


def kl(one: Tensor, other: Tensor) -> float:
    """The largest KL(one || other) of two models' answers [n, V], in nats a token."""
    log_p, log_q = (x.double().log_softmax(-1) for x in (one, other))
    return float(torch.where(log_p.exp() > 0, log_p.exp() * (log_p - log_q), 0.0).sum(-1).max())


def require_saved(folder: Path, expected: Tensor, load: Callable[[str], nn.Module], *, half: bool = False) -> None:
    """Load a folder afresh, as generate and evaluate do, and compare its answers with those of the model saved there.

    It costs one more copy of the model in float32 in main memory while it lasts, the time to read it, and one pass over
    eight tokens; the trained model stays where it is.

    Args:
        folder: where it was saved.
        expected: :func:`answers` of the trained model.
        load: folder -> model.
        half: the trained model computes in half precision, the loaded one in float32; their answers differ by rounding.
    Raises:
        SavedModelError: the folder cannot be loaded, or holds another model.
    """
    try:
        with torch.random.fork_rng():  # a run that goes on draws what it would have drawn
            gap = difference(answers(load(str(folder))), expected)
    except (OSError, ValueError, RuntimeError) as error:
        raise SavedModelError(f"the model saved in {folder} cannot be loaded again: {error}") from error
    # Merging an adapter rounds at 1e-6; half precision keeps 8 or 11 bits of each product.
    if not gap <= (0.1 if half else 1e-4):
        raise SavedModelError(
            f"the model saved in {folder} is not the one that was trained: the logits of what is loaded from it are "
            f"off by {gap:.2g} of their size. The weights are also in the run's checkpoints (save_every); with an "
            "adapter, save_model(merge_adapter=True) writes another form of the model"
        )


def named_base(policy: Any, source: Any) -> str | None:
    """The folder or hub id under whose name lies exactly this model, without its adapters, or None if none does.

    That of an adapter is none: whoever stacks a second adapter on it by PEFT's own loaders gets another model.

    Args:
        policy: compared weight by weight with what is loaded from there.
        source: what the policy was made from: a folder, hub id or model.
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
    """A model's weights by the names that they have where no layer is wrapped by an adapter."""
    held: dict[str, Tensor] = {}
    for key, weight in without_adapter_wrapper(policy).state_dict().items():
        for wrapper in (".base_layer", ".original_module"):
            key = key.replace(wrapper, "")
        held[key] = weight
    return held
