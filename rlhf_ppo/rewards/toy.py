"""Toy rewards that you can judge by eye, each ``fn(prompts, completions, **columns) -> list[float]``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from rlhf_ppo.data.chat import Prompt


@cache
def _sentiment() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def positive_sentiment(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Any) -> list[float]:
    """Score how positive the text sounds, from -1 to 1: the compound score of VADER, a published sentiment lexicon.

    Source: Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis" (2014).
    """
    return [float(_sentiment().polarity_scores(text)["compound"]) for text in completions]


def no_letter_e(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Any) -> list[float]:
    """Score the share of words without the letter e (a lipogram), from 0 to 1; 0 for a text without words."""
    words = [re.findall(r"[^\W\d_]+", text.lower()) for text in completions]
    return [sum("e" not in word for word in row) / len(row) if row else 0.0 for row in words]


def dialogue(prompts: Sequence[Prompt], completions: Sequence[str], **columns: Any) -> list[float]:
    """Score the share of a text inside double quotes, from 0 to 1: the story's characters talk to each other."""
    return [sum(map(len, re.findall(r'"[^"]*"?', text))) / len(text) if text else 0.0 for text in completions]
