"""Run a model on prompts with responses: hidden states, logits and log-probs at response tokens, and decode steps."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlhf_ppo.core import BannedTokens
from rlhf_ppo.core.kernels.linear_logprobs import project
from rlhf_ppo.core.types import compute_dtype
from rlhf_ppo.models.forward.hidden_states import (
    accepts,
    call,
    capture_states,
    last_states,
    probe_ids,
    without_adapter_wrapper,
)
from rlhf_ppo.models.forward.kv_cache import TokenCache, preallocated_cache
from rlhf_ppo.models.forward.layout import Layout
from rlhf_ppo.models.forward.output_layer import Outputs, find_plain_head, vocabulary_as_rows
from rlhf_ppo.models.forward.packing import Packing, packed_attention


class Sequences(NamedTuple):
    """B prompts with their responses."""

    prompt_ids: Tensor
    """[B, P] left-padded."""
    prompt_mask: Tensor
    """[B, P] bool."""
    response_ids: Tensor
    """[B, T] right-padded."""
    mask: Tensor
    """[B, T] bool, True on tokens that the policy chose."""
    real: Tensor | None = None
    """[B, T] bool, True on every real token, an environment's included; None: all of them are the policy's."""
    banned: BannedTokens | None = None
    """Tokens that could not be sampled at [B, T] places, True only where ``mask`` is; None: nowhere."""
    layout: Layout | None = None
    """Where the tokens lie; None: it is read from the masks (:meth:`laid_out`)."""

    def laid_out(self) -> tuple[Sequences, Layout]:
        """Return these sequences with their layout."""
        layout = self.layout or Layout.read(self.prompt_mask, self.mask, self.real)
        return self._replace(layout=layout), layout

    @property
    def inputs(self) -> Tensor:
        """Token ids [B, P + T - 1]: all but the last, which predicts nothing here."""
        return torch.cat([self.prompt_ids, self.response_ids[:, :-1]], dim=1)


def position_ids(mask: Tensor) -> Tensor:
    """Return positions [B, L] that count real tokens only, so that left padding changes nothing."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


class ModelRunner:
    """Run a model on response tokens, [n] in the order of :class:`.Layout`, and decode step by step.

    The plain way is one forward pass over the padded batch and log-probs from its logits. Two shortcuts are taken where
    a test on the model shows that they give the same: the output layer runs inside ``linear_logprobs`` (if the logits
    are a linear map of the last hidden states), and sequences are packed end to end. Where
    :func:`rlhf_ppo.models.forward.forward_checks.check_forward` finds that the model needs it, slower ways are taken:
    ``pads_left``, ``uses_cache`` and ``cache_shrinks`` say which.
    """

    pads_left = True
    """Padding may precede a sequence, with positions that do not count it; False: padding goes behind."""
    uses_cache = True
    """Decoding caches keys, values and states of earlier tokens; False: each step runs over all tokens again."""
    cache_shrinks = True
    """Rows that have ended are removed from the cache."""

    def __init__(self, model: nn.Module, *, plain: bool = False) -> None:
        """Find the model's trunk and output layer, and the shortcuts that it allows; none if ``plain``."""
        self.model, self.plain = model, plain
        base = without_adapter_wrapper(model)
        self.trunk: nn.Module = base.base_model
        if self.trunk is base and base.get_output_embeddings() is not None:
            self.trunk = base.model  # Llama 4 names its trunk as its base class does not
        self.config = base.config
        self.has_head = self.trunk is not base
        self.states_module = self.trunk
        """The module that returns the last hidden states when the whole model is called."""
        self.output_layer = None if plain or not self.has_head else base.get_output_embeddings()
        self.find_shortcuts()

    def find_shortcuts(self) -> None:
        """Find by a few tokens what the model allows; again once weights that were deferred are there."""
        base = without_adapter_wrapper(self.model)
        logits, states = self._first_outputs(base)
        self.width = states.shape[-1] if states.shape[:-1] == (1, 8) else None
        """Width of the last hidden states; None: they are not [B, L, O]."""
        self.head = None if self.plain else find_plain_head(base, logits, states)
        self.packs = not self.plain and self._can_pack()

    # Response tokens

    def hidden(self, sequences: Sequences) -> Tensor:
        """Compute the last hidden states [n, O] before each response token."""
        sequences, layout = sequences.laid_out()
        if self.packs_on(layout.device):
            packed = layout.packed
            with packed_attention(self.config, packed.packing):
                states = last_states(call(self.trunk, _packed_ids(sequences, layout), packed.positions))
            return states.squeeze(0).index_select(0, packed.before)
        if not self.pads_left:
            order, before = layout.aligned
            states = last_states(call(self.trunk, sequences.inputs.gather(1, order)))
            return states.flatten(0, 1).index_select(0, before)
        attention = _attended(sequences)
        states = last_states(call(self.trunk, sequences.inputs, position_ids(attention), attention))
        return states.flatten(0, 1).index_select(0, layout.before)

    def outputs(self, sequences: Sequences, *, hidden: bool = False) -> Outputs:
        """Compute the distributions at the response tokens, with the hidden states if asked."""
        sequences, layout = sequences.laid_out()
        banned = sequences.banned
        if banned is not None:
            banned = BannedTokens(layout.select(banned.where), banned.tokens)
        if self.head is not None:
            return Outputs(_exact(self.hidden(sequences)), self.head, None, banned)
        with vocabulary_as_rows(self.output_layer):
            logits, states = self._logits(sequences, layout, hidden=hidden)
        return Outputs(states, None, logits, banned)

    def _logits(self, sequences: Sequences, layout: Layout, *, hidden: bool) -> tuple[Tensor, Tensor | None]:
        """Compute logits [n, V] by the model's own forward pass, and the last hidden states [n, O] if asked."""
        with capture_states(self.states_module) if hidden else nullcontext([]) as captured:
            if self.packs_on(layout.device):
                packed, ids = layout.packed, _packed_ids(sequences, layout)
                with packed_attention(self.config, packed.packing):
                    output = call(self.model, ids, packed.positions, logits_to_keep=packed.before)
                # squeeze, not [0]: the gradient of an index is copied into zeros of the logits' size.
                logits, index = output.logits.squeeze(0), packed.before
            elif not self.pads_left:
                order, index = layout.aligned
                logits = call(self.model, sequences.inputs.gather(1, order)).logits.flatten(0, 1).index_select(0, index)
            else:
                length, attention = layout.mask.shape[1], _attended(sequences)
                kwargs = {"logits_to_keep": length} if accepts(self.model, "logits_to_keep") else {}
                output = call(self.model, sequences.inputs, position_ids(attention), attention, **kwargs)
                # A slice, even of everything, has its gradient copied into zeros of the whole's size.
                logits = output.logits if output.logits.shape[1] == length else output.logits[:, -length:]
                logits, index = layout.select(logits), layout.before
        return logits, captured[0].flatten(0, 1).index_select(0, index) if captured else None

    # Decoding

    def new_cache(self, capacity: int) -> Any:
        """Return an empty cache for at most ``capacity`` tokens."""
        return preallocated_cache(self.config, capacity) if self.uses_cache else TokenCache()

    @torch.no_grad()
    def decode_step(
        self, ids: Tensor, positions: Tensor, attention: Tensor, cache: Any, *, hidden: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run one decode step: logits [B, V] of the next token and, if asked, the last hidden state [B, O]."""
        inputs: tuple[Any, ...] = (ids, positions, attention)
        kwargs: dict[str, Any] = {"cache": cache}
        newest: Any = (slice(None), -1)
        if isinstance(cache, TokenCache):
            ids, ends = cache.add(ids, attention)
            inputs, kwargs, newest = (ids,), {}, (torch.arange(len(ids), device=ids.device), ends)
        with _attention_for(ids):
            if self.head is not None:
                state = last_states(call(self.trunk, *inputs, **kwargs))[newest]
                return project(_exact(state), self.head.weight, self.head.bias), state
            if self.uses_cache and accepts(self.model, "logits_to_keep"):
                kwargs["logits_to_keep"] = 1
            capturing = capture_states(self.states_module) if hidden else nullcontext([])
            with vocabulary_as_rows(self.output_layer), capturing as captured:
                logits = call(self.model, *inputs, **kwargs).logits
        return logits[newest].float(), captured[0][newest] if captured else None

    # What the model allows

    def copy_layout(self, other: ModelRunner) -> None:
        """Use the layout of another runner of the same model."""
        self.packs, self.pads_left = other.packs, other.pads_left

    def require_width(self) -> int:
        """Return the width of the last hidden states, for a value head on them.

        Raises:
            ValueError: they are not one vector per token.
        """
        if self.width is None:
            raise ValueError(
                f"the last hidden states of {self.config.model_type!r} are not one vector per token, so no value head "
                "fits on them: name another value_model, or take an objective without a critic (objective='reinforce')"
            )
        return self.width

    def packs_on(self, device: torch.device) -> bool:
        """Return whether sequences are packed on this device."""
        return self.packs and device.type in ("cpu", "cuda")

    def probe_ids(self, length: int = 8) -> Tensor:
        """Return token ids [1, length] to test the model with."""
        return probe_ids(self.model, length)

    @torch.no_grad()
    def _first_outputs(self, base: Any) -> tuple[Tensor | None, Tensor]:
        """Compute logits [1, 8, V] and last hidden states [1, 8, O] of eight tokens.

        Raises:
            ValueError: the model cannot run on token ids alone.
        """
        try:
            with capture_states(self.trunk) as captured:
                output = call(self.model, self.probe_ids())
            if not captured:  # OPT calls a module inside its trunk
                self.states_module = base.get_decoder()
                with capture_states(self.states_module) as captured:
                    call(self.model, self.probe_ids())
            return (output.logits if self.has_head else None), captured[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            adapter = "" if base is self.model else " with this adapter"
            raise ValueError(
                f"{base.config.model_type!r} ({type(base).__name__}) cannot run on token ids alone{adapter} "
                f"({type(error).__name__}: {error}): take a decoder-only causal language model (GPT-2, Llama, Qwen)"
                + (", or name other layers for the adapter" if adapter else "")
            ) from error

    def _can_pack(self) -> bool:
        """Return whether packed sequences give what the same sequences give one by one."""
        text = self.config.get_text_config()
        if self.config._attn_implementation != "sdpa" or getattr(text, "sliding_window", None) is not None:
            return False
        if set(getattr(text, "layer_types", None) or ()) - {"full_attention"}:
            return False  # a chunk or window of thousands of tokens would not show in the few below
        if not accepts(self.trunk, "position_ids") or next(self.model.parameters()).dtype != torch.float32:
            return False
        ids = self.probe_ids()
        positions = torch.arange(8, device=ids.device)[None]
        short, long = ids[:, :3], ids[:, 3:]
        packed = torch.cat([positions[:, :3], positions[:, :5]], dim=1)
        index = torch.tensor([2, 7], device=ids.device)
        try:
            with torch.no_grad():
                apart = [self._states_or_logits(x, positions[:, : x.shape[1]], None)[-1:] for x in (short, long)]
                with packed_attention(self.config, Packing((3, 5), ids.device)):
                    together = self._states_or_logits(ids, packed, index)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
        difference = (torch.cat(apart) - together).abs().max()
        return bool(difference <= 1e-4 * together.abs().max())

    def _states_or_logits(self, ids: Tensor, positions: Tensor, index: Tensor | None) -> Tensor:
        if self.head is not None or not self.has_head:
            states = last_states(call(self.trunk, ids, positions))[0]
            return states if index is None else states[index]
        kwargs = {} if index is None else {"logits_to_keep": index}
        return call(self.model, ids, positions, **kwargs).logits[0]


def _exact(states: Tensor) -> Tensor:
    return states.to(compute_dtype(states))  # log-probs keep the dtype of the states


def _attention_for(ids: Tensor) -> AbstractContextManager[Any]:
    """For one new token in bfloat16 on CPU, torch's fused attention takes twice as long as plain products."""
    plain = ids.shape[1] == 1 and ids.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def _packed_ids(sequences: Sequences, layout: Layout) -> Tensor:
    return sequences.inputs.flatten().index_select(0, layout.packed.places)[None]


def _attended(sequences: Sequences) -> Tensor:
    """Return which of the padded inputs [B, P + T - 1] are tokens; the last T predict the response."""
    real = sequences.mask if sequences.real is None else sequences.real
    return torch.cat([sequences.prompt_mask, real[:, :-1]], dim=1)
