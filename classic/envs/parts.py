"""Parts of an encoded observation: where those of a Dict or Tuple lie in its row, and how to take them out again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Tuple

from classic.envs.images import image_layout
from classic.envs.spaces import observation_shape

if TYPE_CHECKING:
    from torch import Tensor


class Part(NamedTuple):
    """A part of a Dict or Tuple, in the order of the encoded row."""

    columns: slice
    """Where it lies in the row."""
    shape: tuple[int, ...]
    """(O,) numbers, or (channels, height, width) of an image."""


def parts(space: gymnasium.Space) -> list[Part]:
    """List the parts of a Dict or Tuple, nested ones one by one; [] for any other space."""
    found, end = [], 0
    for leaf in _leaves(space) if isinstance(space, Dict | Tuple) else ():
        shape = observation_shape(leaf, "")
        found.append(Part(slice(end, end := end + int(np.prod(shape))), shape))
    return found


def image_columns(space: gymnasium.Space) -> np.ndarray | None:
    """Return [O] bool, True where an encoded row holds pixels; None if it holds none."""
    listed = parts(space)
    pixels = [np.full(int(np.prod(part.shape)), len(part.shape) == 3) for part in listed]
    columns = np.concatenate(pixels) if pixels else np.zeros(0, dtype=bool)
    return columns if columns.any() else None


def as_in_space(space: gymnasium.Space, rows: Tensor) -> Any:
    """Return encoded observations [N, *O] as their space has them, for a network of the user's own.

    A Box has its own shape again, an image is [N, channels, height, width] from 0 to 1, a choice is one-hot; a Dict is
    a dict of these by key, and a Tuple a tuple.
    """
    if not isinstance(space, Dict | Tuple):
        return _leaf(space, rows)
    named: Any = space.spaces.items() if isinstance(space, Dict) else enumerate(space.spaces)
    given, end = {}, 0
    for key, part in named:
        width = int(np.prod(observation_shape(part, "")))
        given[key] = as_in_space(part, rows[:, end : end + width])
        end += width
    return given if isinstance(space, Dict) else tuple(given.values())


def _leaf(space: gymnasium.Space, rows: Tensor) -> Tensor:
    if image_layout(space) is not None:
        images = rows.unflatten(1, observation_shape(space, "")) if rows.ndim == 2 else rows
        return images if images.is_floating_point() else images.float() / 255
    return rows.unflatten(1, space.shape) if isinstance(space, Box) and len(space.shape) > 1 else rows


def _leaves(space: gymnasium.Space) -> Iterator[gymnasium.Space]:
    if isinstance(space, Dict | Tuple):
        for part in space.spaces.values() if isinstance(space, Dict) else space.spaces:
            yield from _leaves(part)
    else:
        yield space
