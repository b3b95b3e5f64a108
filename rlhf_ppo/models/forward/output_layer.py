"""The output layer: next-token distributions from hidden states, without [n, V] logits where the layer is plain."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rlhf_ppo.core import BannedTokens, entropy_from_logits, linear_logprobs, token_logprobs


class Outputs(NamedTuple):
    """A model's next-token distributions at n response tokens: states and a plain output layer, or logits."""

    states: Tensor | None
    """[n, O] last hidden states."""
    head: nn.Linear | None
    """The output layer, if the logits are exactly this layer applied to the states."""
    logits: Tensor | None
    """[n, V], of a model without a plain output layer."""
    banned: BannedTokens | None = None
    """Tokens that could not be sampled at [n] of them; None: none."""

    def all_logits(self) -> Tensor:
        """Compute logits [n, V], -inf at banned tokens."""
        logits = self.logits
        if logits is None:
            assert self.states is not None and self.head is not None
            logits = linear(self.states.to(self.head.weight.dtype), self.head.weight, self.head.bias)
        if self.banned is None:
            return logits
        ids = torch.tensor(self.banned.tokens, dtype=torch.long, device=logits.device)
        return logits.index_copy(1, ids, logits[:, ids].masked_fill(self.banned.where[:, None], -math.inf))

    def logprobs(self, tokens: Tensor, *, temperature: float, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """Compute the log-probs [n] of ``tokens`` [n] and, if asked, the entropies [n]."""
        if self.head is not None and self.states is not None:
            result = linear_logprobs(
                self.states,
                self.head.weight,
                tokens,
                bias=self.head.bias,
                temperature=temperature,
                return_entropy=entropy,
                ban=self.banned,
            )
            return result if isinstance(result, tuple) else (result, None)
        logits = self.all_logits()
        return (
            token_logprobs(logits, tokens, temperature=temperature, dtype=torch.float32),
            entropy_from_logits(logits.float(), temperature=temperature) if entropy else None,
        )


def find_plain_head(model: Any, logits: Tensor | None, states: Tensor) -> nn.Linear | None:
    """Return the output layer if it alone turned the hidden states into the logits, else None."""
    if logits is None or not type(model).__module__.startswith("transformers."):
        return None  # a user's own class may change its logits in any way
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or states.shape[-1] != head.in_features:
        return None
    # Bit for bit: a cap on the logits, hardly visible in small ones, must show here, and so must a hook on the layer.
    with torch.no_grad():
        return head if torch.equal(logits, linear(states, head.weight, head.bias)) else None


@contextmanager
def vocabulary_as_rows(layer: nn.Module | None) -> Iterator[None]:
    """Let the model's own forward pass compute logits in the layout that is faster in float32 on CPU.

    Elsewhere the states are made contiguous: models keep some of them by a slice, and for such states and a frozen
    weight torch multiplies batches, each with a copy of the whole weight.
    """
    if type(layer) is not nn.Linear:
        yield
        return

    def by_rows(input: Tensor) -> Tensor:
        logits = (layer.weight @ input.flatten(0, -2).T).T
        logits = logits if layer.bias is None else logits + layer.bias
        return logits.unflatten(0, input.shape[:-1])

    def contiguous(input: Tensor) -> Tensor:
        return nn.Linear.forward(layer, input.contiguous())

    plain_cpu = layer.weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    layer.forward = by_rows if plain_cpu else contiguous
    try:
        yield
    finally:
        del layer.forward
