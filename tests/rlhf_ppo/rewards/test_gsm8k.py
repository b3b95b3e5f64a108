"""Verifiable rewards: numbers are parsed, compared exactly, and nothing that a model writes is ever run."""

from __future__ import annotations

import gzip
import json
import time
from fractions import Fraction

import pytest

from rlhf_ppo.rewards.gsm8k import find_number, gsm8k
from rlhf_ppo.rewards.loading import load_reward


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 apples.", 7),
        ("#### 18", 18),
        ("5 is wrong #### $1,000 dollars. Then 7", 1000),
        ("#### 1\n#### 2", 2),
        ("1,234.50", Fraction(2469, 2)),
        ("16,800,000", 16_800_000),
        ("$5", 5),
        ("-$5", -5),
        ("$-5", -5),
        ("10-7", 7),
        ("= -7", -7),
        ("\u22123", -3),
        ("- 5 apples", 5),
        ("(3)-7", 7),
        ("50%", 50),
        ("3/4", Fraction(3, 4)),
        ("3 / 4", Fraction(3, 4)),
        ("-1/2", Fraction(-1, 2)),
        (".5", Fraction(1, 2)),
        ("0.125", Fraction(1, 8)),
        ("it is...5", 5),
        ("2.5e3", 2500),
        ("1e-2", Fraction(1, 100)),
        ("1,2,3", 3),
        ("**18**.", 18),
        (r"\boxed{42}", 42),
        (r"\boxed{42} because 6 * 7 is so", 42),
        (r"\boxed{1} no: \boxed{\frac{1}{2}}.", Fraction(1, 2)),
        (r"#### 3 and not \boxed{4}", 3),
        (r"\frac{1}{2}", Fraction(1, 2)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        (r"3\frac{1}{2}", Fraction(7, 2)),
        (r"\frac12", Fraction(1, 2)),
        (r"\frac{1}{0}", None),
        (r"-\$1{,}234.50", Fraction(-2469, 2)),
        ("$1,234.50", Fraction(2469, 2)),
        ("12.5%", Fraction(25, 2)),
        ("5kg", 5),
        ("007", 7),
        ("no number", None),
        ("x2", None),
        ("", None),
        ("#### eighteen, not 18? no: ####", None),
        ("1/0", None),
    ],
)
def test_what_counts_as_the_answer(text, number):
    assert find_number(text) == number


def test_gsm8k_compares_with_the_worked_solution_or_a_plain_number():
    answer = ["3 + 4 = 7\n#### 7", "#### 1,000", "#### 2", 0.5, 12, "#### -3", "no number"]
    completions = ["so 7", "$1000.00", "3", "1/2", "12.0", "It is -3.", "5"]
    assert gsm8k(["p"] * 7, completions, answer) == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, None]
    assert gsm8k(["p"], ["I do not know"], ["#### 7"]) == [0.0]
    chat = [
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "7"},
    ]
    assert gsm8k(["p"], [chat], ["#### 7"]) == [1.0]


@pytest.mark.parametrize(
    "attack",
    [
        "__import__('os').system('touch pwned')",
        "exec('answer = 1') or 1",
        "#### __import__('os').abort() or 7",
        "().__class__.__bases__[0].__subclasses__()",
        "{answer}",
        "7 if True else 8",
        "\x00####\x007",
        "١٢٣",
    ],
)
def test_fault_17_attacks_on_the_scorer_are_text_like_any_other(attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (scored,) = gsm8k(["p"], [attack], ["#### 123"])
    assert scored == 0.0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "attack",
    [
        "1" * 10**6,
        "1," * 500_000,
        "1,111" * 200_000,
        "1,111," * 100_000 + "1111",
        " " * 10**6 + "x",
        "1 / " * 250_000,
        "-" * 10**6,
        "$" * 10**6,
        "." * 10**6,
        "1." * 500_000,
        "1e" * 500_000,
        "####" * 250_000,
        "1e" + "9" * 10**6,
        "1e999999999",
        "1/" + "9" * 10**6,
        "0." + "3" * 10**6,
    ],
    ids=lambda text: text[:8],
)
def test_fault_17_huge_numbers_and_texts_take_bounded_time(attack):
    """CPU time, not the clock's: about 0.3 s, where a search that goes back over a million characters takes hours."""
    start = time.process_time()
    find_number(attack)
    assert time.process_time() - start < 5


def test_fault_17_huge_numbers_are_not_an_answer():
    assert find_number("1e999999999") is None and find_number("9" * 101) is None and find_number("1e101") is None
    assert find_number("9" * 100) == int("9" * 100) and find_number("1e100") == 10**100


def test_it_is_a_reward_by_name(make_trainer):
    assert load_reward("rlhf_ppo.rewards.gsm8k:gsm8k", device="cpu") is gsm8k
    with pytest.raises(ValueError, match=r"'gsm8k'.*missing a required argument: 'answer'"):
        make_trainer(reward_funcs="rlhf_ppo.rewards.gsm8k:gsm8k")


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_reference_answer_of_gsm8k_scores_one(real_data, split):
    file = real_data / f"datasets/gsm8k_{split}.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == {"train": 7473, "test": 1319}[split]
    assert gsm8k(answers, answers, answers) == [1.0] * len(answers)
    told = [f"The answer is ${answer.split('####')[1].strip()}." for answer in answers]
    assert gsm8k(answers, told, answers) == [1.0] * len(answers)
    # Somebody else's answer is hardly ever right.
    assert sum(gsm8k(answers, [*answers[1:], answers[0]], answers)) < 0.03 * len(answers)
