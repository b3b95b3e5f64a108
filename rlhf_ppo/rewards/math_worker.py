"""The process behind the reward math_verify: pairs of texts come as JSON lines, and go back as verdicts.

A process of its own, whose main thread math-verify's time limits need, and which can be killed when they do not help.
It imports nothing of this package, so that it starts fast.
"""

from __future__ import annotations

import json
import sys

MEMORY = 4 * 2**30
"""Bytes of address space at most: some expressions are larger than any memory."""


def main() -> None:
    """Answer each line ``[gold, completion]`` by ``[same, gold as read, answer as read]``; None: could not be read."""
    from math_verify import (  # pyright: ignore[reportMissingImports]
        LatexExtractionConfig,
        parse,
        verify,
    )

    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, ValueError):  # not POSIX, or a lower limit is set
        pass
    # Not plain expressions of a completion, which math-verify would hand to sympy, and sympy to eval.
    from_completion = [LatexExtractionConfig(boxed_match_priority=0)]
    for line in sys.stdin:
        gold_text, said = json.loads(line)
        try:
            gold = parse(gold_text, parsing_timeout=3)
            answer = parse(said, from_completion, extraction_mode="first_match", parsing_timeout=3) if gold else []
            same = bool(verify(gold, answer, timeout_seconds=3)) if answer else None
            verdict = [same, str(gold[-1]) if gold else None, str(answer[-1]) if answer else None]
        except (Exception, RecursionError):  # whatever sympy makes of it
            verdict = [None, None, None]
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
