"""Action masks: read which options are allowed from infos, from a method, or from the observations."""

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
from classic.envs.wrappers import all_have

NAMES = ("action_mask", "action_masks", "mask")
"""Keys of a Dict that name a mask; "mask" only if it holds integers."""
LOOKALIKES = ("mask", "legal", "avail", "valid")
"""Parts of a mask's key under other conventions."""
REMEDY = "give one at the reset and at every step, or set action_masks=False"


class ActionMasks:
    """Read masks from ``info["action_mask"]``, the environment's method ``action_masks()``, or its observations.

    A mask is one row of all options of all choices, True (or 1) where allowed; MultiBinary has two options per bit, off
    and on. Gymnasium's own environments (Taxi) use the first source, sb3-contrib's MaskablePPO the second, PettingZoo,
    RLlib and Tianshou the third.
    """

    def __init__(self, envs: VectorEnv, actions: ActionLayout, where: str, wanted: bool | None) -> None:
        """Find out which sources the environment has.

        Args:
            envs: the copies.
            actions: what an action consists of.
            where: begins each message.
            wanted: None: use masks if the environment provides them; True: require them; False: ignore them.
        Raises:
            ValueError: masks are wanted, but actions are continuous.
        """
        if wanted and not actions.choices:
            raise ValueError(f"{where}: action_masks=True, but its actions are continuous, which cannot be masked")
        self.envs, self.actions, self.where, self.wanted = envs, actions, where, wanted
        possible = bool(actions.choices) and wanted is not False
        self._method = possible and all_have(envs, "action_masks")
        self.observed = observed_mask(envs.single_observation_space, actions) if possible else None
        """Columns of the mask in an encoded observation; read if there is neither of the other two sources."""

    def read(
        self, info: dict[str, Any], observations: Tensor, resetting: Tensor, *, expected: bool | None
    ) -> Tensor | None:
        """Return masks [B, options] for the next action, or None if there are none.

        Args:
            info: what reset or step returned.
            observations: [B, *O], encoded.
            resetting: [B] bool, copies whose next action is ignored: everything is allowed there.
            expected: whether there were masks at the step before; None: this is a reset.
        Raises:
            ValueError: a mask is missing, or there was none at the step before; it has the wrong length, or allows
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
    """Return one mask as [options] bool; it may be a row, or one array per choice.

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
    """Return the columns of a mask of all options in an encoded observation; None if none is recognised."""
    found = [part for name, part in _zeros_and_ones(space) if name in NAMES and _width(part) == actions.num_outputs]
    return found[0] if len(found) == 1 else None


def unread_masks(space: gymnasium.Space, actions: ActionLayout) -> list[str]:
    """Return keys that look like a mask, if none is recognised."""
    if observed_mask(space, actions) is not None:
        return []
    parts = list(_zeros_and_ones(space))
    misfits = [name for name, _ in parts if name in NAMES[:2]]
    other = [name for name, part in parts if any(x in name for x in LOOKALIKES) and _width(part) == actions.num_outputs]
    return sorted({*misfits, *other})


def _width(part: slice) -> int:
    return part.stop - part.start


def _zeros_and_ones(space: gymnasium.Space, name: str = "", start: int = 0) -> Iterator[tuple[str, slice]]:
    """Yield (key, columns in the encoded observation) of the parts that hold only zeros and ones."""
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
