"""Decoding: sample a response to each prompt, token by token, recording log-prob, entropy and value of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import StaticCache

from rlhf_ppo.core import BannedTokens
from rlhf_ppo.generation import sampling
from rlhf_ppo.generation.rollout import SampledResponses, SamplingParams
from rlhf_ppo.generation.stop_strings import StopStringDetector
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward.runner import position_ids
from rlhf_ppo.runtime.signals import stop_if_asked

Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor | None]]
"""(ids [B, N], positions [B, N], attention [B, C], u [B]) -> tokens, log-probs, entropies, values or None: all [B]."""


class FixedShape(NamedTuple):
    """What decoding with one shape throughout needs."""

    cache: StaticCache
    """Empty."""
    room: int
    """Tokens that the cache holds: P + max_new_tokens or more."""
    step: Step
    """The steps after the prompt's, on ``cache``; what it returns is not overwritten by the next step."""


class _Live(NamedTuple):
    """The rows that are still being decoded, N of B."""

    rows: Tensor
    """[N] which responses these are."""
    ids: Tensor
    """[N, L] the next tokens to read: the prompt, later the last token."""
    positions: Tensor
    """[N, L]"""
    attention: Tensor
    """[N, room] bool, True on prompt tokens and on everything after the prompt."""

    def keep(self, index: Tensor) -> _Live:
        """Keep some of the rows."""
        return _Live(*(x[index] for x in self))


class _Record:
    """What has been sampled so far, [B, max_new_tokens], and which responses have ended."""

    def __init__(self, batch: int, steps: int, device: torch.device) -> None:
        self.response_ids = torch.zeros(batch, steps, dtype=torch.long, device=device)
        self.mask = torch.zeros_like(self.response_ids, dtype=torch.bool)
        self.logprobs = torch.zeros(batch, steps, device=device)
        self.entropy, self.values = torch.zeros_like(self.logprobs), torch.zeros_like(self.logprobs)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)

    def add(
        self, t: int, rows: Tensor, tokens: Tensor, logprobs: Tensor, entropy: Tensor, values: Tensor | None
    ) -> None:
        """Record decode step ``t`` [N] of those responses ``rows`` [N] that have not ended."""
        alive = ~self.finished[rows]
        self.mask[rows, t] = alive
        self.response_ids[rows, t] = tokens * alive
        self.logprobs[rows, t] = logprobs * alive
        self.entropy[rows, t] = entropy * alive
        if values is not None:
            self.values[rows, t] = values * alive

    def responses(self, params: SamplingParams, *, has_values: bool) -> SampledResponses:
        """Return the record, cut to the longest response."""
        longest = int(self.mask.any(dim=0).sum())
        response_ids, mask, logprobs, entropy, values = (
            x[:, :longest] for x in (self.response_ids, self.mask, self.logprobs, self.entropy, self.values)
        )
        banned = None
        if params.min_new_tokens:
            early = torch.arange(longest, device=mask.device) < params.min_new_tokens
            banned = BannedTokens(mask & early, params.stop_token_ids)
        return SampledResponses(
            response_ids, mask, self.finished, logprobs, entropy, values if has_values else None, banned
        )


@torch.no_grad()
def sample_responses(
    model: ActorCritic,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    params: SamplingParams,
    *,
    generator: torch.Generator | None = None,
    stop_detector: StopStringDetector | None = None,
    whole: sampling.RowsOf | None = None,
    fixed: FixedShape | None = None,
) -> SampledResponses:
    """Sample a response to each prompt from exactly ``softmax(logits / temperature)``.

    The decoding loop is our own, so no sampler default and no model's generation config can change the distribution
    behind the recorded log-probs. Architecture, cache and attention masks stay transformers'. Rows that have ended
    leave the batch; the draws of the others do not depend on it.

    Args:
        model: policy and critic.
        prompt_ids: [B, P] left-padded.
        prompt_mask: [B, P] bool.
        params: length limits, temperature, stop tokens and stop strings.
        generator: source of randomness, on the model's device.
        stop_detector: detects ``params.stop_strings`` in these B responses; needed where there are any.
        whole: which rows of a larger rollout these are; their draws do not depend on how it is divided.
        fixed: decode in this one shape, which no row leaves.
    Raises:
        ValueError: stop strings without a detector.
    """
    if params.stop_strings and stop_detector is None:
        raise ValueError(f"stop_strings={params.stop_strings!r} need a stop_detector, which reads the tokens as text")
    (batch, prompt_length), device = prompt_ids.shape, prompt_ids.device
    stops = torch.tensor(sorted(params.stop_token_ids), dtype=torch.long, device=device)
    may_end = len(stops) > 0 or stop_detector is not None
    u = sampling.uniforms(params.max_new_tokens, batch, generator, device, whole)
    record = _Record(batch, params.max_new_tokens, device)
    room = prompt_length + params.max_new_tokens if fixed is None else fixed.room
    cache = model.runner.new_cache(room) if fixed is None else fixed.cache
    plain = decode_step(model, cache, params.temperature)
    banning = decode_step(model, cache, params.temperature, banned=sorted(params.stop_token_ids))
    attention = torch.cat([prompt_mask, prompt_mask.new_ones(batch, room - prompt_length)], dim=1)
    live = _Live(torch.arange(batch, device=device), prompt_ids, position_ids(prompt_mask), attention)
    with model.runner.decoding():
        for t in range(params.max_new_tokens):
            stop_if_asked()
            step = banning if t < params.min_new_tokens else plain if fixed is None or t == 0 else fixed.step
            seen = live.attention if fixed else live.attention[:, : prompt_length + t]
            tokens, logprobs, entropy, values = step(live.ids, live.positions, seen, u[t, live.rows])
            record.add(t, live.rows, tokens, logprobs, entropy, values)
            if len(stops):
                record.finished[live.rows] |= torch.isin(tokens, stops)
            if stop_detector is not None:
                record.finished[live.rows] |= stop_detector.add(tokens, live.rows)
            live = live._replace(ids=tokens[:, None], positions=live.positions[:, -1:] + 1)
            # On a GPU a look at what has finished stalls the queue, so it happens now and then.
            if may_end and (device.type == "cpu" or t % 16 == 15):
                going = (~record.finished[live.rows]).nonzero().squeeze(-1)
                if not len(going):
                    break
                if fixed is None and model.runner.cache_shrinks and len(going) <= len(live.rows) * 7 // 8:
                    cache.reorder_cache(cast(Any, going))
                    live = live.keep(going)
    return record.responses(params, has_values=model.shares_trunk)


def decode_step(model: ActorCritic, cache: Any, temperature: float, *, banned: Sequence[int] = ()) -> Step:
    """Return a step: one forward pass over new tokens and one draw per row, never of a ``banned`` token."""

    def step(
        ids: Tensor, positions: Tensor, attention: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        logits, values = model.decode(ids, positions, attention, cache)
        return *sampling.sample_from_logits(logits, u, temperature, banned=banned), values

    return step
