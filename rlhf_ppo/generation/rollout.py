"""Rollouts: sample responses, recording each action's log-prob and value at the moment it is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import StaticCache

from rlhf_ppo.core import BannedTokens
from rlhf_ppo.data.chat import Completion, Prompt
from rlhf_ppo.generation.stop_strings import TextStop
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward.kv_cache import can_shrink
from rlhf_ppo.models.forward.packing import token_batches
from rlhf_ppo.models.forward.runner import Sequences, position_ids
from rlhf_ppo.runtime.signals import stop_if_asked


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
    """[B, T] the critic's value of the state before each token, or None without a critic."""
    completions: list[Completion] = field(default_factory=list)
    """[B] the responses as text, special tokens left out; after several turns a chat's are messages."""
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
    cache_hit_fraction: float | None = None
    """Share of the scores that came from the cache, under cache_rewards."""
    sampled_logprobs: Tensor | None = None
    """[B, T] log-probs as recorded while decoding, where recompute_logprobs has replaced them in ``logprobs``."""
    decode_gap: float | None = None
    """Largest |decoding log-prob - full forward log-prob| in nats, measured under recompute_logprobs."""
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

    @property
    def real(self) -> Tensor:
        """[B, T] bool, True on every real token, an environment's included; without one, ``mask`` itself."""
        return self.mask if self.environment is None else self.mask | self.environment

    @property
    def lengths(self) -> Tensor:
        """[B] tokens of each response that the policy chose."""
        return self.mask.sum(dim=1)

    @cached_property
    def token_counts(self) -> list[tuple[int, int]]:
        """[B] (prompt tokens, tokens after them), read from the device once."""
        counts = torch.stack([self.prompt_mask.sum(dim=1), self.real.sum(dim=1)], dim=1).tolist()
        return [(prompt, response) for prompt, response in counts]

    def sequences(self, rows: Sequence[int]) -> Sequences:
        """Prompts and responses of some rows, trimmed to the longest of each."""
        p, t = (max(1, *(self.token_counts[row][side] for row in rows)) for side in (0, 1))
        index = torch.tensor(rows, device=self.mask.device)
        return Sequences(
            self.prompt_ids[index, -p:],
            self.prompt_mask[index, -p:],
            self.response_ids[index, :t],
            self.mask[index, :t],
            None if self.environment is None else self.real[index, :t],
            None if self.banned is None else BannedTokens(self.banned.where[index, :t], self.banned.tokens),
        )

    def batches(self, rows: Sequence[int], max_tokens: int, *, padded: bool) -> list[list[int]]:
        """``rows`` in groups of at most ``max_tokens`` tokens (see :func:`.token_batches`)."""
        groups = token_batches([sum(self.token_counts[row]) for row in rows], max_tokens, padded=padded)
        return [[rows[i] for i in group] for group in groups]


class Sampled(NamedTuple):
    """What decoding records, [B, T] with T the longest response; 0 outside ``mask``."""

    response_ids: Tensor
    mask: Tensor
    finished: Tensor
    """[B]"""
    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None


Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor | None]]
"""(ids [B, N], positions [B, N], attention [B, C], u [B]) -> tokens, log-probs, entropies, values or None: all [B]."""


class FixedShape(NamedTuple):
    """What decoding in one shape throughout needs."""

    cache: StaticCache
    """Empty."""
    room: int
    """Tokens that the cache holds: P + max_new_tokens or more."""
    step: Step
    """Decodes on ``cache`` after the prompt; what it returns is not overwritten by the next step."""


_BLOCK = 256


def sample_tokens(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One draw per row from ``softmax(logits)``: [B, V] -> [B]."""
    return draw(logits.softmax(dim=-1), uniforms(1, len(logits), generator, logits.device)[0])


def uniforms(steps: int, rows: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Numbers in [0, 1) for ``steps`` draws in each of ``rows`` rows, in float64 where the device has it."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.rand(steps, rows, generator=generator, dtype=dtype, device=device)


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """The tokens at which the cumulative weights pass ``u`` of their total.

    Blocks of the vocabulary are searched first and tokens within one block second. The running sums are kept in float64
    (where the device has it), so that tokens of tiny probability keep it.

    Args:
        weights: [B, V] not negative; a token of weight 0 is never drawn.
        u: [B] uniform in [0, 1), of the dtype in which to sum.
    Returns:
        [B] token ids.
    """
    vocabulary = weights.shape[1]
    whole = vocabulary // _BLOCK * _BLOCK
    sums = [weights[:, :whole].unflatten(1, (-1, _BLOCK)).sum(dim=-1), weights[:, whole:].sum(dim=-1, keepdim=True)]
    blocks = torch.cat(sums, dim=1).to(u.dtype).cumsum(dim=-1)
    place = _below(u[:, None] * blocks[:, -1:], blocks[:, -1:])
    # right=True finds the first entry above the place, whose own weight is therefore not 0.
    block = torch.searchsorted(blocks, place, right=True)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp(min=0)), torch.zeros_like(place))
    tokens = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(1, tokens.clamp(max=vocabulary - 1)).to(u.dtype)
    inside = torch.where(tokens < vocabulary, inside, torch.zeros_like(inside)).cumsum(dim=-1)
    # Blocks were summed in the weights' own precision: the share of a block carries over exactly, the place may not.
    upto = blocks.gather(1, block.clamp(max=blocks.shape[1] - 1))
    share = (place - before) / (upto - before)
    found = torch.searchsorted(inside, _below(share * inside[:, -1:], inside[:, -1:]), right=True)
    # Only weights that are not finite lead beyond the vocabulary; what is wrong there shows in their log-probs.
    return (block * _BLOCK + found).squeeze(-1).clamp(max=vocabulary - 1)


def _below(x: Tensor, limit: Tensor) -> Tensor:
    """``x``, but less than ``limit`` whatever was rounded."""
    return torch.minimum(x, torch.nextafter(limit, torch.zeros_like(limit)))


@torch.no_grad()
def sample_responses(
    model: ActorCritic,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    stop_token_ids: Collection[int],
    generator: torch.Generator | None = None,
    fixed: FixedShape | None = None,
    min_new_tokens: int = 0,
    text_stop: Callable[[], TextStop] | None = None,
) -> Sampled:
    """Sample a response to each prompt from exactly ``softmax(logits / temperature)``.

    The decoding loop is our own, so no sampler default and no model's generation config can change the distribution
    behind the recorded log-probs. Architecture, cache and attention masks stay transformers'. Rows that have ended
    leave the batch; the draws of the others do not depend on it.

    Args:
        model: policy and critic.
        prompt_ids: [B, P] left-padded.
        prompt_mask: [B, P] bool.
        max_new_tokens: length limit.
        temperature: divides the logits.
        stop_token_ids: tokens that end a response; they are actions too, so they are recorded.
        generator: source of randomness, on the model's device.
        fixed: decode in this one shape, which no row leaves.
        min_new_tokens: so many first tokens are drawn from the distribution without the stop tokens, renormalised.
        text_stop: makes what watches the text of these responses for stop strings.
    Returns:
        The responses, T <= max_new_tokens. Values only when the critic shares the policy's trunk.
    """
    (batch, prompt_length), device = prompt_ids.shape, prompt_ids.device
    stops = torch.tensor(sorted(stop_token_ids), dtype=torch.long, device=device)
    text_ends = None if text_stop is None else text_stop()
    may_end = len(stops) > 0 or text_ends is not None
    u = uniforms(max_new_tokens, batch, generator, device)
    response_ids = torch.zeros(batch, max_new_tokens, dtype=torch.long, device=device)
    mask = torch.zeros_like(response_ids, dtype=torch.bool)
    logprobs = torch.zeros(batch, max_new_tokens, device=device)
    entropy, values = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
    finished = torch.zeros(batch, dtype=torch.bool, device=device)

    rows = torch.arange(batch, device=device)  # which response each row of the shrinking batch is
    ids, positions = prompt_ids, position_ids(prompt_mask)
    if fixed is None:
        room = prompt_length + max_new_tokens
        cache = model.reader.new_cache(room)
        first = step = decoding_step(model, cache, temperature)
    else:
        cache, room, step = fixed
        first = decoding_step(model, cache, temperature)  # the prompt is of any length
    early = first
    if min_new_tokens:
        early = decoding_step(model, cache, temperature, banned=sorted(stop_token_ids))
    attention = torch.cat([prompt_mask, prompt_mask.new_ones(batch, room - prompt_length)], dim=1)
    with model.reader.decoding():
        for t in range(max_new_tokens):
            stop_if_asked()
            seen = attention if fixed else attention[:, : prompt_length + t]
            act = early if t < min_new_tokens else step if t else first
            token, logprob, spread, value = act(ids, positions, seen, u[t, rows])
            alive = ~finished[rows]
            response_ids[rows, t] = token * alive
            mask[rows, t] = alive
            logprobs[rows, t] = logprob * alive
            entropy[rows, t] = spread * alive
            if value is not None:
                values[rows, t] = value * alive
            if len(stops):
                finished[rows] |= torch.isin(token, stops)
            if text_ends is not None:
                finished[rows] |= text_ends(token, rows)
            ids, positions = token[:, None], positions[:, -1:] + 1
            # On a GPU a look at what has finished stalls the queue, so it happens now and then.
            if may_end and (device.type == "cpu" or t % 16 == 15):
                keep = (~finished[rows]).nonzero().squeeze(-1)
                if not len(keep):
                    break
                if len(keep) <= len(rows) * 7 // 8 and model.reader.rows_leave and can_shrink(cache):
                    cache.reorder_cache(cast(Any, keep))
                    rows, ids, positions, attention = rows[keep], ids[keep], positions[keep], attention[keep]
    longest = int(mask.any(dim=0).sum())
    response_ids, mask, logprobs, entropy, values = (
        x[:, :longest] for x in (response_ids, mask, logprobs, entropy, values)
    )
    return Sampled(response_ids, mask, finished, logprobs, entropy, values if model.shares_trunk else None)


def decoding_step(model: ActorCritic, cache: Any, temperature: float, *, banned: Sequence[int] = ()) -> Step:
    """Return a step: one forward pass over new tokens and one draw per row, never of a ``banned`` token."""

    def step(
        ids: Tensor, positions: Tensor, attention: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        logits, value = model.decode(ids, positions, attention, cache)
        if banned:
            logits.index_fill_(-1, torch.tensor(banned, device=logits.device), -math.inf)
        return *_act(logits, u, temperature), value

    return step


def _act(logits: Tensor, u: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Draw from ``softmax(logits / temperature)`` [B, V], overwriting it: tokens, log-probs and entropies, all [B]."""
    if temperature != 1:
        logits.div_(temperature)
    # Banned tokens (-inf) become finite, but far below anything whose exponential is not 0.
    logits.sub_(logits.amax(dim=-1, keepdim=True)).clamp_(min=-1e4)
    weights = logits.exp()
    total = weights.sum(dim=-1)
    token = draw(weights, u)
    logprob = logits.gather(-1, token[:, None]).squeeze(-1) - total.log()
    return token, logprob, total.log() - weights.mul_(logits).sum(dim=-1) / total
