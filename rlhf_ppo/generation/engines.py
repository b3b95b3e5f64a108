"""Engines: run the decoding loop as it is (dynamic) or with static shapes and CUDA graphs, and choose between them."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from rlhf_ppo.config.groups import RolloutSettings
from rlhf_ppo.generation.decoding import FixedShape, Step, decode_step, sample_responses
from rlhf_ppo.generation.rollout import SampledResponses, SamplingParams
from rlhf_ppo.generation.sampling import RowsOf
from rlhf_ppo.generation.stop_strings import StopStringDetector
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward.hidden_states import without_adapter_wrapper
from rlhf_ppo.models.sharding import is_sharded

_ROOM = 64


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
        whole: RowsOf | None = None,
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
    device = next(model.parameters()).device
    if args.generation == "static" and is_sharded(model):
        raise ValueError(
            "generation='static' captures CUDA graphs of weights that stay in place, but sharded ones are gathered "
            "anew for each rollout: set generation='dynamic' (or 'auto'), or sharding='none'"
        )
    dynamic_only = args.max_turns > 1 or args.min_new_tokens > 0 or len(args.stop_strings) > 0 or is_sharded(model)
    auto = args.generation == "auto"
    if args.generation == "dynamic" or (auto and (dynamic_only or device.type != "cuda")):
        return sample_responses
    try:
        # Not compiled: the question is whether the model can use a cache of fixed size at all.
        _require_exact_logprobs(StaticEngine(compile_step=False), model, device)
    except Exception as error:
        if auto:
            return sample_responses
        name = type(without_adapter_wrapper(model.policy)).__name__
        raise ValueError(
            f"generation={args.generation!r} does not work with model={name}: {error}; use generation='dynamic'"
        ) from error
    return StaticEngine(compile_step=device.type == "cuda")


def _require_exact_logprobs(engine: Sampler, model: ActorCritic, device: torch.device) -> None:
    """Sample two responses; raise an EngineError unless a full forward pass confirms log-probs and entropies."""
    if not (model.runner.pads_left and model.runner.uses_cache):
        raise EngineError("it cannot decode from a cache beside padded prompts")
    ids = model.runner.probe_ids().repeat(2, 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :5] = False
    generator = torch.Generator(device).manual_seed(0)
    sampled = engine(model, ids, mask, SamplingParams(max_new_tokens=6), generator=generator)
    with torch.no_grad():
        full = model(ids, mask, sampled.response_ids, sampled.mask)
    assert full.entropy is not None
    pairs = ((full.logprobs, sampled.logprobs), (full.entropy, sampled.entropy))
    gap = max(float((a - b).abs().max()) for a, b in pairs)
    # A model that attends to the wrong tokens is off by whole nats, or by hundredths if it is small; bfloat16, too.
    exact = full.logprobs.dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    if not gap < (1e-4 * max(1.0, float(full.logprobs.abs().max())) if exact else 0.25):
        raise EngineError(f"its log-probs are {gap:.3g} nats from those of a full forward pass")


class FixedLayer(StaticLayer):
    """transformers' cache layer of fixed size, which also takes keys and values of different precision."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new states, under autocast in the format in which attention reads them."""
        kind = key_states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else key_states.dtype
        return super().update(key_states.to(dtype), value_states.to(dtype), *args, **kwargs)


class StaticEngine:
    """Decoding with static shapes: on a CUDA GPU each decode step is one CUDA graph, however long the responses.

    Cache and compiled step are kept for the next rollout of the same shape; only the last shape is kept.
    """

    def __init__(self, *, compile_step: bool, backend: str = "inductor") -> None:
        self.compile_step = compile_step
        self.backend = backend
        self._shape: tuple[Any, ...] = ()
        self._fixed: FixedShape | None = None

    def __call__(
        self,
        model: ActorCritic,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        params: SamplingParams,
        *,
        generator: torch.Generator | None = None,
        stop_detector: StopStringDetector | None = None,
        whole: RowsOf | None = None,
    ) -> SampledResponses:
        """Sample as :func:`rlhf_ppo.generation.decoding.sample_responses` does: the same draws give the same tokens.

        If the step cannot be compiled, warn and sample again without compiling.

        Raises:
            ValueError: ``params`` has stop strings or a minimum length, which take the dynamic loop.
        """
        if params.stop_strings or params.min_new_tokens:
            raise ValueError("static decoding has neither stop_strings nor min_new_tokens: use generation='dynamic'")
        state = None if generator is None else generator.get_state()

        def sample() -> SampledResponses:
            fixed = self._prepare(
                model, len(prompt_ids), prompt_ids.shape[1] + params.max_new_tokens, params.temperature
            )
            return sample_responses(
                model, prompt_ids, prompt_mask, params, generator=generator, whole=whole, fixed=fixed
            )

        try:
            return sample()
        except Exception as error:
            if not self.compile_step:
                raise
            warnings.warn(f"the decode step cannot be compiled, so it runs uncompiled: {error}", stacklevel=2)
        self.compile_step, self._fixed = False, None
        if generator is not None and state is not None:
            generator.set_state(state)
        return sample()

    def _prepare(self, model: ActorCritic, batch: int, room: int, temperature: float) -> FixedShape:
        """Return cache and step for this shape: the last ones, emptied, where they fit."""
        # Rounded up, so that prompts of other lengths meet the same shape.
        room = -(-room // _ROOM) * _ROOM
        kind = next(model.parameters()).device.type
        shape = (model, batch, room, temperature, torch.is_autocast_enabled(kind))
        if self._fixed is not None and self._shape == shape:
            self._fixed.cache.reset()
            return self._fixed
        if self._fixed is not None and self.compile_step:
            # Free the old graphs: torch.compile refuses a ninth shape.
            torch.compiler.reset()
        self._fixed = None  # the old cache is freed before the new one is made
        cache = StaticCache(model.runner.config, room)
        cache.layers = [FixedLayer(room) if type(layer) is StaticLayer else layer for layer in cache.layers]
        step = decode_step(model, cache, temperature)
        if self.compile_step:
            mode = "reduce-overhead" if self.backend == "inductor" else None
            step = _copying(torch.compile(step, backend=self.backend, mode=mode, fullgraph=True, dynamic=False))
        self._shape, self._fixed = shape, FixedShape(cache, room, step)
        return self._fixed


def _copying(step: Step) -> Step:
    """Copy what ``step`` returns: a CUDA graph overwrites its results at the next step."""

    def copied(*inputs: Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(None if x is None else x.clone() for x in step(*inputs))  # pyright: ignore[reportCallIssue]

    return copied
