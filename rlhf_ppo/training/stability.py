"""Stability: skip and count non-finite optimizer steps, and stop a run whose policy drifts too far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_ppo.config.run_groups import SafetySettings
from rlhf_ppo.models.sharded.sharding import is_sharded, local_part
from rlhf_ppo.runtime.errors import RunError
from rlhf_ppo.runtime.machine.transfers import Reading


class PolicyDriftError(RunError):
    """The policy is outside the bounds of the settings."""


@dataclass(frozen=True)
class Step:
    """An optimizer step of an update."""

    number: int
    """Within the update, from 1."""
    rows: list[int]
    """Its minibatch's rows of the rollout."""
    numbers: dict[str, Tensor]
    """Losses and the gradient's norm, []."""
    critic_alone: bool = False
    """Whether the value loss alone was computed, after the policy's epochs."""


class StepWatch:
    """Count the non-finite optimizer steps of an update, each one step late.

    Whether a step was finite is known on the device first. Reading that at once would let the device run idle; read
    when the next minibatch's work is queued behind it (:class:`Reading`), the answer costs no wait.
    """

    def __init__(self, consecutive: int, limit: int, on_skip: Callable[[Step], object]) -> None:
        """Continue counting.

        Args:
            consecutive: steps skipped since the last finite one, when the update begins.
            limit: give up at this many.
            on_skip: called with a skipped step, before the weights change again.
        """
        self.consecutive, self.limit, self.on_skip = consecutive, limit, on_skip
        self.steps = self.skipped = 0
        self._open: tuple[Reading, Step] | None = None

    def add(self, finite: Tensor, rows: list[int], numbers: dict[str, Tensor], *, critic_alone: bool = False) -> None:
        """Add a step, taken if ``finite`` []; for the other arguments see :class:`Step`."""
        self.settle()
        self.steps += 1
        self._open = Reading(finite), Step(self.steps, rows, numbers, critic_alone)

    def settle(self) -> None:
        """Read whether the last added step was finite."""
        if self._open is None:
            return
        (finite, step), self._open = self._open, None
        if bool(finite.wait()):
            self.consecutive = 0
            return
        self.skipped += 1
        self.consecutive += 1
        self.on_skip(step)

    @property
    def gave_up(self) -> bool:
        """Whether too many consecutive steps were skipped."""
        return self.consecutive >= self.limit


def spoil_gradient(
    parameters: Sequence[nn.Parameter], losses: Mapping[str, Tensor], estimates: Mapping[str, float]
) -> None:
    """Make the gradient non-finite if a loss or estimate is: one check then sees them all, without a wait.

    A loss may overflow while its gradient is finite; so may the spread that advantages are divided by, which leaves
    advantages of 0, not NaN. Neither step may be taken.

    Args:
        parameters: some have a gradient.
        losses: [] by name.
        estimates: the rollout's non-finite metrics, by name.
    """
    held = (local_part(p).grad for p in parameters)
    gradient = next(gradient for gradient in held if gradient is not None and gradient.numel())
    taint = torch.stack(list(losses.values())).sum() * (math.nan if estimates else 0.0)
    gradient[(0,) * gradient.ndim].add_(taint)


@torch.no_grad()
def nonfinite_parameters(model: nn.Module) -> list[str]:
    """Return the names of non-finite trainable parameters; one pass over them, one wait for the device.

    The processes that share a model's weights call together.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.numel()]
    parts = [local_part(p).detach() for _, p in named]
    # Of an empty part nothing can be the largest.
    largest = torch.stack(
        [torch.linalg.vector_norm(p if p.numel() else p.new_zeros(1), float("inf")).float() for p in parts]
    )
    broken = (~torch.isfinite(largest)).float()
    if is_sharded(model):
        dist.all_reduce(broken)
    return [name for (name, _), flag in zip(named, broken.tolist(), strict=True) if flag]


def require_no_drift(metrics: Mapping[str, float], args: SafetySettings) -> None:
    """Raise a PolicyDriftError, which names setting and number, if metrics are outside the bounds in ``args``."""
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
