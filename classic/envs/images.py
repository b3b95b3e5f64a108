"""Images: recognise observations that are images, in any order of axes and scale, and encode them for the networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.spaces import Box

MIN_IMAGE_SIDE = 36
"""Smallest side, in pixels, that the convolutional network takes."""


class ImageLayout(NamedTuple):
    """Layout of an image in an observation."""

    frames: int
    """Images stacked on the first axis, which become channels; 1 without such an axis."""
    sides: tuple[int, int, int]
    """The three axes of one image; (1, height, width) for grayscale without a channel axis."""
    channels_last: bool
    white: float | None
    """The value scaled to 1; None: bytes, which stay bytes."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the encoded image."""
        height, width, channels = self.sides if self.channels_last else (*self.sides[1:], self.sides[0])
        return (self.frames * channels, height, width)


def image_layout(space: gymnasium.Space) -> ImageLayout | None:
    """Recognise [H, W], [H, W, C], [C, H, W], and stacks of these; None if it is not an image.

    Bytes with three axes are images whatever their bounds; other dtypes and other axes only if the bounds are 0 to 255
    or 0 to 1.
    """
    if not isinstance(space, Box) or len(space.shape) not in (2, 3, 4):
        return None
    sides: Any = (1, *space.shape) if len(space.shape) == 2 else space.shape[-3:]
    if not _is_image_shaped(sides):
        return None
    white: float | None = None
    if space.dtype != np.uint8 or len(space.shape) != 3:
        white = float(space.high.flat[0])
        if (space.low != 0).any() or (space.high != white).any() or white not in (1.0, 255.0):
            return None
        white = None if space.dtype == np.uint8 and white == 255 else white
    frames = space.shape[0] if len(space.shape) == 4 else 1
    return ImageLayout(frames, sides, int(np.argmin(sides)) == 2, white)


def image_encoder(layout: ImageLayout) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that encodes a batch of images as [B, channels, height, width], bytes or floats from 0 to 1."""

    def encode(batch: np.ndarray) -> np.ndarray:
        images = batch.reshape(-1, *layout.sides)
        if layout.channels_last:
            images = images.transpose(0, 3, 1, 2)
        images = np.ascontiguousarray(images).reshape(len(batch), *layout.shape)
        return images if layout.white is None else images / np.float32(layout.white)

    return encode


def unscaled(space: gymnasium.Space) -> str | None:
    """Explain why this Box would reach the networks on a bad scale, with the remedy; None: it would not."""
    if not isinstance(space, Box) or not space.shape:
        return None
    layout = image_layout(space)
    if layout is not None:
        dark = layout.white is None and (space.high <= 1).all()
        return "are read as bytes up to 255, but their bounds end at 1: multiply them by 255" if dark else None
    if len(space.shape) in (3, 4) and _is_image_shaped(space.shape[-3:]) and np.isinf(space.high).any():
        return (
            "look like images, but their bounds do not say which value is white, so they are flattened: declare 0 to "
            "255 or 0 to 1 (TransformObservation) to have them read as images"
        )
    if (space.low == 0).all() and (space.high == 255).all():
        return (
            f"are numbers up to 255 but not an image (of at least {MIN_IMAGE_SIDE} pixels a side), so the networks get "
            "them as they are: set normalize_observations=True, or divide them (TransformObservation)"
        )
    return None


def _is_image_shaped(sides: Any) -> bool:
    return min(sides[0], sides[2]) <= sides[1] and sorted(sides)[1] >= MIN_IMAGE_SIDE
