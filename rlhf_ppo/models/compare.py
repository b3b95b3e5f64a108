"""Compare models by their logits on eight tokens, and a saved folder with the model that was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ppo.models.acceleration.working_copy import computing, held_in_bf16
from rlhf_ppo.models.dropout import without_dropout
from rlhf_ppo.models.forward.hidden_states import call, probe_ids
from rlhf_ppo.runtime.errors import RunError

OBJECT = "object"
"""run.json's name for a model given as an object: the name that it carries says nothing about its weights."""


class SavedModelError(RunError):
    """A folder does not hold the model that was saved there."""


def source_name(model: Any) -> str:
    """Return run.json's name for a model: its folder or hub id, or "object"."""
    return model if isinstance(model, str) else OBJECT


def probe_logits(model: nn.Module, *, grad: bool = False, bf16: bool = False) -> Tensor:
    """Compute the logits of eight tokens in float32 on CPU: [8, V] of a language model, [labels] of a classifier.

    Args:
        model: its dropout is switched off and stays off.
        grad: let the logits carry gradients.
        bf16: compute in bfloat16, as a model does in any case whose weights are held in it.
    """
    ids = probe_ids(without_dropout(model))
    with torch.set_grad_enabled(grad), computing(model, bf16=bf16 or held_in_bf16(model)):
        return call(model, ids).logits[0].float().cpu()


def relative_difference(logits: Tensor, other: Tensor) -> float:
    """Return the norm of the difference relative to the norm of ``other``; NaN where only one is non-finite."""
    gap = torch.where((logits == other) | (logits.isnan() & other.isnan()), 0.0, logits - other)
    return float(gap.norm() / other[other.isfinite()].norm().clamp(min=1e-30))


def largest_kl(logits: Tensor, other: Tensor) -> float:
    """Return the largest KL(softmax(logits) || softmax(other)) of n tokens [n, V], in nats."""
    log_p, log_q = (x.double().log_softmax(-1) for x in (logits, other))
    return float(torch.where(log_p.exp() > 0, log_p.exp() * (log_p - log_q), 0.0).sum(-1).max())


def require_saved(folder: Path, expected: Tensor, load: Callable[[str], nn.Module], *, half: bool = False) -> None:
    """Load a saved folder as generate and evaluate do, and compare its logits with the trained model's.

    This takes one more float32 copy of the model in main memory, the time to load it, and one pass over eight tokens;
    the trained model stays where it is.

    Args:
        folder: where it was saved.
        expected: :func:`probe_logits` of the trained model.
        load: folder -> model.
        half: the trained model computes in half precision, the loaded one in float32; their logits differ by rounding.
    Raises:
        SavedModelError: the folder cannot be loaded, or holds another model.
    """
    try:
        with torch.random.fork_rng():  # the run's own random numbers stay as they are
            gap = relative_difference(probe_logits(load(str(folder))), expected)
    except (OSError, ValueError, RuntimeError) as error:
        raise SavedModelError(f"the model saved in {folder} cannot be loaded again: {error}") from error
    # Merging an adapter rounds at 1e-6; half precision keeps 8 or 11 bits of each product.
    if not gap <= (0.1 if half else 1e-4):
        raise SavedModelError(
            f"the model saved in {folder} is not the one that was trained: the logits of what is loaded from it are "
            f"off by {gap:.2g} of their size. The weights are also in the run's checkpoints (save_every); with an "
            "adapter, save_model(merge_adapter=True) writes another form of the model"
        )
