"""Engines: other ways to run the model while sampling, each recording what ``sample_responses`` records."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StaticCache
from transformers.cache_utils import StaticLayer

from rlhf_ppo.generation.rollout import FixedShape, Rollout, Sampled, Step, decoding_step, sample_responses
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward import without_adapter_wrapper

Sampler = Callable[..., Sampled]
"""``sample(model, prompt_ids, prompt_mask, *, max_new_tokens, temperature, stop_token_ids, generator)``, by the rules
of :func:`rlhf_ppo.generation.rollout.sample_responses`."""

_ROOM = 64
_PAGE = 16


class GenerationError(RuntimeError):
    """An engine did not give one whole response to each prompt."""


def choose_engine(
    generation: Literal["auto", "dynamic", "static", "continuous"], model: ActorCritic, *, max_tokens: int
) -> Sampler:
    """The engine of that name, tried out on this model; "auto" takes static on a CUDA GPU if the model allows it.

    Args:
        generation: the setting.
        model: on its device already.
        max_tokens: most tokens in one pass outside decoding.
    Raises:
        ValueError: the engine does not give this model's log-probs.
    """
    device = next(model.parameters()).device
    if generation == "dynamic" or (generation == "auto" and device.type != "cuda"):
        return sample_responses
    # The first try is not compiled: it asks whether the model can use the cache at all.
    engine = ContinuousEngine(max_tokens) if generation == "continuous" else StaticEngine(compile_step=False)
    try:
        _try_out(engine, model, device)
    except Exception as error:
        if generation == "auto":
            return sample_responses
        name = type(without_adapter_wrapper(model.policy)).__name__
        raise ValueError(
            f"generation={generation!r} does not work with model={name}: {error}; use generation='dynamic'"
        ) from error
    return engine if generation == "continuous" else StaticEngine(compile_step=device.type == "cuda")


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


class ContinuousEngine:
    """transformers' continuous batching, in this process and with the weights that are trained."""

    def __init__(self, max_tokens: int) -> None:
        """``max_tokens``: most tokens in one pass through the model."""
        self.max_tokens = max_tokens

    @torch.no_grad()
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
        """See :func:`~rlhf_ppo.generation.rollout.sample_responses`; entropies and values come from one forward pass.

        Raises:
            GenerationError: transformers failed on a prompt; carries its reason.
        """
        from transformers.generation.configuration_utils import ContinuousBatchingConfig  # not in transformers 5.5

        device = prompt_ids.device
        prompts = [ids[keep].tolist() for ids, keep in zip(prompt_ids, prompt_mask, strict=True)]
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
        settings = GenerationConfig(
            do_sample=True,
            temperature=temperature,
            # Whatever is left out here stays as GenerationConfig has it; top_k would be 50.
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(stop_token_ids) or -1,
        )
        pages = sum(-(-(len(ids) + max_new_tokens) // _PAGE) + 1 for ids in prompts)
        batching = ContinuousBatchingConfig(
            return_logprobs=True,
            # Blocks are found by their tokens alone, so after an update they would answer with the old weights.
            allow_block_sharing=False,
            auto_switch_to_flash=False,
            use_async_batching=False,
            page_size=_PAGE,
            # Room for all prompts at once; left alone, the cache takes most of the machine's free memory.
            num_blocks=2 * pages,
            max_batch_tokens=max(512, len(prompts)),
            seed=seed,
        )
        results = _generate(without_adapter_wrapper(model.policy), prompts, settings, batching)
        longest = max(len(result.generated_tokens) for result in results)
        response_ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask, logprobs = torch.zeros_like(response_ids, dtype=torch.bool), torch.zeros(len(prompts), longest)
        for row, result in enumerate(results):
            n = len(result.generated_tokens)
            response_ids[row, :n], mask[row, :n] = torch.tensor(result.generated_tokens), True
            logprobs[row, :n] = torch.tensor(result.logprobs)
        finished = torch.tensor([result.generated_tokens[-1] in stop_token_ids for result in results])
        response_ids, mask, logprobs, finished = (x.to(device) for x in (response_ids, mask, logprobs, finished))
        entropy, values = self._read(model, prompt_ids, prompt_mask, response_ids, mask, temperature)
        return Sampled(response_ids, mask, finished, logprobs, entropy, values)

    def _read(
        self, model: ActorCritic, prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor | None]:
        """Entropies and values [B, T] of whole responses."""
        entropy, values = torch.zeros(mask.shape, device=mask.device), torch.zeros(mask.shape, device=mask.device)
        rollout = Rollout([], {}, prompt_ids, prompt_mask, ids, mask, mask[:, -1], values, entropy, None)
        padded = not model.reader.packs_on(mask.device)
        for rows in rollout.batches(range(len(mask)), self.max_tokens, padded=padded):
            part = rollout.sequences(rows)
            read, length = model(*part, temperature=temperature), part.mask.shape[1]
            entropy[rows, :length] = read.entropy.float()
            if read.values is not None:
                values[rows, :length] = read.values.float()
        return entropy, None if model.value_head is None else values


def _generate(model: Any, prompts: list[list[int]], settings: GenerationConfig, batching: Any) -> list[Any]:
    """One finished result for each prompt, in the order of the prompts.

    This is ``model.generate_batch``, but all requests are queued before the loop starts: otherwise it depends on the
    clock which prompts share the first batch, and with it every draw.
    """
    results: dict[str, Any] = {}
    with _lent(model):
        manager = model.init_continuous_batching(settings, batching)
        if torch.is_autocast_enabled(model.device.type):
            manager.model = cast(Any, _InAutocast(model, model.device.type))
        names = manager.add_requests(prompts, max_new_tokens=settings.max_new_tokens)
        manager.warmup()  # what fails before the first step is raised here, and not logged
        manager.start()
        try:
            manager.stop()  # once every request is done
        except BaseException:
            manager.stop(hard_stop=True)
            raise
        finally:
            manager.destroy()
        while (result := manager.get_result(timeout=0)) is not None:
            results[result.request_id] = result
    fatal = manager.background_thread_status.fatal_error
    for number, name in enumerate(names):
        # A failed request, or a dead loop, is logged by transformers and not raised.
        result = results.get(name)
        if result is None or result.error is not None or not result.generated_tokens:
            raise GenerationError(
                f"continuous batching gave {len(results)} results for {len(names)} prompts; prompt {number}: "
                f"{(result and result.error) or fatal or 'no result and no reason'}"
            ) from fatal
        if len(result.logprobs) != len(result.generated_tokens):
            raise GenerationError(
                f"prompt {number}: {len(result.logprobs)} log-probs for {len(result.generated_tokens)} tokens"
            )
    return [results[name] for name in names]


@contextmanager
def _lent(model: nn.Module) -> Iterator[None]:
    """Lend a model to transformers' generation thread: random state and attention come back as they were."""
    config, device = cast(Any, model).config, next(model.parameters()).device
    attention = config._attn_implementation
    if not hasattr(model, "init_continuous_batching"):
        raise ValueError(f"{type(model).__name__} has no generate_batch")
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        if config._attn_implementation != attention:
            cast(Any, model).set_attn_implementation(attention)


class _InAutocast:
    """A model as the generation thread is to see it: in this thread's precision, for autocast is a thread's own."""

    def __init__(self, model: Any, kind: str) -> None:
        self.model, self.kind = model, kind
        self.dtype = torch.get_autocast_dtype(kind)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, cache: Any, **kwargs: Any) -> Any:
        # Not a context manager: leaving it would throw away the weights in bfloat16 after every step.
        torch.set_autocast_dtype(self.kind, self.dtype)
        torch.set_autocast_enabled(self.kind, True)
        if "update" not in vars(cache):
            cache.update = self._in_one_format(cache.update)
        return self.model(*args, cache=cache, **kwargs)

    def _in_one_format(self, update: Callable[..., Any]) -> Callable[..., Any]:
        """Autocast leaves rotary keys in float32 and values in bfloat16; the cache has one format for both."""

        def casting(key_states: Tensor, value_states: Tensor, **kwargs: Any) -> Any:
            return update(key_states.to(self.dtype), value_states.to(self.dtype), **kwargs)

        return casting
