"""Decoding: sample a response to each prompt, token by token, recording log-prob, entropy and value of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rlhf_ppo.generation import sampling
from rlhf_ppo.generation.record import Record, Sampled
from rlhf_ppo.generation.rollout import SampledResponses, SamplingParams
from rlhf_ppo.generation.stop_strings import StopStringDetector
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward.runner import position_ids
from rlhf_ppo.runtime.machine.signals import stop_if_asked
from rlhf_ppo.runtime.machine.transfers import indices_on


class _Live(NamedTuple):
    """The rows that are still being decoded, N of B."""

    rows: Tensor
    """[N] which responses these are."""
    ids: Tensor
    """[N, 1] the last tokens."""
    positions: Tensor
    """[N, 1]"""
    attention: Tensor
    """[N, room] bool, True on prompt tokens and on everything after the prompt."""

    def keep(self, index: Tensor) -> _Live:
        """Keep some of the rows."""
        return _Live(*(x[index] for x in self))


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
    at_once: int | None = None,
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
        at_once: decode so many responses together, then the next; None: all.
    Raises:
        ValueError: stop strings without a detector.
    """
    require_detector(params, stop_detector)
    batch, device = len(prompt_ids), prompt_ids.device
    u = sampling.uniforms(params.max_new_tokens, batch, generator, device, whole)
    record = Record(batch, params, device)
    for rows in torch.arange(batch, device=device).split(at_once or batch):
        _decode(model, prompt_ids[rows], prompt_mask[rows], rows, u, record, stop_detector)
    return record.responses(has_values=model.shares_trunk)


def require_detector(params: SamplingParams, stop_detector: StopStringDetector | None) -> None:
    """Raise a ValueError if there are stop strings, but nothing to detect them."""
    if params.stop_strings and stop_detector is None:
        raise ValueError(f"stop_strings={params.stop_strings!r} need a stop_detector, which reads the tokens as text")


def _decode(
    model: ActorCritic,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    rows: Tensor,
    u: Tensor,
    record: Record,
    stop_detector: StopStringDetector | None,
) -> None:
    """Decode the responses ``rows`` [N] to prompts [N, P]; those that have ended leave the batch."""
    params, device, length = record.params, u.device, prompt_ids.shape[1]
    stops = torch.tensor(sorted(params.stop_token_ids), dtype=torch.long, device=device)
    may_end = len(stops) > 0 or stop_detector is not None
    cache = model.runner.new_cache(length + params.max_new_tokens)
    attention = torch.cat([prompt_mask, prompt_mask.new_ones(len(rows), params.max_new_tokens)], dim=1)
    live = _Live(rows, prompt_ids[:, -1:], prompt_mask.sum(dim=1, keepdim=True) - 1, attention)
    for t in range(params.max_new_tokens):
        stop_if_asked()
        if t == 0:
            logits, values = _read_prompts(model, prompt_ids, prompt_mask, cache)
        else:
            logits, values = model.decode(live.ids, live.positions, live.attention[:, : length + t], cache)
        banned = (torch.ones_like(live.rows, dtype=torch.bool), stops) if t < params.min_new_tokens else None
        drawn = sampling.sample_from_logits(logits, u[t, live.rows], params.temperature, banned)
        ended = torch.isin(drawn[0], stops)
        if stop_detector is not None:
            ended |= stop_detector.add(drawn[0], live.rows)
        going = ~record.ended[live.rows]
        record.add(live.rows, torch.full_like(live.rows, t), going, Sampled(*drawn, values), ended)
        live = live._replace(ids=drawn[0][:, None], positions=live.positions + 1)
        # On a GPU a look at what has finished stalls the queue, so it happens now and then.
        if may_end and (device.type == "cpu" or t % 16 == 15):
            left = (going & ~ended).nonzero().squeeze(-1)
            if not len(left):
                break
            if model.runner.cache_shrinks and len(left) <= len(live.rows) * 7 // 8:
                cache.reorder_cache(cast(Any, left))
                live = live.keep(left)


def _read_prompts(model: ActorCritic, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Tensor | None]:
    """Run the prompts [N, P] through the model, equal ones only once; the cache then holds all.

    Returns:
        Logits [N, V] of the first tokens, and the values [N] before them (shared trunk only).
    """
    first, numbers = distinct(prompt_keys(ids, mask))
    if len(first) == len(ids) or not model.runner.cache_shrinks:
        return model.decode(ids, position_ids(mask), mask, cache)
    rows, number = (indices_on(ids.device, x) for x in (first, numbers))
    logits, values = model.decode(ids[rows], position_ids(mask[rows]), mask[rows], cache)
    cache.reorder_cache(cast(Any, number))
    return logits[number], None if values is None else values[number]


def prompt_keys(ids: Tensor, mask: Tensor) -> list[bytes]:
    """Return what is equal for equal ones of these prompts [B, P], on the host; waits for their device."""
    return [row.tobytes() for row in ids.masked_fill(~mask, -1).cpu().numpy()]


def distinct(keys: Sequence[bytes]) -> tuple[list[int], list[int]]:
    """Find equal keys: the first place [U] of each distinct one, and which of these each key is [N]."""
    numbers: dict[bytes, int] = {}
    first: list[int] = []
    for place, key in enumerate(keys):
        if key not in numbers:
            numbers[key] = len(first)
            first.append(place)
    return first, [numbers[key] for key in keys]
