"""Random streams: numbered, not advanced, so that any rollout, shuffle or evaluation can be drawn again."""

from __future__ import annotations

import numpy as np
import torch

TRAIN, SHUFFLE, EVALUATION = range(3)
"""What a stream is for."""


def numbered_generator(seed: int, stream: int, number: int, device: torch.device | str) -> torch.Generator:
    """A generator that depends on seed, purpose and number alone."""
    state = np.random.SeedSequence([seed, stream, number]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
