"""Masks in observations: which part of a Dict says what is allowed, as PettingZoo, RLlib and Tianshou hand it out."""

from __future__ import annotations

from collections.abc import Iterator

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, MultiBinary, Tuple

from classic.envs.spaces import ActionLayout, observation_shape

NAMES = ("action_mask", "action_masks", "mask")
"""Keys of a Dict that name a mask; "mask" alone does where it holds whole numbers."""
LOOKALIKES = ("mask", "legal", "avail", "valid")
"""What the name of a mask holds under another convention."""


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
