"""Reading: a causal language model evaluated at response tokens alone, in the fewest and largest products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear

from rlhf_ppo.core import BannedTokens, entropy_from_logits, linear_logprobs, token_logprobs
from rlhf_ppo.core.kernels.linear_logprobs import project
from rlhf_ppo.models.forward.hidden_states import (
    accepts,
    call,
    noting_states,
    probe_ids,
    states_of,
    without_adapter_wrapper,
)
from rlhf_ppo.models.forward.kv_cache import TokenCache, preallocated_cache
from rlhf_ppo.models.forward.packing import align, pack, packed_attention


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
    """[B, T] bool, True on every token that is read, an environment's included; None: there are only the policy's."""
    banned: BannedTokens | None = None
    """Tokens that could not be sampled at [B, T] places, True only where ``mask`` is; None: nowhere."""


class Outputs(NamedTuple):
    """A model's next-token distributions at n response tokens: by a plain output layer, or as logits."""

    states: Tensor | None
    """[n, O] last hidden states."""
    head: nn.Linear | None
    """The output layer, if the logits are nothing but that layer on the states."""
    logits: Tensor | None
    """[n, V], of a model without a plain output layer."""
    banned: BannedTokens | None = None
    """Tokens that could not be sampled at [n] of them; None: none."""

    def all_logits(self) -> Tensor:
        """[n, V], -inf at banned tokens."""
        logits = self.logits
        if logits is None:
            assert self.states is not None and self.head is not None
            logits = linear(self.states, self.head.weight, self.head.bias)
        if self.banned is None:
            return logits
        ids = torch.tensor(self.banned.tokens, dtype=torch.long, device=logits.device)
        return logits.index_copy(1, ids, logits[:, ids].masked_fill(self.banned.where[:, None], -math.inf))


def position_ids(mask: Tensor) -> Tensor:
    """Positions [B, L] that count real tokens only, so that padding on the left changes nothing."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


class Reader:
    """Reads a model's hidden states and log-probs at response tokens, [n] as :func:`select` chooses them.

    The plain way is one forward pass over the padded batch and log-probs from its logits. Where a look at the model
    shows that they give the same, it takes shortcuts: the output layer is applied by ``linear_logprobs`` (a model whose
    logits are nothing but a linear map of its last hidden states), and on CPU sequences are packed end to end. Where
    :func:`rlhf_ppo.models.forward_checks.probe` finds that the model needs it, it takes slower ways: ``pads_left``,
    ``keeps_states`` and ``rows_leave`` say which.
    """

    pads_left = True
    """Padding may lie in front of a sequence, with positions that do not count it; False: it lies behind."""
    keeps_states = True
    """Decoding keeps keys, values and states of the tokens so far; False: each step reads all tokens again."""
    rows_leave = True
    """Rows that have ended leave what decoding keeps."""

    def __init__(self, model: nn.Module, *, plain: bool = False) -> None:
        """Look at the model; ``plain`` takes no shortcut."""
        self.model = model
        base = without_adapter_wrapper(model)
        self.trunk: nn.Module = base.base_model
        if self.trunk is base and base.get_output_embeddings() is not None:
            self.trunk = base.model  # Llama 4 names its trunk as its base class does not
        self.config = base.config
        self.has_head = self.trunk is not base
        self.states_from = self.trunk
        """The module that returns the last hidden states when the whole model is called."""
        logits, states = self._look(base)
        self.width = states.shape[-1] if states.shape[:-1] == (1, 8) else None
        """Of the last hidden states; None: they are not [B, L, O]."""
        self.head = None if plain else self._plain_head(base, logits, states)
        self.output_layer = None if plain or not self.has_head else base.get_output_embeddings()
        self.packs = not plain and self._can_pack()
        self.head_in_low: Tensor | None = None

    # What the model gives

    def hidden(self, sequences: Sequences) -> Tensor:
        """[n, O] last hidden states before each response token."""
        if self.packs_on(sequences.mask.device):
            packed = pack(*sequences[:5])
            with packed_attention(self.config, packed.lengths):
                states = states_of(call(self.trunk, packed.ids, packed.positions))
            return states.squeeze(0)[packed.index]
        if not self.pads_left:
            ids, index = align(*sequences[:5])
            return states_of(call(self.trunk, ids)).flatten(0, 1)[select(index, sequences.mask)]
        ids, attention = _padded(sequences)
        hidden = states_of(call(self.trunk, ids, position_ids(attention), attention))
        return select(hidden[:, -sequences.mask.shape[1] :], sequences.mask)

    def outputs(self, sequences: Sequences, *, hidden: bool = False) -> Outputs:
        """What determines the distributions of the response tokens, with the hidden states if asked."""
        banned = sequences.banned
        if banned is not None:
            banned = BannedTokens(select(banned.where, sequences.mask), banned.tokens)
        if self.head is not None:
            return Outputs(self.hidden(sequences), self.head, None, banned)
        with vocabulary_as_rows(self.output_layer):
            logits, states = self._logits(sequences, hidden=hidden)
        return Outputs(states, None, logits, banned)

    def logprobs(
        self, sequences: Sequences, *, temperature: float, entropy: bool = False, outputs: Outputs | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probs [n] of the response tokens, the entropies [n] if asked, and the hidden states [n, O] if there.

        ``outputs`` is what :meth:`outputs` has read of these sequences; None: read them.
        """
        tokens = select(sequences.response_ids, sequences.mask)
        outputs = self.outputs(sequences) if outputs is None else outputs
        states, head = outputs.states, outputs.head
        if head is not None and states is not None:
            result = linear_logprobs(
                states,
                head.weight,
                tokens,
                bias=head.bias,
                temperature=temperature,
                return_entropy=entropy,
                ban=outputs.banned,
            )
            logprobs, entropies = result if isinstance(result, tuple) else (result, None)
            return logprobs, entropies, states
        logits = outputs.all_logits()
        return (
            token_logprobs(logits, tokens, temperature=temperature, dtype=torch.float32),
            entropy_from_logits(logits.float(), temperature=temperature) if entropy else None,
            states,
        )

    def _logits(self, sequences: Sequences, *, hidden: bool) -> tuple[Tensor, Tensor | None]:
        """Logits [n, V] as the model itself makes them, and the last hidden states [n, O] if asked."""
        kwargs: dict[str, Any] = {}
        mask, length = sequences.mask, sequences.mask.shape[1]
        with noting_states(self.states_from) if hidden else nullcontext([]) as noted:
            if self.packs_on(mask.device):
                packed = pack(*sequences[:5])
                with packed_attention(self.config, packed.lengths):
                    output = call(self.model, packed.ids, packed.positions, logits_to_keep=packed.index)
                # squeeze, not [0]: the gradient of an index is copied into zeros of the logits' size.
                return output.logits.squeeze(0), noted[0].squeeze(0)[packed.index] if noted else None
            if not self.pads_left:
                ids, index = align(*sequences[:5])
                index = select(index, mask)
                logits = call(self.model, ids).logits.flatten(0, 1)[index]
                return logits, noted[0].flatten(0, 1)[index] if noted else None
            ids, attention = _padded(sequences)
            if accepts(self.model, "logits_to_keep"):
                kwargs["logits_to_keep"] = length
            output = call(self.model, ids, position_ids(attention), attention, **kwargs)
        # A slice, even of everything, has its gradient copied into zeros of the whole's size.
        logits = output.logits if output.logits.shape[1] == length else output.logits[:, -length:]
        return select(logits, mask), select(noted[0][:, -length:], mask) if noted else None

    def new_cache(self, capacity: int) -> Any:
        """What decoding keeps between steps, empty, for at most ``capacity`` tokens."""
        return preallocated_cache(self.config, capacity) if self.keeps_states else TokenCache()

    @torch.no_grad()
    def step(
        self, ids: Tensor, positions: Tensor, attention: Tensor, cache: Any, *, hidden: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One decoding step: logits [B, V] of the next token and, if asked, the state [B, O] they come from."""
        read: tuple[Any, ...] = (ids, positions, attention)
        kwargs: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        newest: Any = (slice(None), -1)
        if isinstance(cache, TokenCache):
            ids, ends = cache.add(ids, attention)
            read, kwargs, newest = (ids,), {}, (torch.arange(len(ids), device=ids.device), ends)
        with _attention_for(ids):
            if self.head is not None:
                state = states_of(call(self.trunk, *read, **kwargs))[newest]
                weight = self.head.weight if self.head_in_low is None else self.head_in_low
                return project(state, weight, self.head.bias), state
            if self.keeps_states and accepts(self.model, "logits_to_keep"):
                kwargs["logits_to_keep"] = 1
            noting = noting_states(self.states_from) if hidden else nullcontext([])
            with vocabulary_as_rows(self.output_layer), noting as noted:
                logits = call(self.model, *read, **kwargs).logits
        return logits[newest].float(), noted[0][newest] if noted else None

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """While this lasts, weights do not change, and on CPU the output layer's are rounded to bfloat16 once."""
        if self.head is not None and self.head.weight.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            self.head_in_low = self.head.weight.detach().to(torch.get_autocast_dtype("cpu"))
        try:
            yield
        finally:
            self.head_in_low = None

    # What the model allows

    def read_as(self, other: Reader) -> None:
        """Lay sequences as another reader of the same model does."""
        self.packs, self.pads_left = other.packs, other.pads_left

    def require_width(self) -> int:
        """The width of the last hidden states, for a value head on them.

        Raises:
            ValueError: they are not one vector a token.
        """
        if self.width is None:
            raise ValueError(
                f"the last hidden states of {self.config.model_type!r} are not one vector a token, so no value head "
                "fits on them: name another value_model, or take an objective without a critic (objective='reinforce')"
            )
        return self.width

    def packs_on(self, device: torch.device) -> bool:
        """Whether sequences are packed on this device; on a GPU a loop over them is slower than a little padding."""
        return self.packs and device.type == "cpu"

    @torch.no_grad()
    def _look(self, base: Any) -> tuple[Tensor | None, Tensor]:
        """Logits [1, 8, V] and last hidden states [1, 8, O] of eight tokens by themselves.

        Raises:
            ValueError: the model does not read them.
        """
        try:
            with noting_states(self.trunk) as noted:
                output = call(self.model, self.probe_ids())
            if not noted:  # OPT calls what lies inside its trunk
                self.states_from = base.get_decoder()
                with noting_states(self.states_from) as noted:
                    call(self.model, self.probe_ids())
            return (output.logits if self.has_head else None), noted[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            adapter = "" if base is self.model else " with this adapter"
            raise ValueError(
                f"{base.config.model_type!r} ({type(base).__name__}) cannot read tokens alone{adapter} "
                f"({type(error).__name__}: {error}): take a decoder-only causal language model (GPT-2, Llama, Qwen)"
                + (", or name other layers for the adapter" if adapter else "")
            ) from error

    def _plain_head(self, base: Any, logits: Tensor | None, states: Tensor) -> nn.Linear | None:
        """The output layer, if the model's logits are exactly that layer on the trunk's hidden states."""
        if logits is None or not type(base).__module__.startswith("transformers."):
            return None  # a class of the user's own may do anything to its logits
        head = base.get_output_embeddings()
        if type(head) is not nn.Linear or states.shape[-1] != head.in_features:
            return None
        # Bit for bit: a cap on the logits that hardly shows in small ones must show here, and a hook on the layer.
        with torch.no_grad():
            return head if torch.equal(logits, linear(states, head.weight, head.bias)) else None

    def _can_pack(self) -> bool:
        """Whether packed sequences give what the same sequences give one by one."""
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
                apart = [self._probe(x, positions[:, : x.shape[1]], None)[-1:] for x in (short, long)]
                with packed_attention(self.config, (3, 5)):
                    together = self._probe(ids, packed, index)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
        difference = (torch.cat(apart) - together).abs().max()
        return bool(difference <= 1e-4 * together.abs().max())

    def probe_ids(self, length: int = 8) -> Tensor:
        """Token ids [1, length] to look at the model with."""
        return probe_ids(self.model, length)

    def _probe(self, ids: Tensor, positions: Tensor, index: Tensor | None) -> Tensor:
        if self.head is not None or not self.has_head:
            states = states_of(call(self.trunk, ids, positions))[0]
            return states if index is None else states[index]
        kwargs = {} if index is None else {"logits_to_keep": index}
        return call(self.model, ids, positions, **kwargs).logits[0]


@contextmanager
def vocabulary_as_rows(layer: nn.Module | None) -> Iterator[None]:
    """While this lasts, a model's own forward pass makes its logits in the layout that is faster in float32 on CPU."""
    if type(layer) is not nn.Linear or layer.weight.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        yield
        return

    def forward(input: Tensor) -> Tensor:
        logits = (layer.weight @ input.flatten(0, -2).T).T
        logits = logits if layer.bias is None else logits + layer.bias
        return logits.unflatten(0, input.shape[:-1])

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def select(x: Tensor, mask: Tensor) -> Tensor:
    """What ``x`` [B, T, ...] holds at response tokens, [n, ...]; on a GPU at all places, for a look would stall it."""
    return x[mask] if mask.device.type == "cpu" else x.flatten(0, 1)


def place(values: Tensor, mask: Tensor) -> Tensor:
    """The inverse of :func:`select`: [n] -> [B, T], 0 outside ``mask``."""
    nothing = torch.zeros(mask.shape, dtype=values.dtype, device=mask.device)
    if mask.device.type == "cpu":
        return nothing.masked_scatter(mask, values)
    return torch.where(mask, values.view_as(nothing), nothing)


def _attention_for(ids: Tensor) -> AbstractContextManager[Any]:
    """For one new token in bfloat16 on CPU, torch's fused attention takes twice as long as plain products."""
    plain = ids.shape[1] == 1 and ids.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def _padded(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, P + T - 1] whose last T positions predict the response: its last token is never an input."""
    prompt_ids, prompt_mask, response_ids, mask, real, _ = sequences
    real = mask if real is None else real
    return torch.cat([prompt_ids, response_ids[:, :-1]], dim=1), torch.cat([prompt_mask, real[:, :-1]], dim=1)
