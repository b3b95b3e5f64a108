"""Rollouts: responses with everything that is recorded about them, and the parameters they are sampled with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_ppo.core import BannedTokens, ValueScale
from rlhf_ppo.data.chat import Completion, Prompt
from rlhf_ppo.models.forward.layout import Layout
from rlhf_ppo.models.forward.packing import token_batches
from rlhf_ppo.models.forward.runner import Sequences
from rlhf_ppo.runtime.machine.transfers import indices_on


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How responses are sampled, and where they end."""

    max_new_tokens: int
    """Maximum response length in tokens; in multi-turn runs, of each turn."""
    min_new_tokens: int = 0
    """Minimum response length: stop tokens are masked out, and their probability renormalized, until then."""
    temperature: float = 1.0
    """Divides the logits."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response; they are actions too, so they are recorded."""
    stop_strings: tuple[str, ...] = ()
    """Strings that end a response; its text is cut before them."""


class SampledResponses(NamedTuple):
    """What decoding records, [B, T] with T the longest response; 0 outside ``mask``. Fields as in :class:`Rollout`."""

    response_ids: Tensor
    mask: Tensor
    finished: Tensor
    """[B]"""
    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None
    """None unless the critic shares the policy's trunk."""
    banned: BannedTokens | None


@dataclass(frozen=True)
class Rollout:
    """B responses and everything recorded about them. P prompt tokens, T response tokens, time last."""

    prompts: list[Prompt]
    """[B] as given."""
    columns: dict[str, list[Any]]
    """The other columns of the prompts' rows, [B] each."""
    prompt_ids: Tensor
    """[B, P] left-padded token ids."""
    prompt_mask: Tensor
    """[B, P] bool, True on prompt tokens."""
    response_ids: Tensor
    """[B, T] sampled token ids, the very ones that are trained on."""
    mask: Tensor
    """[B, T] bool, True on tokens that the policy chose, its stop token included."""
    finished: Tensor
    """[B] bool, True where a stop token or string ended the (last) turn, False where the length limit did."""
    logprobs: Tensor
    """[B, T] log-probs of the sampled tokens under the policy at the run's temperature."""
    entropy: Tensor
    """[B, T] entropy in nats of the distribution that each token was drawn from."""
    values: Tensor | None
    """[B, T] the critic's value of the state before each token, in the reward's units, or None without a critic."""
    value_scale: ValueScale | None = None
    """The critic's units when they were recorded; None: its head was fresh, and they are 0."""
    completions: list[Completion] = field(default_factory=list)
    """[B] the responses as text, special tokens left out; of multi-turn chats, lists of messages."""
    ref_logprobs: Tensor | None = None
    """[B, T] the same tokens under the frozen reference."""
    scores: Tensor | None = None
    """[B] weighted sum of the reward functions' scores; 0 where unscored."""
    scored: Tensor | None = None
    """[B] bool, False where a reward function had no score (None): the response is left out of training."""
    score_parts: dict[str, list[float | None]] = field(default_factory=dict)
    """Each reward function's own scores, [B]; sums where it scored tokens."""
    token_scores: Tensor | None = None
    """[B, T] the part of ``scores`` that belongs to single tokens, 0 outside ``mask``; None: no token was scored."""
    token_score_parts: dict[str, Tensor] = field(default_factory=dict)
    """The rewards [B, T] of each function that scored tokens, before its weight."""
    logged_metrics: dict[str, float] = field(default_factory=dict)
    """Means of what reward functions logged by ``log_metric``."""
    logged_columns: dict[str, list[Any]] = field(default_factory=dict)
    """What they logged by ``log_extra``, [B] each: None for a response whose score came from the cache."""
    cache_hit_fraction: float | None = None
    """Share of the scores that came from the cache, under cache_rewards."""
    sampled_logprobs: Tensor | None = None
    """[B, T] log-probs as recorded during decoding, where recomputed ones have replaced them in ``logprobs``."""
    decode_gap: float | None = None
    """Largest |decoding log-prob - full forward log-prob| in nats, measured under recompute_logprobs."""
    foreign: bool = False
    """Another program sampled the responses: ``logprobs``, ``entropy`` and ``values`` are recomputed, what it recorded
    is in ``sampled_logprobs``, and importance weights make up for the difference."""
    staleness: Tensor | None = None
    """[B] long, updates between the policy that sampled a response and the one that learns from it; None: unknown, or
    none where ``foreign`` is False."""
    banned: BannedTokens | None = None
    """Stop tokens, banned at [B, T] places before min_new_tokens; True only where ``mask`` is."""
    environment: Tensor | None = None
    """[B, T] bool, True on the tokens of replies; None without ``respond``, like the fields below."""
    turns: Tensor | None = None
    """[B, T] long, the number of the policy's turn, from 0; a reply's tokens count to the turn before it."""
    context_full: Tensor | None = None
    """[B] bool, True where the conversation ended because the context had no room for another turn."""
    conversations: list[list[dict[str, str]]] | None = None
    """[B] all messages of each conversation: the very lists that ``respond`` saw."""
    tool_counts: list[dict[str, int]] | None = None
    """[B] each conversation's calls of tools, those that cannot be read (malformed), and errors; None without tools."""

    @property
    def barred(self) -> BannedTokens | None:
        """``banned`` by its earlier name."""
        return self.banned

    @property
    def real(self) -> Tensor:
        """[B, T] bool, True on every token that is no padding, replies included; without replies, ``mask`` itself."""
        return self.mask if self.environment is None else self.mask | self.environment

    @property
    def lengths(self) -> Tensor:
        """[B] number of tokens that the policy chose in each response."""
        return self.mask.sum(dim=1)

    @cached_property
    def token_counts(self) -> list[tuple[int, int]]:
        """[B] (prompt tokens, tokens after them), after its masks were read from the device once."""
        layout = self.layout
        counts = torch.stack([layout.prompt_mask.sum(dim=1), layout.real.sum(dim=1)], dim=1).tolist()
        return [(prompt, response) for prompt, response in counts]

    @cached_property
    def layout(self) -> Layout:
        """The layout of all rows, whose masks are read from the device once."""
        return Layout.read(self.prompt_mask, self.mask, self.real)

    def sequences(self, rows: Sequence[int]) -> Sequences:
        """Return prompts and responses of some rows, trimmed to the longest of each."""
        p, t = (max(1, *(self.token_counts[row][side] for row in rows)) for side in (0, 1))
        index = indices_on(self.mask.device, rows)
        return Sequences(
            self.prompt_ids[index, -p:],
            self.prompt_mask[index, -p:],
            self.response_ids[index, :t],
            self.mask[index, :t],
            None if self.environment is None else self.real[index, :t],
            None if self.banned is None else BannedTokens(self.banned.where[index, :t], self.banned.tokens),
            self.layout.rows(rows, p, t),
        )

    def batches(self, rows: Sequence[int], max_tokens: int, *, padded: bool) -> list[list[int]]:
        """Group ``rows`` into batches of at most ``max_tokens`` tokens (see :func:`.token_batches`)."""
        groups = token_batches([sum(self.token_counts[row]) for row in rows], max_tokens, padded=padded)
        return [[rows[i] for i in group] for group in groups]


def pick_rows(first: Rollout, second: Rollout, rows: Sequence[int]) -> Rollout:
    """Return rows of two rollouts of one policy as a rollout; facts about a whole rollout are the first one's.

    Args:
        first, second: B and C responses.
        rows: numbers of the rows, from 0 to B + C, the first one's first.
    """
    count = len(first.prompts) + len(second.prompts)
    picked: dict[str, Any] = {}
    for f in fields(Rollout):
        one, other = getattr(first, f.name), getattr(second, f.name)
        if f.name in ("logged_metrics", "cache_hit_fraction", "decode_gap", "value_scale", "foreign"):
            picked[f.name] = one
        elif isinstance(one, dict):
            names = dict.fromkeys([*one, *other])
            picked[f.name] = {name: _picked(one.get(name), other.get(name), first, second, rows) for name in names}
        else:
            picked[f.name] = _picked(one, other, first, second, rows)
    assert all(0 <= row < count for row in rows)
    return Rollout(**picked)


def _picked(one: Any, other: Any, first: Rollout, second: Rollout, rows: Sequence[int]) -> Any:
    """Return rows of a list, of a tensor with a row per response, or of banned tokens; None: nothing was recorded."""
    if one is None and other is None:
        return None
    if isinstance(one, BannedTokens) or isinstance(other, BannedTokens):
        places, others = (None if x is None else x.where for x in (one, other))
        return BannedTokens(_picked(places, others, first, second, rows), (one or other).tokens)
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        left = one is first.prompt_ids or one is first.prompt_mask
        parts = [_filled(x, like, r) for x, like, r in ((one, other, first), (other, one, second))]
        longest = max(part.shape[-1] for part in parts)
        if parts[0].ndim == 2:
            gaps = [longest - part.shape[1] for part in parts]
            pads = [(gap, 0) if left else (0, gap) for gap in gaps]
            parts = [torch.nn.functional.pad(part, pad) for part, pad in zip(parts, pads, strict=True)]
        return torch.cat(parts)[indices_on(parts[0].device, rows)]
    both = [*(one or [None] * len(first.prompts)), *(other or [None] * len(second.prompts))]
    return [both[row] for row in rows]


def _filled(x: Tensor | None, like: Tensor | None, rollout: Rollout) -> Tensor:
    """Return a tensor, or zeros in place of one that was not recorded of this rollout."""
    if x is not None:
        return x
    assert like is not None
    return like.new_zeros(rollout.mask.shape[: like.ndim])
