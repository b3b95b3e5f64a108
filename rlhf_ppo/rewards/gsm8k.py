"""GSM8K reward: compare a completion's number with the data set's, exactly, without evaluating any text."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from rlhf_ppo.data.chat import Completion, Prompt

_MARK = "####"
_BOX = "\\boxed{"

# LaTeX fractions, mixed numbers among them: 3\frac{1}{2} is 7/2.
_FRACTION = re.compile(
    r"(?:(?<![0-9.,])(?P<whole>[0-9]{1,100})[ ]?)?\\[dt]?frac[ ]?"
    r"(?:\{[ ]?(?P<top>-?[0-9]{1,100})[ ]?\}[ ]?\{[ ]?(?P<bottom>[0-9]{1,100})[ ]?\}|(?P<top1>[0-9])(?P<bottom1>[0-9]))"
)

# A sign counts unless a number or word ends right before it: "10-7" ends in 7, "= -7" in -7. Digits inside a word (x2)
# are not a number. Every repetition is followed by something it cannot match itself, so the time is linear in the text.
_NUMBER = re.compile(
    r"""(?<!\w)(?<![0-9]\.)
    (?P<sign>(?<![\w)])[-+\u2212])? [$\u20ac\u00a3]? (?P<sign2>(?<=[$\u20ac\u00a3])-)?
    (?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?<!\.)(?=\.[0-9]))
    (?P<decimals>\.[0-9]+)?
    (?P<exponent>[eE][-+]?[0-9]+)?
    (?:[ ]?/[ ]?(?P<denominator>[0-9]+))?
    """,
    re.VERBOSE,
)

_MAX_DIGITS = 100
_MAX_EXPONENT = 100


def find_number(text: str) -> Fraction | None:
    r"""Find a text's answer: the first number after its last ``####``, else in its last ``\boxed{``, else its last
    number; None if there is none.

    Commas between thousands, a currency sign before and a percent sign after a number are ignored (50% is 50).
    Decimals, fractions (3/4, \frac{3}{4}) and powers of ten (2.5e3) have their exact value. Numbers of more than 100
    digits or powers beyond 100 are not an answer, so that no text can make the comparison slow.
    """
    text = _FRACTION.sub(_plain_fraction, text).replace("\\$", "$").replace("{,}", ",")
    _, mark, tail = text.rpartition(_MARK)
    if not mark:
        _, mark, tail = text.rpartition(_BOX)
    numbers = _NUMBER.finditer(tail)
    found = next(numbers, None) if mark else next(iter(deque(numbers, maxlen=1)), None)
    return None if found is None else _value(found)


def _plain_fraction(found: re.Match[str]) -> str:
    r"""Write ``\frac{1}{2}`` as 1/2, and ``3\frac{1}{2}`` as 7/2."""
    top, bottom = found["top"] or found["top1"], found["bottom"] or found["bottom1"]
    return f"{int(top) + int(found['whole'] or 0) * int(bottom)}/{bottom}"


def _value(found: re.Match[str]) -> Fraction | None:
    digits, decimals = found["digits"].replace(",", ""), found["decimals"] or ""
    exponent, denominator = (found["exponent"] or "e0")[1:], found["denominator"] or "1"
    if max(len(digits), len(decimals), len(denominator)) > _MAX_DIGITS or len(exponent) > 4:
        return None
    if abs(int(exponent)) > _MAX_EXPONENT or int(denominator) == 0:
        return None
    value = Fraction(f"{digits or '0'}{decimals}e{exponent}") / int(denominator)
    negative = found["sign"] in ("-", "\u2212") or found["sign2"] is not None
    return -value if negative else value


def gsm8k(
    prompts: Sequence[Prompt], completions: Sequence[Completion], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """Score 1 if the completion's number equals that of the column ``answer``, else 0; None if that has no number.

    :func:`find_number` reads both, so ``answer`` may be a number or GSM8K's worked solution, which ends in ``#### 18``.
    After several turns the last message counts.
    """
    return [_matches(completion, find_number(str(a))) for completion, a in zip(completions, answer, strict=True)]


def _matches(completion: Completion, reference: Fraction | None) -> float | None:
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return None if reference is None else float(find_number(text) == reference)
