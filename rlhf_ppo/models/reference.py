"""The frozen reference that the KL is measured against: a model of its own, or the policy with its adapter off."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ppo.core import kl_from_logits, linear_kl
from rlhf_ppo.models.acceleration.working_copy import computing, held_in_bf16, hold_in_bf16
from rlhf_ppo.models.adapters.lora import without_adapters
from rlhf_ppo.models.dropout import freeze
from rlhf_ppo.models.forward.output_layer import Outputs
from rlhf_ppo.models.forward.runner import ModelRunner, Sequences
from rlhf_ppo.models.loading import fuse_activations
from rlhf_ppo.models.sharded.sharding import gathered


class Reference:
    """The frozen policy that the KL is measured against: a model of its own, or the policy with its adapter off."""

    def __init__(
        self,
        policy: nn.Module,
        model: PreTrainedModel | None,
        *,
        adapter_off: bool,
        bf16: bool = False,
        half: bool = False,
    ) -> None:
        """Freeze ``model``, or a copy of the policy as it is now; with ``adapter_off`` no copy is needed.

        Args:
            policy: what is trained.
            model: a model of the reference's own.
            adapter_off: the policy with its adapter off is the reference.
            bf16: compute in bfloat16.
            half: hold a model of its own, or the copy, in bfloat16.
        """
        self.bf16 = bf16 or half
        self.policy = policy
        self.model = None if adapter_off else freeze(copy.deepcopy(policy) if model is None else model)
        if self.model is not None:
            fuse_activations(self.model)
            if held_in_bf16(self.model):  # deferred weights; others show best in float32 what the model allows
                hold_in_bf16(self.model)
        self.runner = ModelRunner(policy if self.model is None else self.model)
        if self.model is not None and half:
            hold_in_bf16(self.model)
        self.root: nn.Module = policy if self.model is None else self.model
        """The module that gathers its weights, if they are sharded (:mod:`rlhf_ppo.models.sharded.sharding`)."""

    @contextmanager
    def active(self) -> Iterator[None]:
        """Switch the policy's adapter off inside, if that is the reference, gather its weights, and read them."""
        off = nullcontext() if self.model is not None else without_adapters(self.policy)
        with computing(self.root, bf16=self.bf16), gathered(self.root), off:
            yield

    @torch.no_grad()
    def logprobs(self, sequences: Sequences, *, temperature: float) -> Tensor:
        """Compute log-probs [B, T] under the reference at the policy's temperature, 0 outside the mask."""
        sequences, layout = sequences.laid_out()
        tokens = layout.select(sequences.response_ids)
        with self.active():
            logprobs, _ = self.runner.outputs(sequences).logprobs(tokens, temperature=temperature)
        return layout.place(logprobs)

    @torch.no_grad()
    def outputs(self, sequences: Sequences) -> Outputs:
        """Compute the reference's distributions at the response tokens."""
        with self.active():
            return self.runner.outputs(sequences)


def exact_kl(policy: Outputs, reference: Outputs, *, temperature: float) -> Tensor:
    """Compute KL(policy || reference) [n] in nats over the whole vocabulary, with gradients to the policy.

    [n, V] logits exist only if an output layer is not plain. Banned tokens have probability 0 in both.
    """
    if policy.head is None or policy.states is None or reference.head is None or reference.states is None:
        logits, ref_logits = policy.all_logits().float(), reference.all_logits().float()
        return kl_from_logits(logits, ref_logits, temperature=temperature)
    return linear_kl(
        policy.states,
        policy.head.weight,
        reference.states,
        reference.head.weight,
        bias=policy.head.bias,
        ref_bias=reference.head.bias,
        temperature=temperature,
        ban=policy.banned,
    )
