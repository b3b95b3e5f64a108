"""Stop strings: detect them in responses as they are sampled, and cut the text before them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_ppo.data.detokenization import Before, GrowingText, TextPieces
from rlhf_ppo.generation.rollout import SampledResponses


class StopStringDetector:
    """Follows the text of B responses as they grow, to find the stop strings in it.

    Only the last few tokens are decoded each time, so the cost of a response is linear in its length.
    """

    def __init__(self, pieces: TextPieces, strings: Sequence[str], before: Sequence[Before]) -> None:
        """Start with empty responses; ``before``: what precedes each."""
        self.strings = tuple(strings)
        self._texts = [GrowingText(pieces, start, keep=max(map(len, strings)) - 1) for start in before]

    def add(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Add the tokens [n] just sampled in the responses ``rows`` [n].

        Returns:
            [n] bool, True where the text now contains a stop string.
        """
        texts = [self._texts[row].add(token) for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)]
        found = [any(string in text for string in self.strings) for text in texts]
        return torch.tensor(found, dtype=torch.bool, device=tokens.device)


def cut_at_stop_string(text: str, strings: Sequence[str]) -> str:
    """Return ``text`` up to the first stop string in it."""
    return text[: min((place for string in strings if (place := text.find(string)) >= 0), default=len(text))]


def response_texts(
    sampled: SampledResponses, pieces: TextPieces, before: Sequence[Before], strings: Sequence[str]
) -> list[str]:
    """Decode responses, given what precedes each (``before``), and cut them at their first stop string."""
    rows = zip(before, sampled.response_ids, sampled.mask, strict=True)
    return [cut_at_stop_string(pieces.decode(start, ids[keep].tolist()), strings) for start, ids, keep in rows]
