"""The report after training: paired differences with their interval, and the right rows side by side."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from rlhf_ppo.pipeline.before_after import (
    first_and_last_evaluation,
    paired_difference,
    print_before_after,
    spread_by_improvement,
)
from rlhf_ppo.runtime.logs.run_directory import RunDirectory


def row(iteration: int, prompt: str, score: float | None) -> dict:
    return {
        "iteration": iteration,
        "prompt": prompt,
        "completion": f"{prompt} at {iteration}",
        "score": score,
        "kl_nats": float(iteration),
        "reference_nats_per_token": 2.0,
        "tokens": 5,
    }


def test_paired_difference():
    # differences 1, 2, 3: mean 2, standard deviation 1, so 1.96 / sqrt(3)
    mean, half = paired_difference([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
    assert mean == 2.0 and half == pytest.approx(1.96 / math.sqrt(3))


def test_report_compares_the_first_with_the_last_evaluation(tmp_path):
    run = RunDirectory(tmp_path)
    for iteration, shift in ((0, 0.0), (3, 0.5), (7, 1.0)):
        for prompt, score in (("one", 0.25), ("two", None if iteration == 7 else 0.5)):
            run.append("eval_samples.jsonl", row(iteration, prompt, None if score is None else score + shift))
    before, after = first_and_last_evaluation(run)
    assert [r["iteration"] for r in before] == [0, 0] and [r["iteration"] for r in after] == [7, 7]
    text = io.StringIO()
    print_before_after(run, console=Console(file=text, width=120))
    shown = text.getvalue()
    # "two" lost its score, so only "one" counts: 0.25 -> 1.25
    assert "0.250" in shown and "1.250" in shown and "+1.000" in shown
    assert "one at 0" in shown and "one at 7" in shown and "at 3" not in shown and "two" not in shown


def test_prompts_and_completions_are_shown_as_they_are(tmp_path):
    """Brackets are markup to rich: a chat template's would vanish or raise an error."""
    run = RunDirectory(tmp_path)
    for iteration in (0, 1):
        run.append("eval_samples.jsonl", row(iteration, "[INST] tell [/INST]", 0.5))
    text = io.StringIO()
    print_before_after(run, console=Console(file=text, width=200))
    assert "[INST] tell [/INST] at 1" in text.getvalue()


def test_chats_are_shown_as_chats(tmp_path):
    """Not as Python's lists; content may come in parts, or as tool calls alone."""
    run = RunDirectory(tmp_path)
    parts = [{"type": "text", "text": "what is "}, {"type": "text", "text": "this?"}, {"type": "image"}]
    said = [{"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
            {"role": "tool", "content": "a cat"}, {"role": "assistant", "content": "It is [a] cat."}]  # fmt: skip
    for iteration in (0, 1):
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
        run.append("eval_samples.jsonl", {**row(iteration, "x", 0.5), "prompt": chat, "completion": said})
    text = io.StringIO()
    print_before_after(run, console=Console(file=text, width=200))
    shown = text.getvalue()
    assert "{'" not in shown and "system: Be brief." in shown and "user: what is this?[image]" in shown
    assert 'assistant: [{"name": "look"}]' in shown and "tool: a cat" in shown
    assert "assistant: It is [a] cat." in shown
    # Each message has a line of its own.
    assert not any("system:" in line and "user:" in line for line in shown.splitlines())


def test_samples_are_spread_evenly_over_the_improvements():
    # Changes 0, 10, ..., 90 in a shuffled order; four even quantiles of ten rows are ranks 1, 3, 6 and 8.
    order = [3, 7, 0, 9, 4, 1, 8, 2, 6, 5]
    before = [row(0, str(i), 0.0) for i in order]
    after = [row(1, str(i), 10.0 * i) for i in order]
    assert [a["prompt"] for a, _ in spread_by_improvement(before, after, 4)] == ["1", "3", "6", "8"]
    assert len(spread_by_improvement(before, after, 20)) == 10


def test_what_a_model_writes_commands_no_terminal(tmp_path):
    run = RunDirectory(tmp_path)
    for iteration in (0, 1):
        run.append("eval_samples.jsonl", row(iteration, "\x1b[2Jhello\x9b", 0.5))
    text = io.StringIO()
    print_before_after(run, console=Console(file=text, width=200))
    assert "\ufffd[2Jhello\ufffd at 1" in text.getvalue() and "\x1b" not in text.getvalue()


def test_of_a_run_that_is_being_evaluated_the_last_whole_evaluation_counts(tmp_path):
    run = RunDirectory(tmp_path)
    for iteration, prompts in ((0, "abc"), (3, "abc"), (6, "a")):
        for prompt in prompts:
            run.append("eval_samples.jsonl", row(iteration, prompt, 0.5))
    before, after = first_and_last_evaluation(run)
    assert [r["iteration"] for r in (*before, *after)] == [0, 0, 0, 3, 3, 3]
