"""Seeds: from one number to seeds of episodes and draws that no neighbouring number shares."""

from __future__ import annotations

from typing import Literal

import numpy as np

Purpose = Literal["training", "evaluation", "video", "prediction"]

# The words' places are part of every result: new ones go to the end.
PURPOSES: tuple[Purpose, ...] = ("training", "evaluation", "video", "prediction")


def derive_seeds(seed: int, purpose: Purpose, count: int, *, begun: int = 0) -> list[int]:
    """Derive ``count`` independent seeds below 2**31, which every simulator takes.

    ``seed + i`` would give copy 1 of seed 0 the episodes of copy 0 of seed 1: runs over seeds 0, 1, 2, ... would agree
    more than independent runs do, and every interval over them would be too narrow.

    Args:
        seed: what the user named, 0 or more.
        purpose: what the episodes are for; training's are never evaluation's.
        count: how many; the first ones do not depend on it.
        begun: where in the run the episodes begin, so that a new beginning is not the first one again.
    Source: numpy.random.SeedSequence.
    """
    sequence = np.random.SeedSequence([PURPOSES.index(purpose), begun, seed])
    return (sequence.generate_state(count) >> 1).tolist()
