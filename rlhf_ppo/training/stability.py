"""Guarded updates: steps that are not finite are skipped and counted, and a policy that runs away stops the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.runtime.errors import RunError


class PolicyDriftError(RunError):
    """The policy has left the bounds that the settings give it."""


@dataclass(frozen=True)
class Step:
    """An optimizer step of an update."""

    number: int
    """Within the update, from 1."""
    rows: list[int]
    """Its minibatch's rows of the rollout."""
    numbers: dict[str, Tensor]
    """Losses and the gradient's norm, []."""


class StepWatch:
    """Looks at the optimizer steps of one update, each a little after it was taken.

    Whether a step was finite is known on the device first. Asking at once would let the device run dry; asked when the
    next minibatch's work is queued behind it, the answer is there before the device has nothing to do.
    """

    def __init__(self, in_a_row: int, limit: int, on_skip: Callable[[Step], object]) -> None:
        """Go on counting.

        Args:
            in_a_row: steps skipped one after another when the update begins.
            limit: as many are too many.
            on_skip: called with a skipped step, before the weights move again.
        """
        self.in_a_row, self.limit, self.on_skip = in_a_row, limit, on_skip
        self.steps = self.skipped = 0
        self._open: tuple[Tensor, Step] | None = None

    def add(self, finite: Tensor, rows: list[int], numbers: dict[str, Tensor]) -> None:
        """A step was taken if ``finite`` []; for ``rows`` and ``numbers`` see :class:`Step`."""
        self.settle()
        self.steps += 1
        self._open = finite, Step(self.steps, rows, numbers)

    def settle(self) -> None:
        """Look at the step that was added last."""
        if self._open is None:
            return
        (finite, step), self._open = self._open, None
        if bool(finite):
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        self.on_skip(step)

    @property
    def gave_up(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return self.in_a_row >= self.limit


def spoil_gradient(
    parameters: Sequence[nn.Parameter], losses: Mapping[str, Tensor], estimates: Mapping[str, float]
) -> None:
    """Make the gradient non-finite if a loss is, so that the check of the one sees both, and nothing waits for it.

    A loss may overflow while its gradient is still finite, and so may the spread that advantages are divided by: what
    is left of them then is 0, not NaN. Neither is to be followed.

    Args:
        parameters: some have a gradient.
        losses: [] by name.
        estimates: numbers about the rollout that are not finite, by name.
    """
    gradient = next(p.grad for p in parameters if p.grad is not None)
    taint = torch.stack(list(losses.values())).sum() * (math.nan if estimates else 0.0)
    gradient[(0,) * gradient.ndim].add_(taint)


@torch.no_grad()
def nonfinite_parameters(model: nn.Module) -> list[str]:
    """Names of the trainable parameters that hold a NaN or an infinity; one pass over them, one wait for the device."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.numel()]
    largest = torch.stack([torch.linalg.vector_norm(p, float("inf")).float() for _, p in named])
    return [name for (name, _), ok in zip(named, torch.isfinite(largest).tolist(), strict=True) if not ok]


def require_no_drift(metrics: Mapping[str, float], args: RLHFConfig) -> None:
    """Raise a PolicyDriftError, naming setting and number, if an update's metrics are out of the bounds in ``args``."""
    kl, entropy = metrics["kl/reference_nats_per_response"], metrics["policy/entropy"]
    highest, lowest = args.max_kl_nats_per_response, args.min_entropy_nats_per_token
    if highest is not None and kl > highest:
        raise PolicyDriftError(
            f"the KL to the reference is {kl:.3g} nats per response, above max_kl_nats_per_response={highest}: raise "
            "kl_coef, lower learning_rate, or raise the bound"
        )
    if lowest is not None and entropy < lowest:
        raise PolicyDriftError(
            f"the policy's entropy is {entropy:.3g} nats per token, below min_entropy_nats_per_token={lowest}: raise "
            "ent_coef or kl_coef, lower learning_rate, or lower the bound"
        )
