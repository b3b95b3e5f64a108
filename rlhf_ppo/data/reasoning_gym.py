"""reasoning-gym: its procedural tasks as rows of a data set, and its own judgement of answers."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any
from urllib.parse import parse_qsl

PREFIX = "reasoning-gym:"
"""What the name of a data set of these tasks begins with."""


_EVALUATES = re.compile(r"\b(eval|exec|parse_expr|sympify)\((?!entry\[)")
"""A call in a scorer that runs text as code (SymPy's parsers do); what is in the entry is the task's own."""

_HARMLESS = re.compile(r"[\w\s]*|(?!.*\*\s*\*)[\d\s.+\-*/()]*", re.ASCII | re.DOTALL)
"""Words and numbers without an operator, or arithmetic: no call, no attribute, no power that takes forever."""

_PLAIN_ANSWERS = frozenset({"binary_matrix", "countdown", "n_queens", "puzzle24", "spiral_matrix", "string_insertion"})
"""Tasks whose scorer evaluates answers, although the right ones are harmless."""


def _library() -> Any:
    try:
        import reasoning_gym  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "reasoning-gym tasks need the package reasoning-gym: pip install 'rlhf-ppo[reasoning-gym]'"
        ) from error
    return reasoning_gym


def reasoning_gym_rows(
    task: str, *, size: int = 1000, seed: int = 0, chat: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """Make rows of a reasoning-gym task.

    Args:
        task: its name, such as "leg_counting".
        size, seed: number of questions, and what they are drawn from.
        chat: the prompt is a user message; False: the question as text.
        options: the task's own, such as max_animals.
    Returns:
        Rows with ``prompt``, ``question``, ``answer`` and ``metadata``, which :func:`reasoning_gym_score` reads.
    Raises:
        ValueError: reasoning-gym is not installed, or has no such task or option.
    """
    library = _library()
    try:
        entries = list(library.create_dataset(task, size=size, seed=seed, **options))
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"reasoning-gym task {task!r} with {options or 'no options'}: {error}") from error
    return [{"prompt": _asked(entry["question"]) if chat else entry["question"], **entry} for entry in entries]


def named_rows(source: str) -> list[dict[str, Any]]:
    """Make the rows that "reasoning-gym:leg_counting?size=500&seed=1&max_animals=4" names."""
    task, _, options = source.removeprefix(PREFIX).partition("?")
    return reasoning_gym_rows(task, **{name: _value(text) for name, text in parse_qsl(options)})


def require_task(row: dict[str, Any]) -> None:
    """Raise a ValueError if the row is none of :func:`reasoning_gym_rows`."""
    if lacks := [name for name in ("question", "answer", "metadata") if row.get(name) is None]:
        raise ValueError(
            f"the row has no {' and no '.join(lacks)}, by which reasoning-gym scores: its columns are {sorted(row)}, "
            'and reasoning_gym_rows(...) or the data set "reasoning-gym:TASK" have these'
        )


def reasoning_gym_score(response: str, row: dict[str, Any]) -> float:
    """Return the task's own score, from 0 to 1, of what is in the last <answer> tags of a response, or of all of it.

    An answer that a scorer would run as code, and which is more than a literal or arithmetic, counts as empty.

    Raises:
        ValueError: the task cannot be scored without running answers as code.
    """
    _, _, tagged = response.rpartition("<answer>")
    answer = tagged.partition("</answer>")[0] if "<answer>" in response else response
    entry = {name: row[name] for name in ("question", "answer", "metadata")}
    return float(_scorer(row["metadata"]["source_dataset"])(answer=answer.strip(), entry=entry))


def _asked(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}]


@cache
def _scorer(task: str) -> Callable[..., float]:
    score = _library().get_score_answer_fn(task)
    if not _EVALUATES.search(inspect.getsource(score)):
        return score
    if task not in _PLAIN_ANSWERS:
        raise ValueError(
            f"reasoning-gym scores {task!r} by running the policy's answers as Python code, which is never done here: "
            "choose another task, or score this one by a reward of your own"
        )
    return lambda answer, entry: score(answer=answer if _is_harmless(answer) else "", entry=entry)


def _is_harmless(answer: str) -> bool:
    """Whether evaluating an answer does nothing but give a small value."""
    if len(answer) > 4000:  # Python refuses longer numbers
        return False
    if _HARMLESS.fullmatch(answer):
        return True
    try:
        ast.literal_eval(answer)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def _value(text: str) -> Any:
    """Read an option: a number, true or false, or text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.lower(), text)
