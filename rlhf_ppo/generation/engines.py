"""Engines: decode dynamically or with static shapes and CUDA graphs, all responses or some at once; choose one."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_ppo.config.groups import RolloutSettings
from rlhf_ppo.core.kernels.vocabulary_blocks import under_autocast
from rlhf_ppo.generation import sampling
from rlhf_ppo.generation.decoding import sample_responses
from rlhf_ppo.generation.rollout import SampledResponses, SamplingParams
from rlhf_ppo.generation.slots import Pace, Slots, Step, sample_in_slots, slot_step
from rlhf_ppo.generation.stop_strings import StopStringDetector
from rlhf_ppo.models.acceleration.named_kernels import is_flash
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward.hidden_states import without_adapter_wrapper
from rlhf_ppo.models.forward.slot_cache import SlotCache, count_slot_layers
from rlhf_ppo.models.sharded.sharding import gathered, is_sharded

_ROOM = 64
"""A static cache's room is rounded up to multiples of this, so that prompts of other lengths meet the same shape."""


class Sampler(Protocol):
    """Sample responses as :func:`rlhf_ppo.generation.decoding.sample_responses` does."""

    def __call__(
        self,
        model: ActorCritic,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        params: SamplingParams,
        /,
        *,
        generator: torch.Generator | None = None,
        stop_detector: StopStringDetector | None = None,
        whole: sampling.RowsOf | None = None,
    ) -> SampledResponses: ...


class EngineError(RuntimeError):
    """An engine does not sample from this model's distribution."""


def choose_engine(args: RolloutSettings, model: ActorCritic) -> Sampler:
    """Return the engine of ``args.generation``, checked on this model.

    "auto" is static on a CUDA GPU if the model allows it and no setting needs the dynamic loop.

    Args:
        args: the settings.
        model: on its device already.
    Raises:
        ValueError: the engine does not give this model's log-probs.
    """
    device, slots = next(model.parameters()).device, args.decode_batch_size
    if args.generation == "static" and is_sharded(model):
        raise ValueError(
            "generation='static' captures CUDA graphs of weights that stay in place, but sharded ones are gathered "
            "anew for each rollout: set generation='dynamic' (or 'auto'), or sharding='none'"
        )
    dynamic_only = args.max_turns > 1 or len(args.stop_strings) > 0 or is_sharded(model)
    dynamic_only |= is_flash(model.runner.config._attn_implementation)  # it counts tokens on the host
    if args.generation == "static" or (args.generation == "auto" and device.type == "cuda" and not dynamic_only):
        # Not compiled: the question is whether the model can use a cache of fixed size at all.
        problem = _problem(StaticEngine(compile_step=False, slots=2), model, device)
        if problem is None:
            return StaticEngine(compile_step=device.type == "cuda", slots=slots)
        if args.generation == "static":
            name = type(without_adapter_wrapper(model.policy)).__name__
            raise ValueError(
                f"generation='static' does not work with model={name}: {problem}; use generation='dynamic'"
            ) from problem
    if slots is None:
        return sample_responses
    if _problem(partial(sample_with_refill, slots=2), model, device) is None:
        return partial(sample_with_refill, slots=slots)
    return partial(sample_responses, at_once=slots)


def _problem(engine: Sampler, model: ActorCritic, device: torch.device) -> Exception | None:
    """Sample three responses, two at once; return what is wrong if a full forward pass does not confirm them."""
    if not slot_layers(model, _ROOM):
        return EngineError("it cannot decode from a cache of keys and values of all tokens, beside padded prompts")
    ids = model.runner.probe_ids().repeat(3, 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :5] = False
    generator = torch.Generator(device).manual_seed(0)
    try:
        with gathered(model):
            sampled = engine(model, ids, mask, SamplingParams(max_new_tokens=6), generator=generator)
            with torch.no_grad():
                full = model(ids, mask, sampled.response_ids, sampled.mask)
    except Exception as error:
        return error
    assert full.entropy is not None
    pairs = ((full.logprobs, sampled.logprobs), (full.entropy, sampled.entropy))
    gap = max(float((a - b).abs().max()) for a, b in pairs)
    # A model that attends to the wrong tokens is off by whole nats, or by hundredths if it is small; bfloat16, too.
    exact = full.logprobs.dtype == torch.float32 and not under_autocast(device)
    if gap < (1e-4 * max(1.0, float(full.logprobs.abs().max())) if exact else 0.25):
        return None
    return EngineError(f"its log-probs are {gap:.3g} nats from those of a full forward pass")


def sample_with_refill(
    model: ActorCritic,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    params: SamplingParams,
    *,
    slots: int,
    generator: torch.Generator | None = None,
    stop_detector: StopStringDetector | None = None,
    whole: sampling.RowsOf | None = None,
) -> SampledResponses:
    """Sample as :func:`rlhf_ppo.generation.decoding.sample_responses` does, at most ``slots`` responses at once."""
    (batch, length), prompts = prompt_ids.shape, (prompt_ids, prompt_mask, params)
    room = length + params.max_new_tokens
    if batch <= slots or not slot_layers(model, room):
        others = {"stop_detector": stop_detector, "whole": whole, "at_once": slots}
        return sample_responses(model, *prompts, generator=generator, **others)
    u = sampling.uniforms(params.max_new_tokens, batch, generator, prompt_ids.device, whole)
    cache = new_slot_cache(model, slots, room)
    step = Slots(cache, slot_step(model, cache, params), fixed=False)
    return sample_in_slots(model, prompt_ids, prompt_mask, params, u, step, stop_detector=stop_detector)


class StaticEngine:
    """Decoding with static shapes: on a CUDA GPU each decode step is one CUDA graph, however long the responses.

    Cache and compiled step are kept for the next rollout of the same shape; only the last shape is kept. The graph
    holds the weights by reference: it stays right while they change in place, in the format that they had.
    """

    def __init__(
        self, *, compile_step: bool, slots: int | None = None, backend: Any = "inductor", pace: Pace | None = None
    ) -> None:
        """Start without a cache.

        Args:
            compile_step: compile the decode step.
            slots: decode so many responses at once; None: all of a rollout's.
            backend: torch.compile's.
            pace: how often slots are looked at; None: as fits the device.
        """
        self.compile_step, self.slots, self.backend, self.pace = compile_step, slots, backend, pace
        self._shape: tuple[Any, ...] = ()
        self._fixed: Slots | None = None

    def __call__(
        self,
        model: ActorCritic,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        params: SamplingParams,
        *,
        generator: torch.Generator | None = None,
        stop_detector: StopStringDetector | None = None,
        whole: sampling.RowsOf | None = None,
    ) -> SampledResponses:
        """Sample as :func:`rlhf_ppo.generation.decoding.sample_responses` does: the same draws give the same tokens.

        That function samples where an attention window is shorter than the sequences. If the step cannot be compiled,
        warn and sample again without compiling.

        Raises:
            ValueError: ``params`` has stop strings, which take the dynamic loop.
        """
        if params.stop_strings:
            raise ValueError(
                "static decoding has no stop_strings, which are read at each step: use generation='dynamic'"
            )
        (batch, length), prompts = prompt_ids.shape, (prompt_ids, prompt_mask, params)
        room = -(-(length + params.max_new_tokens) // _ROOM) * _ROOM
        if not slot_layers(model, room):
            return sample_responses(model, *prompts, generator=generator, whole=whole, at_once=self.slots)
        u = sampling.uniforms(params.max_new_tokens, batch, generator, prompt_ids.device, whole)

        def sample() -> SampledResponses:
            fixed = self._prepare(model, self.slots or batch, room, params)
            return sample_in_slots(model, prompt_ids, prompt_mask, params, u, fixed, pace=self.pace)

        try:
            return sample()
        except Exception as error:
            if not self.compile_step:
                raise
            warnings.warn(f"the decode step cannot be compiled, so it runs uncompiled: {error}", stacklevel=2)
        self.compile_step, self._fixed = False, None
        return sample()

    def _prepare(self, model: ActorCritic, slots: int, room: int, params: SamplingParams) -> Slots:
        """Return cache and step for this shape: the last ones, where they fit."""
        weights = next(model.policy.parameters())
        formats = (weights.dtype, under_autocast(weights.device))
        banned = params.stop_token_ids if params.min_new_tokens else ()
        shape = (model, slots, room, params.temperature, banned, formats)
        if self._fixed is not None and self._shape == shape:
            return self._fixed
        if self._fixed is not None and self.compile_step:
            # Free the old graphs: torch.compile refuses a ninth shape.
            torch.compiler.reset()
        self._fixed = None  # the old cache is freed before the new one is made
        cache = new_slot_cache(model, slots, room)
        step = slot_step(model, cache, params)
        if self.compile_step:
            mode = "reduce-overhead" if self.backend == "inductor" else None
            step = _copying(torch.compile(step, backend=self.backend, mode=mode, fullgraph=True, dynamic=False))
        self._shape, self._fixed = shape, Slots(cache, step, fixed=True)
        return self._fixed


def slot_layers(model: ActorCritic, room: int) -> int:
    """Return the number of the model's layers, if slots for ``room`` tokens can hold what they cache; else 0."""
    runner = model.runner
    return count_slot_layers(runner.config, room) if runner.pads_left and runner.uses_cache else 0


def new_slot_cache(model: ActorCritic, slots: int, room: int) -> SlotCache:
    """Return an empty cache of slots."""
    return SlotCache(slot_layers(model, room), slots, room, next(model.policy.parameters()).device)


def _copying(step: Step) -> Step:
    """Copy what ``step`` returns: a CUDA graph overwrites its results at the next step."""

    def copied(*inputs: Tensor | None) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(None if x is None else x.clone() for x in step(*inputs))  # pyright: ignore

    return copied
