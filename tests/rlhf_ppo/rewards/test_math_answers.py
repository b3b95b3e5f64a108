"""The reward math_verify: equal answers in other words, hostile ones, and a missing package."""

from __future__ import annotations

import pytest

from rlhf_ppo.rewards import loading, math_answers
from rlhf_ppo.rewards.loading import load_reward

NAME = "rlhf_ppo.rewards.math_answers:math_verify"


def test_without_the_package_the_install_line_is_said_before_any_work(monkeypatch, make_trainer):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"'math_verify' needs .*: pip install 'rlhf-ppo\[math-"):
        make_trainer(reward_funcs=NAME, train_dataset=[{"prompt": "a", "answer": "1"}])


@pytest.fixture
def ask():
    pytest.importorskip("math_verify", reason="pip install 'rlhf-ppo[math-verify]'")
    reward, logged = load_reward(NAME, device="cpu"), {}

    def score(answer, *completions):
        answers = [answer] * len(completions)
        return reward([""] * len(completions), list(completions), answers, logged.__setitem__, logged.__setitem__)

    score.logged = logged  # pyright: ignore[reportFunctionMemberAccess]
    yield score
    math_answers._worker.stop()


def test_answers_that_are_equal_are_right_however_they_are_written(ask):
    half = r"so it is \boxed{\frac{1}{2}}.", "$0.5$", r"Thus $x = 2^{-1}$", "the answer is 1/2", "0.5"
    assert ask(r"\frac{1}{2}", *half) == [1.0] * 5
    assert ask(r"\frac{1}{2}", r"\boxed{\frac{1}{3}}", "$2$", "I do not know", "7") == [0.0] * 4
    assert ask.logged["parsed_answer"] == [r"\frac{1}{3}", "2", None, "7"]
    assert ask.logged["parsed_fraction"] == 0.75 and ask.logged["timeout_fraction"] == 0
    assert ask(r"$\{1, 2\}$", r"\boxed{\{2, 1\}}", r"$\{1, 3\}$") == [1.0, 0.0]
    assert ask("Some working. #### 18", r"\boxed{18}", "18 apples", r"$9 \cdot 2$") == [1.0, 1.0, 1.0]
    assert ask(18, [{"role": "assistant", "content": r"$18$"}]) == [1.0]
    assert ask("no number at all, nor a formula", "18") in ([None], [0.0])


def test_fault_17_hostile_answers_score_0_and_end_in_time(ask, monkeypatch):
    """Towers of powers, and what would be code if it were evaluated."""
    monkeypatch.setattr(math_answers, "PAIR_S", 8.0)
    hostile = r"\boxed{9^{9^{9^{9^{9}}}}}", "__import__('os').system('false')", r"\boxed{\sum_{n=1}^{10^{12}} n^n}"
    assert ask("2", *hostile, r"\boxed{2}") == [0.0, 0.0, 0.0, 1.0]
