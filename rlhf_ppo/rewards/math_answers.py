r"""Math reward: compare answers in LaTeX with math-verify, for which ``\frac{1}{2}`` and ``2^{-1}`` are equal."""

from __future__ import annotations

import atexit
import json
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf_ppo.data.chat import Completion, Prompt
from rlhf_ppo.rewards.gsm8k import find_number
from rlhf_ppo.rewards.validation import RewardError

PAIR_S = 12.0
"""Seconds that a completion may take; one that takes longer scores 0."""

_START_S = 120.0
_MARK = "####"


def math_verify(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    answer: Sequence[Any],
    log_metric: Callable[[str, float], None] | None = None,
    log_extra: Callable[[str, Sequence[Any]], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    r"""Score 1 if the completion's answer equals that of the column ``answer``, else 0; None if that cannot be read.

    The answer is the last ``\boxed{}``, else the last formula in ``$...$`` or ``\[...\]``, as math-verify reads it; a
    completion without LaTeX is read by :func:`rlhf_ppo.rewards.gsm8k.find_number`. After several turns the last message
    counts.

    Logs the column ``parsed_answer``, and the metrics ``parsed_fraction`` and ``timeout_fraction``.
    """
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    verdicts = [_worker.compare(_as_latex(str(gold)), text) for gold, text in zip(answer, texts, strict=True)]
    scores = [_score(verdict, str(gold), text) for verdict, gold, text in zip(verdicts, answer, texts, strict=True)]
    read = [_answer_as_read(verdict, text) for verdict, text in zip(verdicts, texts, strict=True)]
    if log_extra is not None:
        log_extra("parsed_answer", read)
    if log_metric is not None:
        log_metric("parsed_fraction", sum(found is not None for found in read) / len(read))
        log_metric("timeout_fraction", sum(verdict is None for verdict in verdicts) / len(verdicts))
    return scores


math_verify.needs = ("math_verify", "math-verify")  # pyright: ignore[reportFunctionMemberAccess]

Verdict = list[Any] | None
"""[same, gold as read, answer as read]; None: it took too long."""


def _score(verdict: Verdict, gold: str, text: str) -> float | None:
    if verdict is None:
        return 0.0
    same, gold_read, answer_read = verdict
    number = find_number(gold)
    if gold_read is None and number is None:
        return None
    if answer_read is not None and gold_read is not None:
        return float(bool(same))
    return float(number is not None and find_number(text) == number)


def _answer_as_read(verdict: Verdict, text: str) -> str | None:
    if verdict is None:
        return None
    if verdict[2] is not None:
        return verdict[2]
    number = find_number(text)
    return None if number is None else str(number)


def _as_latex(gold: str) -> str:
    """Return the part of a gold answer after its last ``####``, as a formula if it has none around it."""
    gold = gold.rpartition(_MARK)[2].strip()
    return gold if "$" in gold or "\\boxed" in gold or "\\[" in gold or "\\(" in gold else f"${gold}$"


class _Worker:
    """The other process: started when it is needed, and again after it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._one_at_a_time = threading.Lock()

    def compare(self, gold: str, text: str) -> Verdict:
        """Ask about one pair.

        Raises:
            RewardError: the process does not start; says why.
        """
        with self._one_at_a_time:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._start()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps([gold, text]) + "\n")
                process.stdin.flush()
                ready, _, _ = select.select([process.stdout], [], [], PAIR_S)
                line = process.stdout.readline() if ready else ""
            except BrokenPipeError:
                line = ""
            if not line:
                self.stop()  # it takes too long, or its memory was not enough
                return None
            return json.loads(line)

    def _start(self) -> subprocess.Popen[str]:
        # -P: modules of this folder must not pass for others.
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))]
        pipe = subprocess.PIPE
        # In a session of its own, so that Ctrl-C ends the run and not an answer.
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(["$1$", "$1$"]) + "\n")
            stdin.flush()
            started = bool(select.select([stdout], [], [], _START_S)[0]) and stdout.readline() != ""
        except BrokenPipeError:
            started = False
        if not started:
            self.stop()
            raise RewardError(
                "reward function 'math_verify': the process that compares answers does not start; try "
                f"{' '.join(command)} and see what it says"
            )
        return self._process

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


_worker = _Worker()
atexit.register(_worker.stop)
