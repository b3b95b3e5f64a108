"""Changed rollouts: the same responses with other scores, more padding, or in another order."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_ppo.core import BannedTokens
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.models.forward.runner import Sequences


def with_own_scores(rollout: Rollout) -> Rollout:
    """Give each response a score of its own: a constant reward would leave nothing to compare."""
    assert rollout.scores is not None
    scores = [0.25 + i for i in range(len(rollout.prompts))]
    return dataclasses.replace(
        rollout,
        scores=torch.tensor(scores, dtype=rollout.scores.dtype, device=rollout.scores.device),
        scored=torch.ones_like(rollout.finished),
        score_parts={name: list(scores) for name in rollout.score_parts},
        token_scores=None,
        token_score_parts={},
    )


def widened(rollout: Rollout, *, left: int, right: int, filler: int) -> Rollout:
    """Return a rollout with more padding, and with ``filler`` as the id in all of it."""
    shape = rollout.mask.shape
    fields = {field.name: getattr(rollout, field.name) for field in dataclasses.fields(rollout)}
    changed: dict[str, Any] = {
        name: pad(x, (0, right))
        for name, x in fields.items()
        if isinstance(x, Tensor) and x.shape == shape and not name.startswith("prompt_")
    }
    if rollout.banned is not None:
        changed["banned"] = BannedTokens(pad(rollout.banned.where, (0, right)), rollout.banned.tokens)
    real = pad(rollout.real, (0, right))
    changed["response_ids"] = torch.where(real, changed["response_ids"], filler)
    changed["prompt_mask"] = pad(rollout.prompt_mask, (left, 0))
    prompt_ids = pad(rollout.prompt_ids, (left, 0))
    return dataclasses.replace(rollout, **changed, prompt_ids=torch.where(changed["prompt_mask"], prompt_ids, filler))


def all_sequences(rollout: Rollout) -> Sequences:
    """Return all rows with all of their padding, which :meth:`Rollout.sequences` would trim."""
    real = None if rollout.environment is None else rollout.real
    return Sequences(rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.mask, real, rollout.banned)


def reordered(rollout: Rollout, rows: Sequence[int]) -> Rollout:
    """Return a rollout's rows in another order."""

    def take(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x[list(rows)]
        if isinstance(x, BannedTokens):
            return BannedTokens(x.where[list(rows)], x.tokens)
        if isinstance(x, dict):
            return {name: take(part) for name, part in x.items()}
        return [x[row] for row in rows] if isinstance(x, list) else x

    fields = dataclasses.fields(rollout)
    return dataclasses.replace(rollout, **{field.name: take(getattr(rollout, field.name)) for field in fields})
