"""Reading: a causal language model evaluated at response tokens alone, in the fewest and largest products."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear

from rlhf_ppo.core import Ban, entropy_from_logits, linear_logprobs, token_logprobs
from rlhf_ppo.core.logprobs import project
from rlhf_ppo.limits import Barred
from rlhf_ppo.packing import pack, packed_attention


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
    barred: Barred | None = None
    """Where stop tokens could not be drawn; None: nowhere."""


class Outputs(NamedTuple):
    """A model's next-token distributions at n response tokens: by a plain output layer, or as logits."""

    states: Tensor | None
    """[n, O] last hidden states."""
    head: nn.Linear | None
    """The output layer, if the logits are nothing but that layer on the states."""
    logits: Tensor | None
    """[n, V], of a model without a plain output layer."""
    ban: Ban | None = None
    """Where stop tokens could not be drawn, of the n; None: nowhere."""

    def all_logits(self) -> Tensor:
        """[n, V], -inf at what is barred."""
        logits = self.logits
        if logits is None:
            assert self.states is not None and self.head is not None
            logits = linear(self.states, self.head.weight, self.head.bias)
        if self.ban is None:
            return logits
        ids = torch.tensor(self.ban.tokens, dtype=torch.long, device=logits.device)
        return logits.index_copy(1, ids, logits[:, ids].masked_fill(self.ban.rows[:, None], -math.inf))


def position_ids(mask: Tensor) -> Tensor:
    """Positions [B, L] that count real tokens only, so that padding on the left changes nothing."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def without_adapter_wrapper(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model, adapters in place; any other model itself."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


class Reader:
    """Reads a model's hidden states and log-probs at response tokens, [n] as :func:`select` chooses them.

    The plain way is one forward pass over the padded batch and log-probs from its logits. Where a look at the model
    shows that they give the same, it takes shortcuts: the output layer is applied by ``linear_logprobs`` (a model whose
    logits are nothing but a linear map of its last hidden states), and on CPU sequences are packed end to end.
    """

    def __init__(self, model: nn.Module, *, plain: bool = False) -> None:
        """Look at the model; ``plain`` takes no shortcut."""
        self.model = model
        base = without_adapter_wrapper(model)
        self.trunk: nn.Module = base.base_model
        self.config = base.config
        self.has_head = self.trunk is not base
        self.head = None if plain else self._plain_head(base)
        self.output_layer = None if plain or not self.has_head else base.get_output_embeddings()
        self.packs = not plain and self._can_pack()
        self.head_in_low: Tensor | None = None

    # What the model gives

    def hidden(self, sequences: Sequences) -> Tensor:
        """[n, O] last hidden states before each response token."""
        if self.packs_on(sequences.mask.device):
            packed = pack(*sequences[:5])
            with packed_attention(self.config, packed.lengths):
                states = _call(self.trunk, packed.ids, packed.positions).last_hidden_state
            return states.squeeze(0)[packed.index]
        ids, attention = _padded(sequences)
        hidden = _call(self.trunk, ids, position_ids(attention), attention).last_hidden_state
        return select(hidden[:, -sequences.mask.shape[1] :], sequences.mask)

    def outputs(self, sequences: Sequences, *, hidden: bool = False) -> Outputs:
        """What determines the distributions of the response tokens, with the hidden states if asked."""
        barred = sequences.barred
        ban = None if barred is None else Ban(select(barred.where, sequences.mask), barred.tokens)
        if self.head is not None:
            return Outputs(self.hidden(sequences), self.head, None, ban)
        with vocabulary_as_rows(self.output_layer):
            logits, states = self._logits(sequences, hidden=hidden)
        return Outputs(states, None, logits, ban)

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
                ban=outputs.ban,
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
        kwargs: dict[str, Any] = {"output_hidden_states": True} if hidden else {}
        if self.packs_on(sequences.mask.device):
            packed = pack(*sequences[:5])
            with packed_attention(self.config, packed.lengths):
                output = _call(self.model, packed.ids, packed.positions, logits_to_keep=packed.index, **kwargs)
            # squeeze, not [0]: the gradient of an index is copied into zeros of the logits' size.
            states = output.hidden_states[-1].squeeze(0)[packed.index] if hidden else None
            return output.logits.squeeze(0), states
        ids, attention = _padded(sequences)
        mask, length = sequences.mask, sequences.mask.shape[1]
        if _accepts(self.model, "logits_to_keep"):
            kwargs["logits_to_keep"] = length
        output = _call(self.model, ids, position_ids(attention), attention, **kwargs)
        states = select(output.hidden_states[-1][:, -length:], mask) if hidden else None
        # A slice, even of everything, has its gradient copied into zeros of the whole's size.
        logits = output.logits if output.logits.shape[1] == length else output.logits[:, -length:]
        return select(logits, mask), states

    @torch.no_grad()
    def step(
        self, ids: Tensor, positions: Tensor, attention: Tensor | None, cache: Any, *, hidden: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One decoding step: logits [B, V] of the next token and, if asked, the state [B, O] they come from."""
        kwargs: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        with _attention_for(ids):
            if self.head is not None:
                state = _call(self.trunk, ids, positions, attention, **kwargs).last_hidden_state[:, -1]
                weight = self.head.weight if self.head_in_low is None else self.head_in_low
                return project(state, weight, self.head.bias), state
            if _accepts(self.model, "logits_to_keep"):
                kwargs["logits_to_keep"] = 1
            with vocabulary_as_rows(self.output_layer):
                output = _call(self.model, ids, positions, attention, output_hidden_states=hidden, **kwargs)
        return output.logits[:, -1].float(), output.hidden_states[-1][:, -1] if hidden else None

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

    def packs_on(self, device: torch.device) -> bool:
        """Whether sequences are packed on this device; on a GPU a loop over them is slower than a little padding."""
        return self.packs and device.type == "cpu"

    def _plain_head(self, base: Any) -> nn.Linear | None:
        """The output layer, if the model's logits are exactly that layer on the trunk's hidden states."""
        if not self.has_head or not type(base).__module__.startswith("transformers."):
            return None  # a class of the user's own may do anything to its logits
        head = base.get_output_embeddings()
        if type(head) is not nn.Linear:
            return None
        ids, positions = self._probe_ids()
        with torch.no_grad():
            logits = _call(self.model, ids, positions).logits
            states = _call(self.trunk, ids, positions).last_hidden_state
            # Bit for bit: a cap on the logits that hardly shows in small ones must show here, and a hook on the layer.
            same = torch.equal(logits, linear(states, head.weight, head.bias))
        return head if same else None

    def _can_pack(self) -> bool:
        """Whether packed sequences give what the same sequences give one by one."""
        text = self.config.get_text_config()
        if self.config._attn_implementation != "sdpa" or getattr(text, "sliding_window", None) is not None:
            return False
        if set(getattr(text, "layer_types", None) or ()) - {"full_attention"}:
            return False  # a chunk or window of thousands of tokens would not show in the few below
        if not _accepts(self.trunk, "position_ids") or next(self.model.parameters()).dtype != torch.float32:
            return False
        ids, positions = self._probe_ids()
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

    def _probe_ids(self) -> tuple[Tensor, Tensor]:
        device = next(self.model.parameters()).device
        vocabulary = int(self.config.get_text_config().vocab_size)
        ids = torch.arange(1, 9, device=device)[None] * 7 % vocabulary
        return ids, torch.arange(8, device=device)[None]

    def _probe(self, ids: Tensor, positions: Tensor, index: Tensor | None) -> Tensor:
        if self.head is not None or not self.has_head:
            states = _call(self.trunk, ids, positions).last_hidden_state[0]
            return states if index is None else states[index]
        kwargs = {} if index is None else {"logits_to_keep": index}
        return _call(self.model, ids, positions, **kwargs).logits[0]


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


def _call(model: nn.Module, ids: Tensor, positions: Tensor, attention: Tensor | None = None, **kwargs: Any) -> Any:
    if _accepts(model, "position_ids"):
        kwargs["position_ids"] = positions
    mask = torch.ones_like(ids) if attention is None else attention.long()
    return model(input_ids=ids, attention_mask=mask, **{"use_cache": False, **kwargs})


def _accepts(model: nn.Module, name: str) -> bool:
    return name in _forward_parameters(type(without_adapter_wrapper(model)))


@cache
def _forward_parameters(model_class: type[nn.Module]) -> frozenset[str]:
    # Looked up at every decoding step, so read once a class. A forward(*args, **kwargs) takes what its parent's takes.
    names: set[str] = set()
    for cls in model_class.__mro__:
        if "forward" in vars(cls):
            parameters = inspect.signature(cls.forward).parameters
            names |= parameters.keys()
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                break
    return frozenset(names)
