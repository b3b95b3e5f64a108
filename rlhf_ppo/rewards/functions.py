"""Reward functions: their signature, the arguments they accept and their names."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RewardFunction = Callable[..., Any]
"""``fn(prompts, completions, completion_ids=..., **columns)``, sync or async: one score per completion, in order.
``completion_ids`` (the sampled token ids), ``log_metric(name, value)`` and ``log_extra(column, values)`` go to
functions that name them or accept ``**`` keywords; after several turns ``conversations`` (all messages) and
``completion_turns`` (the turn of each token) go to those that name them."""

RESERVED = (
    *("prompts", "completions", "completion_ids", "conversations", "completion_turns"),
    *("log_metric", "log_extra"),
)
"""Arguments of reward functions, so no column of a data set may have these names."""


_TO_KEYWORDS = ("completion_ids", "log_metric", "log_extra")
"""Those that functions with ``**`` keywords get, too."""


@dataclass(frozen=True)
class StepRewards:
    """Process rewards of one completion: scores of its steps, each placed on the token that completes the step."""

    steps: Sequence[tuple[int, float] | tuple[int, int, float]]
    """(end of the step as a character offset in the completion, exclusive; its score). After several turns
    (number of the turn, from 0; end in the policy's text in that turn; score)."""


def reward_name(function: RewardFunction) -> str:
    """Return the name under which a reward function is logged."""
    return getattr(function, "__name__", type(function).__name__)


def rewards_in_words(weights: Mapping[str, float]) -> str:
    """Return the names of reward functions with their weights, as errors name them."""
    return ", ".join(f"{name} (weight {weight:g})" for name, weight in weights.items())


def reward_source(source: Any) -> str:
    """Describe where a reward comes from, for run.json: the name it was given by, or the function's file or module."""
    if isinstance(source, str):
        return source
    if address := getattr(source, "url", None) or getattr(getattr(source, "config", None), "_name_or_path", None):
        return str(address)
    made = source if hasattr(source, "__qualname__") else type(source)
    module = sys.modules.get(made.__module__)
    file = getattr(module, "__file__", None)
    return f"{file if made.__module__ == '__main__' and file else made.__module__}:{made.__qualname__}"


def accepts(function: RewardFunction, name: str) -> bool:
    """Return whether a reward function gets an argument: it names it, or it goes into ``**`` keywords, too."""
    signature = _signature(function)
    parameters = [] if signature is None else signature.parameters.values()
    return any(p.name == name or (name in _TO_KEYWORDS and p.kind is p.VAR_KEYWORD) for p in parameters)


def require_accepts_columns(
    function: RewardFunction, name: str, columns: Collection[str], where: str, *, conversations: bool = False
) -> None:
    """Check that a reward function can be called with the columns of a data set.

    Args:
        function, name: the reward function and its name.
        columns: the data set's other columns.
        where: the data set's name.
        conversations: whether functions that name ``conversations`` get them.
    Raises:
        ValueError: it cannot; names the function, its parameters, the columns and the data set.
    """
    if taken := sorted(set(columns) & set(RESERVED)):
        raise ValueError(f"{where} has the columns {taken}, which are arguments of reward functions: rename them")
    signature = _signature(function)
    if signature is None:
        return
    extra = [*_TO_KEYWORDS, *(("conversations", "completion_turns") if conversations else ())]
    given: dict[str, Any] = dict.fromkeys([*columns, *(name for name in extra if accepts(function, name))])
    try:
        signature.bind([], [], **given)
    except TypeError as error:
        raise ValueError(
            f"reward function {name!r} has the parameters {signature}, but is called with prompts, completions and the "
            f"columns {sorted(columns)} of {where}: {error}. Let it accept **columns and name those that it needs, or "
            "change the columns"
        ) from None


def _signature(function: RewardFunction) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have none
        return None
