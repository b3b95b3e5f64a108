"""Slots: decode at most S responses at once; a slot whose response has ended takes the next waiting prompt.

The draws are numbered by response and token, so they do not depend on slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_ppo.generation import sampling
from rlhf_ppo.generation.decoding import distinct, prompt_keys, require_detector
from rlhf_ppo.generation.record import Record, Sampled
from rlhf_ppo.generation.rollout import SampledResponses, SamplingParams
from rlhf_ppo.generation.stop_strings import StopStringDetector
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward.runner import position_ids
from rlhf_ppo.models.forward.slot_cache import SlotCache
from rlhf_ppo.runtime.machine.signals import stop_if_asked
from rlhf_ppo.runtime.machine.transfers import Reading, indices_on

Step = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor, Tensor | None]]
"""(last tokens, their positions, draws, where stop tokens are banned or None) -> :class:`.Sampled`: all [S]."""


class Slots(NamedTuple):
    """What slots are decoded with."""

    cache: SlotCache
    step: Step
    """One decode step on ``cache``; what it returns is not overwritten by the next step."""
    fixed: bool
    """The step has one shape: slots stay when there are no more prompts, and attention reads all columns."""


class Pace(NamedTuple):
    """How often it is looked which responses have ended."""

    steps: int
    """Decode steps from one look to the next."""
    waits: bool
    """Each look waits for the device. False: it sees what was so at the look before, and nothing waits."""

    @classmethod
    def on(cls, device: torch.device) -> Pace:
        """Return the pace on a device."""
        # A GPU works off a queue, which a look at its newest results would empty.
        return cls(8, waits=False) if device.type == "cuda" else cls(1, waits=True)


def slot_step(model: ActorCritic, cache: SlotCache, params: SamplingParams) -> Step:
    """Return the decode step of the slots of ``cache``."""
    stops = torch.tensor(sorted(params.stop_token_ids), dtype=torch.long, device=cache.places.device)

    def step(tokens: Tensor, positions: Tensor, u: Tensor, early: Tensor | None) -> Any:
        cache.places.copy_(positions)
        attention = torch.arange(cache.layers[0].seen, device=positions.device) <= positions[:, None]
        logits, values = model.decode(tokens[:, None], positions[:, None], attention, cache)
        banned = None if early is None else (early, stops)
        return *sampling.sample_from_logits(logits, u, params.temperature, banned), values

    return step


class _State(NamedTuple):
    """The slots, [S] each; a slot whose response has ended computes on, and nothing of it is recorded."""

    rows: Tensor
    """Which responses these are."""
    tokens: Tensor
    """The last tokens, to be read next."""
    positions: Tensor
    """Their positions."""
    limits: Tensor
    """The positions of the last tokens that these responses read."""
    steps: Tensor
    """Tokens sampled so far."""
    alive: Tensor
    """bool, False where the response has ended."""


@torch.no_grad()
def sample_in_slots(
    model: ActorCritic,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    params: SamplingParams,
    u: Tensor,
    slots: Slots,
    *,
    pace: Pace | None = None,
    stop_detector: StopStringDetector | None = None,
) -> SampledResponses:
    """Sample as :func:`rlhf_ppo.generation.decoding.sample_responses` does, in order of the prompts.

    Prompts are read as soon as an eighth of the slots is free. Of each response at most ``2 * pace.steps - 1`` decode
    steps come after its end, one less than ``pace.steps`` where a look waits.

    Args:
        model, prompt_ids, prompt_mask, params, stop_detector: as there.
        u: [max_new_tokens, B] the draws.
        slots: with room for the longest prompt and max_new_tokens.
        pace: how often slots are looked at; None: as fits the device.
    """
    require_detector(params, stop_detector)
    run = _Decoding(model, prompt_ids, prompt_mask, params, u, slots, stop_detector)
    pace = pace or Pace.on(u.device)
    pace = pace if stop_detector is None else Pace(1, waits=True)
    while run.fill():
        look = None if pace.waits else Reading(run.state.alive)
        run.advance(pace.steps)
        run.free((look or Reading(run.state.alive)).wait().tolist())
    return run.record.responses(has_values=model.shares_trunk)


class _Decoding:
    """A rollout as it is decoded in slots."""

    def __init__(
        self,
        model: ActorCritic,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        params: SamplingParams,
        u: Tensor,
        slots: Slots,
        stop_detector: StopStringDetector | None,
    ) -> None:
        self.model, self.params, self.u, self.slots, self.stop_detector = model, params, u, slots, stop_detector
        self.prompt_ids, self.prompt_mask = prompt_ids, prompt_mask
        self.device = u.device
        self.record = Record(len(prompt_ids), params, u.device)
        self.stops = torch.tensor(sorted(params.stop_token_ids), dtype=torch.long, device=u.device)
        nothing = torch.zeros_like(slots.cache.places)
        self.state = _State._make([*(nothing.clone() for _ in _State._fields[:-1]), nothing.bool()])
        # What the host knows without asking the device.
        self.keys = prompt_keys(prompt_ids, prompt_mask)
        self.lengths: list[int] = prompt_mask.sum(dim=1).tolist()
        self.next = 0
        """The first prompt that waits."""
        self.left = [0] * len(nothing)
        """[S] tokens that the response in each slot may still get; 0: the slot is free."""
        self.ends = [0] * len(nothing)
        """[S] columns in use."""

    def fill(self) -> bool:
        """Let waiting prompts take free slots, or remove the slots that stay free; returns whether any is in use."""
        while True:
            free = [slot for slot, left in enumerate(self.left) if not left]
            if len(free) < max(1, len(self.left) // 8):
                return True
            if self.next == len(self.lengths):
                if 0 < len(free) < len(self.left) and not self.slots.fixed:
                    self._keep([slot for slot, left in enumerate(self.left) if left])
                return any(self.left)
            rows = range(self.next, min(self.next + len(free), len(self.lengths)))
            self.next = rows.stop
            self._start(free[: len(rows)], rows)

    def _start(self, slots: list[int], rows: range) -> None:
        """Read prompts into free slots, and sample the first tokens."""
        lengths = self.lengths[rows.start : rows.stop]
        here = slice(rows.start, rows.stop), slice(self.prompt_ids.shape[1] - max(lengths), None)
        ids, mask = self.prompt_ids[here], self.prompt_mask[here]
        found = distinct(self.keys[rows.start : rows.stop])
        first, number, index, row, length = (indices_on(self.device, x) for x in (*found, slots, rows, lengths))
        cache = self.model.runner.new_cache(ids.shape[1])
        logits, values = self.model.decode(ids[first], position_ids(mask[first]), mask[first], cache)
        self.slots.cache.insert(index, cache, number, length)
        values = None if values is None else values[number]
        banned = (torch.ones_like(mask[:, 0]), self.stops) if self.params.min_new_tokens else None
        drawn = sampling.sample_from_logits(logits[number], self.u[0, row], self.params.temperature, banned)
        sampled, new = Sampled(*drawn, values), torch.ones_like(row)
        ended = self._ends(sampled.tokens, row, new > 0)
        self.record.add(row, new - 1, new > 0, sampled, ended)
        last = length + (self.params.max_new_tokens - 2)
        started = _State(row, sampled.tokens, length, last, new, ~ended & (new < self.params.max_new_tokens))
        for old, states in zip(self.state, started, strict=True):
            old[index] = states
        for slot, tokens in zip(slots, lengths, strict=True):
            self.left[slot], self.ends[slot] = self.params.max_new_tokens - 1, tokens + 1

    def advance(self, steps: int) -> None:
        """Run at most this many decode steps."""
        params, state, count = self.params, self.state, min(steps, max(self.left))
        later = torch.arange(count, device=self.device)[:, None]
        number = state.steps + later  # [count, S]
        positions = torch.minimum(state.positions + later, state.limits)
        u = self.u[number.clamp(max=params.max_new_tokens - 1), state.rows]
        early = number < params.min_new_tokens
        used = max(end for end, left in zip(self.ends, self.left, strict=True) if left)
        found, tokens = list[Sampled](), state.tokens
        for j in range(count):
            stop_if_asked()
            if not self.slots.fixed:
                self.slots.cache.read(min(used + j, self.slots.cache.room))
            banned = early[j] if params.min_new_tokens else None
            found.append(Sampled(*self.slots.step(tokens, positions[j], u[j], banned)))
            tokens = found[-1].tokens
        sampled = Sampled(*(None if x[0] is None else torch.stack(x) for x in zip(*found, strict=True)))  # pyright: ignore
        alive = state.alive & (number < params.max_new_tokens)
        ended = self._ends(sampled.tokens, state.rows, alive)
        before = ended.cumsum(dim=0) > ended.long()
        number = number.clamp(max=params.max_new_tokens - 1)
        self.record.add(state.rows.expand_as(number), number, alive & ~before, sampled, ended)
        steps_now = state.steps + count
        alive = state.alive & ~ended.any(dim=0) & (steps_now < params.max_new_tokens)
        self.state = state._replace(tokens=tokens, positions=state.positions + count, steps=steps_now, alive=alive)
        self.left = [max(0, left - count) for left in self.left]
        self.ends = [end + count for end in self.ends]

    def free(self, alive: Sequence[bool]) -> None:
        """Note which slots' responses have ended."""
        self.left = [left if lives else 0 for left, lives in zip(self.left, alive, strict=True)]

    def _ends(self, tokens: Tensor, rows: Tensor, alive: Tensor) -> Tensor:
        """Return [*] bool, True where a token ends its response."""
        ended = torch.isin(tokens, self.stops)
        if self.stop_detector is not None:
            rows = rows.expand_as(tokens)
            ended[alive] |= self.stop_detector.add(tokens[alive], rows[alive])
        return ended

    def _keep(self, slots: list[int]) -> None:
        index = indices_on(self.device, slots)
        self.slots.cache.keep(index)
        self.state = _State(*(x[index] for x in self.state))
        self.left, self.ends = ([x[slot] for slot in slots] for x in (self.left, self.ends))
