"""Action masks: what an environment says about which options are allowed, as one bool tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, MultiBinary, Tuple
from gymnasium.vector import VectorEnv
from torch import Tensor

from classic.envs.spaces import ActionLayout, observation_shape
from classic.envs.wrappers import all_copies_have

NAMES = ("action_mask", "action_masks", "mask")
"""Keys of a Dict that name a mask; "mask" alone does where it holds whole numbers."""
LOOKALIKES = ("mask", "legal", "avail", "valid")
"""What the name of a mask holds under another convention."""
REMEDY = "give one at the reset and at every step, or set action_masks=False"


class ActionMasks:
    """Reads masks from ``info["action_mask"]``, from an environment's method ``action_masks()``, or from observations.

    A mask lists every option of every choice in a row, True (or 1) where it is allowed; MultiBinary has two options a
    bit, off and on. The same two sources as in sb3-contrib's MaskablePPO and Gymnasium's own environments (Taxi).
    """

    def __init__(self, envs: VectorEnv, actions: ActionLayout, where: str, wanted: bool | None) -> None:
        """Find out whether the environment has the method.

        Args:
            envs: the copies.
            actions: what an action consists of.
            where: begins each message.
            wanted: None uses masks where the environment offers them, True insists, False ignores them.
        Raises:
            ValueError: masks are wanted, but actions are numbers.
        """
        if wanted and not actions.choices:
            raise ValueError(f"{where}: action_masks=True, but its actions are numbers, which cannot be masked")
        self.envs, self.actions, self.where, self.wanted = envs, actions, where, wanted
        possible = bool(actions.choices) and wanted is not False
        self._method = possible and all_copies_have(envs, "action_masks")
        self.observed = observed_mask(envs.single_observation_space, actions) if possible else None
        """Where an observation's mask lies in its encoding; read where neither of the other two is there."""

    def read(
        self, info: dict[str, Any], observations: Tensor, resetting: Tensor, *, expected: bool | None
    ) -> Tensor | None:
        """Masks [B, options] for the next action, or None if there are none.

        Args:
            info: what reset or step returned.
            observations: [B, *O], encoded.
            resetting: [B] bool, copies whose next action is ignored: everything is allowed there.
            expected: whether there were masks before; None: nothing was asked before.
        Raises:
            ValueError: a mask is missing, or there although there was none before; it has the wrong length, or allows
                nothing.
        """
        if self.wanted is False or not self.actions.choices:
            return None
        options, ignored = self.actions.num_outputs, resetting.numpy()
        if "action_mask" in info:
            given = np.asarray(info["action_mask"], dtype=object if info["action_mask"].dtype == object else bool)
            present = np.asarray(info.get("_action_mask", np.ones(len(given), dtype=bool)))
        elif self._method:
            given = self.envs.call("action_masks")  # pyright: ignore
            present = np.ones(len(given), dtype=bool)
        elif self.observed is not None:
            given, present = observations[:, self.observed].numpy(), np.ones(len(ignored), dtype=bool)
        elif expected:
            given, present = (), np.zeros(len(ignored), dtype=bool)
        elif self.wanted:
            raise ValueError(
                "action_masks=True, but there is neither infos['action_mask'] nor a method action_masks() nor a part "
                "action_mask of the observations"
            )
        else:
            return None
        if expected is False:
            raise ValueError(f"there is an action mask, but there was none at the steps before: {REMEDY}")
        masks = np.ones((len(ignored), options), dtype=bool)
        for copy in np.flatnonzero(~ignored):
            if not present[copy]:
                raise ValueError(f"the action mask of copy {copy} is missing: {REMEDY}")
            masks[copy] = mask_row(given[copy], self.actions, f"the action mask of copy {copy}")
        return torch.from_numpy(masks)


def mask_row(mask: Any, actions: ActionLayout, name: str) -> np.ndarray:
    """[options] bool from one mask: a row, or one array a choice.

    Raises:
        ValueError: the wrong length, or a choice without an allowed option; ``name`` begins the message.
    """
    parts = list(mask) if isinstance(mask, (list, tuple)) else [mask]
    row = np.concatenate([np.ravel(part) for part in parts]).astype(bool)
    if len(row) != actions.num_outputs:
        raise ValueError(f"{name} must have {actions.num_outputs} entries, got {len(row)}")
    if not np.logical_or.reduceat(row, actions.offsets).all():
        raise ValueError(f"{name} allows nothing")
    return row


def observed_mask(space: gymnasium.Space, actions: ActionLayout) -> slice | None:
    """Where a mask of all options lies in an encoded observation, or None if none is recognised."""
    found = [part for name, part in _zeros_and_ones(space) if name in NAMES and _width(part) == actions.num_outputs]
    return found[0] if len(found) == 1 else None


def unread_masks(space: gymnasium.Space, actions: ActionLayout) -> list[str]:
    """Keys that look like a mask, where none is recognised."""
    if observed_mask(space, actions) is not None:
        return []
    parts = list(_zeros_and_ones(space))
    misfits = [name for name, _ in parts if name in NAMES[:2]]
    other = [name for name, part in parts if any(x in name for x in LOOKALIKES) and _width(part) == actions.num_outputs]
    return sorted({*misfits, *other})


def _width(part: slice) -> int:
    return part.stop - part.start


def _zeros_and_ones(space: gymnasium.Space, name: str = "", start: int = 0) -> Iterator[tuple[str, slice]]:
    """(key, columns in the encoded observation) of the parts that hold only zeros and ones."""
    if isinstance(space, Dict | Tuple):
        for key, part in space.spaces.items() if isinstance(space, Dict) else enumerate(space.spaces):
            yield from _zeros_and_ones(part, str(key), start)
            start += int(np.prod(observation_shape(part, name)))
    elif isinstance(space, MultiBinary) or (
        isinstance(space, Box)
        and (space.low == 0).all()
        and (space.high == 1).all()
        and (name != "mask" or np.issubdtype(space.dtype, np.integer) or space.dtype == np.bool_)
    ):
        yield name, slice(start, start + int(np.prod(space.shape)))
