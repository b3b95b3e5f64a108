"""Bad rewards: a RewardError for a function that raises, hangs, or returns the wrong length, the wrong type or NaN."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from torch import Tensor

from rlhf_ppo.data.chat import Completion, Prompt
from rlhf_ppo.rewards.functions import StepRewards
from rlhf_ppo.runtime.command_line.user_code import FAILURES, has_ended
from rlhf_ppo.runtime.errors import RunError

Score = float | list[float] | None
"""One number for the whole response, one per sampled token, or None: it cannot be scored."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)


class RewardError(RunError):
    """A reward function raised, hung, or returned something other than a list of scores."""


def result_of(future: Future[Any], name: str, wait_s: float | None, timeout_s: float | None) -> Any:
    """Wait for what a reward function returns, at most ``wait_s`` seconds.

    Raises:
        RewardError: it raised (the cause is chained), or hangs; says ``timeout_s``.
    """
    # Two steps, because the function may raise a TimeoutError of its own.
    if not has_ended(future, wait_s):
        raise RewardError(f"reward function {name!r} did not return within reward_timeout_s={timeout_s}")
    try:
        return future.result()
    except RewardError:
        raise
    except FAILURES as error:
        raise RewardError(f"reward function {name!r} raised {type(error).__name__}: {error}") from error


def coerce_scores(result: Any, count: int, name: str, lengths: Sequence[int] | None = None) -> list[Any]:
    """Read ``count`` scores from a list, tuple, array or tensor; bools and NumPy numbers count as numbers.

    Args:
        result: what the reward function returned.
        count: number of completions that it was given.
        name: the function's name.
        lengths: [count] tokens of each completion; None: unknown, so tokens and steps cannot be scored.
    Raises:
        RewardError: another length, nesting or type; says what was expected and what came.
    """
    tokens = "" if lengths is None else ", lists of one number per token, StepRewards"
    expected = f"expected {count} numbers{tokens} (or None), one per completion"
    if isinstance(result, (Tensor, np.ndarray)):
        shape = tuple(result.shape)
        if shape not in ((count,), (count, 1)):
            raise RewardError(f"reward function {name!r} returned an array of shape {shape}; {expected}")
        result = result.reshape(count).tolist()
    if not isinstance(result, (list, tuple)):
        raise RewardError(f"reward function {name!r} returned {type(result).__name__}: {result!r:.80}; {expected}")
    if len(result) != count:
        raise RewardError(f"reward function {name!r} returned {len(result)} scores; {expected}")
    return [
        _coerce(value, name, f"at index {i}; {expected}", None if lengths is None else lengths[i])
        for i, value in enumerate(result)
    ]


def _coerce(value: Any, name: str, where: str, length: int | None) -> Score | StepRewards:
    if isinstance(value, (Tensor, np.ndarray)) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 1:
        value = value.tolist()
    if value is None or (length is not None and isinstance(value, StepRewards)):
        return value
    if isinstance(value, (numbers.Real, np.bool_)):
        return to_float(value)
    if length is not None and isinstance(value, (list, tuple)):
        if len(value) != length:
            raise RewardError(
                f"reward function {name!r} returned {len(value)} token rewards for a completion of {length} tokens "
                f"{where}; completion_ids holds the tokens"
            )
        tokens = [_coerce(token, name, where, None) for token in value]
        if all(isinstance(token, float) for token in tokens):
            return [float(token) for token in tokens if isinstance(token, float)]
    raise RewardError(f"reward function {name!r} returned {type(value).__name__} {value!r:.80} {where}")


def to_float(value: Any) -> float:
    """Convert to a float that is infinite beyond float32, in which a run computes."""
    try:
        number = float(value)
    except OverflowError:  # a whole number or fraction beyond all floats
        number = math.inf if value > 0 else -math.inf
    return math.copysign(math.inf, number) if abs(number) > _FLOAT32_MAX else number


def finite_or_none(score: Score, name: str, prompt: Prompt, completion: Completion, *, drop_nonfinite: bool) -> Score:
    """Return a finite score; turn a NaN or infinite one into None under ``drop_nonfinite``.

    Raises:
        RewardError: a non-finite score that is not dropped; shows prompt and completion.
    """
    if score is None or all(map(math.isfinite, score if isinstance(score, list) else [score])):
        return score
    if drop_nonfinite:
        return None
    raise RewardError(
        f"reward function {name!r} scored {score} for prompt {prompt!r} with completion {completion!r}; "
        "return None for what cannot be scored, or set drop_nonfinite_scores"
    )
