"""Spaces: encode observations as one array, and turn the policy's actions into the environment's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

from classic.envs.images import image_encoder, image_layout

if TYPE_CHECKING:
    from torch import Tensor

Encoder = Callable[[Any], np.ndarray]


@dataclass(frozen=True)
class ActionLayout:
    """What an action consists of: one or several discrete choices, or a vector of numbers."""

    choices: tuple[int, ...] = ()
    """Number of options of each choice; () for continuous actions."""
    dimensions: int = 0
    """Length of a continuous action; 0 for choices."""

    @property
    def num_outputs(self) -> int:
        """Logits or means that the policy outputs."""
        return sum(self.choices) or self.dimensions

    @cached_property
    def offsets(self) -> np.ndarray:
        """[choices] index of each choice's first option in a row of all options."""
        return np.cumsum([0, *self.choices[:-1]])


def action_layout(space: gymnasium.Space, where: str) -> ActionLayout:
    """Return the layout of Discrete, MultiDiscrete and MultiBinary (choices) or Box of floats (continuous).

    Raises:
        ValueError: another space; names it and the remedy. ``where`` begins the message.
    """
    if isinstance(space, Discrete):
        return ActionLayout(choices=(int(space.n),))
    if isinstance(space, MultiDiscrete):
        return ActionLayout(choices=tuple(int(n) for n in space.nvec.flatten()))
    if isinstance(space, MultiBinary):
        return ActionLayout(choices=(2,) * int(np.prod(space.shape)))
    if isinstance(space, Box) and np.issubdtype(space.dtype, np.floating) and np.prod(space.shape):
        return ActionLayout(dimensions=int(np.prod(space.shape)))
    raise ValueError(
        f"{where}: {_kind(space)} actions are not supported; Discrete, MultiDiscrete, MultiBinary and Box of floats "
        "are: wrap with TransformAction (gymnasium.wrappers) to turn one of those into yours"
    )


def to_env_actions(actions: Tensor, space: gymnasium.Space, squash: bool = False) -> np.ndarray:
    """Convert the policy's actions to the environment's.

    Args:
        actions: [B] or [B, choices] indices, or [B, dimensions] numbers.
        space: of one action; indices are shifted to its start, numbers clipped to its bounds.
        squash: numbers are squashed into the bounds by tanh instead of clipped.
    """
    array = actions.numpy()
    if isinstance(space, Box):
        array = array.reshape(len(array), *space.shape)
        if squash:
            # The last digit of tanh may land outside, hence the clip.
            array = space.low + (np.tanh(array) + 1) * (space.high - space.low) / 2
        return np.clip(array, space.low, space.high).astype(space.dtype)
    if isinstance(space, Discrete):
        return (array + space.start).astype(space.dtype)
    array = array.reshape(len(array), *(space.shape or ()))
    return (array + getattr(space, "start", 0)).astype(space.dtype)


def observation_shape(space: gymnasium.Space, where: str) -> tuple[int, ...]:
    """Return the shape of one encoded observation: (O,) features, or (channels, height, width) of an image.

    Raises:
        ValueError: an unsupported space; ``where`` begins the message.
    """
    if (layout := image_layout(space)) is not None:
        return layout.shape
    features = _num_features(space, where)
    if features < 1:
        raise ValueError(f"{where}: its observations {space} are empty")
    return (features,)


def scales_parts(space: gymnasium.Space) -> bool:
    """Whether a Dict or Tuple has an array inside that is scaled as an image, as earlier versions did not."""
    if not isinstance(space, (Dict, Tuple)):
        return False
    return any(image_layout(part) is not None or scales_parts(part) for part in _parts(space))


def observation_encoder(space: gymnasium.Space) -> Encoder:
    """Return a function that encodes a batch from a vector environment as one array [B, *shape].

    Box: flattened. Discrete and MultiDiscrete: one-hot. MultiBinary: 0 and 1. Dict and Tuple: their encoded parts
    concatenated, Dict's in the order of its keys. Images: channels first, bytes or 0 to 1; inside a Dict or Tuple 0 to
    1, flattened. Types that float32 cannot hold, such as float64, are float64 until they are normalised.

    The encoder raises a ValueError if an observation does not have the space's shape, and returns a copy.
    """
    shape = space.shape or ()
    if (layout := image_layout(space)) is not None:
        encode_images, dtype = image_encoder(layout), np.uint8 if layout.white is None else np.float32
        return lambda batch: encode_images(_shaped(batch, shape, dtype))
    if isinstance(space, (Dict, Tuple)):
        named: Any = space.spaces.items() if isinstance(space, Dict) else enumerate(space.spaces)
        parts = [(key, observation_encoder(part)) for key, part in named]
        return lambda batch: np.concatenate([_row(encode(batch[key])) for key, encode in parts], axis=1)
    if isinstance(space, (Discrete, MultiDiscrete)):
        sizes = np.array([space.n]) if isinstance(space, Discrete) else space.nvec.flatten()
        start, offsets = np.asarray(space.start), np.cumsum([0, *sizes[:-1]])

        def one_hot(batch: Any) -> np.ndarray:
            indices = (_shaped(batch, shape, np.int64) - start).reshape(-1, len(sizes))
            if (indices < 0).any() or (indices >= sizes).any():
                raise ValueError(f"an observation is outside {space}: {np.asarray(batch).tolist()}")
            ones = np.zeros((len(indices), sizes.sum()), dtype=np.float32)
            np.put_along_axis(ones, indices + offsets, 1.0, axis=1)
            return ones

        return one_hot
    dtype = _encoded_dtype(space)
    return lambda batch: _shaped(batch, shape, dtype).reshape(len(batch), -1)


def _encoded_dtype(space: gymnasium.Space) -> type[np.floating]:
    """Return float32 if it holds the space's numbers, else float64: their mean must be subtracted before rounding."""
    return np.float32 if np.can_cast(space.dtype or np.float64, np.float32) else np.float64


def is_finite(array: np.ndarray) -> np.ndarray:
    """Return where encoded observations or rewards are finite in float32, which networks read."""
    if array.dtype == np.float64:
        return np.abs(array) <= np.finfo(np.float32).max
    return np.isfinite(array)


def batch_of_one(space: gymnasium.Space, observation: Any) -> Any:
    """Turn a single observation into a batch for :func:`observation_encoder`."""
    if isinstance(space, Dict):
        return {key: batch_of_one(part, observation[key]) for key, part in space.spaces.items()}
    if isinstance(space, Tuple):
        return tuple(batch_of_one(part, x) for part, x in zip(space.spaces, observation, strict=True))
    return np.asarray(observation)[None]


def stacked(space: gymnasium.Space, observation: Any) -> Any:
    """Turn a list of observations of a Dict or Tuple into one batch; anything else is returned as it is."""
    if not isinstance(observation, list) or not observation:
        return observation
    if isinstance(space, Dict) and all(isinstance(one, Mapping) for one in observation):
        return {key: stacked(part, [one[key] for one in observation]) for key, part in space.spaces.items()}
    if isinstance(space, Tuple) and all(isinstance(one, tuple) for one in observation):
        columns = zip(*observation, strict=True)
        return tuple(stacked(part, list(column)) for part, column in zip(space.spaces, columns, strict=True))
    return observation


def is_batch(space: gymnasium.Space, observation: Any) -> bool:
    """Whether this is a batch of observations rather than one.

    Raises:
        ValueError: it has the wrong number of axes for either.
    """
    if isinstance(space, Dict):
        key, part = next(iter(space.spaces.items()))
        return is_batch(part, observation[key])
    if isinstance(space, Tuple):
        return is_batch(space.spaces[0], observation[0])
    axes, given = len(space.shape or ()), np.ndim(observation)
    if given not in (axes, axes + 1):
        raise ValueError(f"one observation has {axes} axes and a batch {axes + 1}, got {given}")
    return given == axes + 1


def _shaped(batch: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    # A copy: Gymnasium may write the next observation into the same buffer.
    array = np.array(batch, dtype=dtype, order="C")
    if array.shape[1:] != shape or array.ndim != len(shape) + 1:
        raise ValueError(f"one observation must be {shape}, got {array.shape[1:]}")
    return array


def _row(array: np.ndarray) -> np.ndarray:
    """Return an encoded part as numbers of a row; bytes of an image become 0 to 1."""
    flat = array.reshape(len(array), -1)
    return flat / np.float32(255) if flat.dtype == np.uint8 else flat


def _num_features(space: gymnasium.Space, where: str) -> int:
    if isinstance(space, Box):
        return int(np.prod(space.shape))
    if isinstance(space, Discrete):
        return int(space.n)
    if isinstance(space, MultiDiscrete):
        return int(space.nvec.sum())
    if isinstance(space, MultiBinary):
        return int(np.prod(space.shape))
    if isinstance(space, (Dict, Tuple)):
        return sum(_num_features(part, where) for part in _parts(space))
    raise ValueError(
        f"{where}: {_kind(space)} observations are not supported; Box, Discrete, MultiDiscrete, MultiBinary, and Dict "
        "and Tuple of these are: wrap with TransformObservation (gymnasium.wrappers) to make them one of those"
    )


def _parts(space: Dict | Tuple) -> list[gymnasium.Space]:
    return list(space.spaces.values()) if isinstance(space, Dict) else list(space.spaces)


def _kind(space: gymnasium.Space) -> str:
    return type(space).__name__ + (f"{space.shape}" if isinstance(space, Box) else "")
