"""Decisions: recorded steps for the policy to evaluate again, and how acting is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record")

Sample = Callable[
    [Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    tuple[Tensor, Tensor, Tensor | None],
]
"""As :meth:`classic.networks.actor_critic.ActorCritic.sample`: observations, noise, masks, starts and
state in; outputs, actions and the state after out."""


@dataclass(frozen=True)
class Decisions:
    """Recorded steps for the policy to evaluate again; ``decisions[rows]`` indexes every field on axis 0.

    Rows are single steps [N], or with a recurrent layer whole sequences [B, T] of one copy each.
    """

    observations: Tensor
    """[*, *O] the observations of the actions."""
    actions: Tensor
    """[*] or [*, choices] int64, or [*, dimensions] float (before tanh if squashed)."""
    action_masks: Tensor | None = None
    """[*, options] bool, True for allowed options; None: all."""
    starts: Tensor | None = None
    """[B, T] bool, True where an episode begins; only with a recurrent layer."""
    state: Tensor | None = None
    """[B, K] recurrent state before the first step; only with a recurrent layer."""

    def __getitem__(self, rows: Tensor | slice) -> Decisions:
        whole = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        taken: dict[str, Any] = {name: None if x is None else x[rows] for name, x in whole.items()}
        return Decisions(**taken)

    def __len__(self) -> int:
        return self.actions.shape[0]


def on_device(record: Record, device: torch.device) -> Record:
    """Return a record of tensors (some None), which are on the CPU, with all of them on a device."""
    if device.type == "cpu":
        return record
    return type(record)(**{name: None if x is None else x.to(device) for name, x in vars(record).items()})
