"""Toy rewards, checked by counting."""

from __future__ import annotations

import pytest

from rlhf_ppo.rewards.toy import dialogue, no_letter_e, positive_sentiment


def test_positive_sentiment_orders_and_is_bounded():
    good, neutral, bad = positive_sentiment([""] * 3, ["I love this wonderful day", "the table", "horrible, I hate it"])
    assert -1 <= bad < -0.3 < neutral == 0 < 0.3 < good <= 1


def test_no_letter_e_counts_words():
    # "the" and "tree" have an e, "cat" and "sat" do not: 2 of 4. No word at all scores 0. Upper case counts too.
    assert no_letter_e([""] * 4, ["the cat sat tree", "42 !", "EVE", "a dog"]) == [0.5, 0.0, 0.0, 1.0]


def test_dialogue_counts_characters_inside_quotes():
    # '"yes"' is 5 of 10 characters; an open quote runs to the end: '"no' is 3 of 6.
    texts = ['"yes" said', "abcdef", 'he "no', ""]
    assert dialogue([""] * 4, texts) == pytest.approx([0.5, 0.0, 0.5, 0.0])
