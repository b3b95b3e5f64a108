"""Engines: other ways to run the model while sampling, each recording what ``sample_responses`` records."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from rlhf_ppo.generation.rollout import FixedShape, Sampled, Step, decoding_step, sample_responses
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward.hidden_states import without_adapter_wrapper

Sampler = Callable[..., Sampled]
"""``sample(model, prompt_ids, prompt_mask, *, max_new_tokens, temperature, stop_token_ids, generator)``, by the rules
of :func:`rlhf_ppo.generation.rollout.sample_responses`."""

_ROOM = 64


class GenerationError(RuntimeError):
    """An engine did not give one whole response to each prompt."""


def choose_engine(generation: Literal["auto", "dynamic", "static"], model: ActorCritic) -> Sampler:
    """The engine of that name, tried out on this model; "auto" takes static on a CUDA GPU if the model allows it.

    Args:
        generation: the setting.
        model: on its device already.
    Raises:
        ValueError: the engine does not give this model's log-probs.
    """
    device = next(model.parameters()).device
    if generation == "dynamic" or (generation == "auto" and device.type != "cuda"):
        return sample_responses
    # The first try is not compiled: it asks whether the model can use the cache at all.
    try:
        _try_out(StaticEngine(compile_step=False), model, device)
    except Exception as error:
        if generation == "auto":
            return sample_responses
        name = type(without_adapter_wrapper(model.policy)).__name__
        raise ValueError(
            f"generation={generation!r} does not work with model={name}: {error}; use generation='dynamic'"
        ) from error
    return StaticEngine(compile_step=device.type == "cuda")


def _try_out(engine: Sampler, model: ActorCritic, device: torch.device) -> None:
    """Two responses, whose log-probs and entropies a full forward pass must confirm."""
    if not (model.reader.pads_left and model.reader.keeps_states):
        raise GenerationError("it cannot decode from a cache beside padded prompts")
    ids = model.reader.probe_ids().repeat(2, 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :5] = False
    generator = torch.Generator(device).manual_seed(0)
    sampled = engine(model, ids, mask, max_new_tokens=6, temperature=1.0, stop_token_ids=(), generator=generator)
    with torch.no_grad():
        again = model(ids, mask, sampled.response_ids, sampled.mask)
    assert again.entropy is not None
    pairs = ((again.logprobs, sampled.logprobs), (again.entropy, sampled.entropy))
    gap = max(float((a - b).abs().max()) for a, b in pairs)
    # A model that attends to the wrong tokens is off by whole nats, or by hundredths if it is small; bfloat16, too.
    exact = again.logprobs.dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    if not gap < (1e-4 * max(1.0, float(again.logprobs.abs().max())) if exact else 0.25):
        raise GenerationError(f"its log-probs are {gap:.3g} nats from those of a full forward pass")


class FixedLayer(StaticLayer):
    """transformers' layer of fixed size, which also takes keys and values of different precision."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new states; under autocast in the format in which attention will read them."""
        kind = key_states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else key_states.dtype
        return super().update(key_states.to(dtype), value_states.to(dtype), *args, **kwargs)


class StaticEngine:
    """Decoding with fixed shapes: on a CUDA GPU each step is one CUDA graph, whatever the length of the responses.

    Cache and compiled step are kept for the next rollout of the same shape; only the last shape is kept.
    """

    def __init__(self, *, compile_step: bool, backend: str = "inductor") -> None:
        """Compile the step or not."""
        self.compile_step = compile_step
        self.backend = backend
        self._shape: tuple[Any, ...] = ()
        self._fixed: FixedShape | None = None

    def __call__(
        self,
        model: ActorCritic,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        max_new_tokens: int,
        temperature: float,
        stop_token_ids: Collection[int],
        generator: torch.Generator | None = None,
    ) -> Sampled:
        """See :func:`rlhf_ppo.generation.rollout.sample_responses`: the same draws give the same tokens.

        A step that cannot be compiled is a warning, and the rollout starts again without compiling.
        """
        state = None if generator is None else generator.get_state()
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "stop_token_ids": stop_token_ids}

        def sample() -> Sampled:
            fixed = self._prepare(model, len(prompt_ids), prompt_ids.shape[1] + max_new_tokens, temperature)
            return sample_responses(model, prompt_ids, prompt_mask, generator=generator, fixed=fixed, **settings)

        try:
            return sample()
        except Exception as error:
            if not self.compile_step:
                raise
            warnings.warn(f"the decoding step cannot be compiled, so it runs as it is: {error}", stacklevel=2)
        self.compile_step, self._fixed = False, None
        if generator is not None and state is not None:
            generator.set_state(state)
        return sample()

    def _prepare(self, model: ActorCritic, batch: int, room: int, temperature: float) -> FixedShape:
        # Rounded up, so that prompts of other lengths meet the same shape.
        room = -(-room // _ROOM) * _ROOM
        kind = next(model.parameters()).device.type
        shape = (model, batch, room, temperature, torch.is_autocast_enabled(kind))
        if self._fixed is not None and self._shape == shape:
            self._fixed.cache.reset()
            return self._fixed
        if self._fixed is not None and self.compile_step:
            # Frees the old graphs, and past eight shapes torch.compile would refuse a ninth.
            torch.compiler.reset()
        self._fixed = None  # the old cache is freed before the new one is made
        cache = StaticCache(model.reader.config, room)
        cache.layers = [FixedLayer(room) if type(layer) is StaticLayer else layer for layer in cache.layers]
        step = decoding_step(model, cache, temperature)
        if self.compile_step:
            mode = "reduce-overhead" if self.backend == "inductor" else None
            step = _owned(torch.compile(step, backend=self.backend, mode=mode, fullgraph=True, dynamic=False))
        self._shape, self._fixed = shape, FixedShape(cache, room, step)
        return self._fixed


def _owned(step: Step) -> Step:
    """Copies of what ``step`` returns: a CUDA graph overwrites its results at the next step."""

    def copied(*inputs: Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(None if x is None else x.clone() for x in step(*inputs))  # pyright: ignore[reportCallIssue]

    return copied
