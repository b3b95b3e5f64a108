"""The policy with its critic: choose the kind of critic, build it, evaluate recorded responses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import BannedTokens, PolicyOutput, ValueScale, rescaled_head
from rlhf_ppo.core.masked import keep
from rlhf_ppo.data.hub import find_file
from rlhf_ppo.models.adapters.lora import (
    VALUE_ADAPTER,
    VALUE_FOLDER,
    adapter_parameters,
    add_value_adapter,
    load_adapter,
    use_adapter,
)
from rlhf_ppo.models.dropout import without_dropout
from rlhf_ppo.models.forward.layout import Layout
from rlhf_ppo.models.forward.output_layer import Outputs
from rlhf_ppo.models.forward.runner import ModelRunner, Sequences
from rlhf_ppo.models.loading import fuse_activations
from rlhf_ppo.models.reference import exact_kl
from rlhf_ppo.models.value_head import VALUE_HEAD_FILE, SavedHead, make_value_head, save_value_head
from rlhf_ppo.runtime.machine.device import exact_dtype

CriticKind = Literal["none", "shared", "separate", "adapter"]


class ActorCritic(nn.Module):
    """A policy and its critic: a value head on the policy's trunk, on a second adapter there, or on a separate trunk;
    or no critic.

    Dropout is off, in updates too (see :mod:`rlhf_ppo.models.dropout`).
    """

    def __init__(
        self,
        policy: nn.Module,
        *,
        critic: bool = True,
        value_trunk: PreTrainedModel | None = None,
        value_adapter: str | None = None,
        plain: bool = False,
    ) -> None:
        """Put a value head on ``value_trunk``, or on the policy's trunk if there is none.

        Args:
            policy: causal language model.
            critic: False: no value head.
            value_trunk: the critic's own model without a head.
            value_adapter: the policy's adapter that is active for the critic's forward pass; the policy uses another.
            plain: take none of :class:`ModelRunner`'s shortcuts.
        """
        super().__init__()
        self.policy = policy
        self.value_trunk = value_trunk
        self.value_adapter = value_adapter
        self.value_head: nn.Linear | None = None
        self.value_scale: ValueScale | None = None
        """The units of the head's values; None until the first update of a head that starts at 0."""
        self.compiled: bool | None = None
        """Whether updates run compiled layers; None: that is not decided yet."""
        without_dropout(self)
        if not plain:
            fuse_activations(self)
        self.runner = ModelRunner(policy, plain=plain)
        self.value_runner = None if value_trunk is None else ModelRunner(value_trunk, plain=plain)
        if critic:
            self.value_head = make_value_head((self.value_runner or self.runner).require_width())

    @property
    def shares_trunk(self) -> bool:
        """True if one forward pass of the policy also gives the values."""
        return self.value_head is not None and self.value_trunk is None and self.value_adapter is None

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer updates."""
        return [p for p in self.parameters() if p.requires_grad]

    def saved_parameters(self) -> dict[str, nn.Parameter]:
        """Return by name what a checkpoint holds: what is trained, and frozen parts of a separate critic."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad or n.startswith("value_trunk.")}

    def critic_parameters(self) -> list[nn.Parameter]:
        """Return those that only the value loss trains: value head, and separate trunk or the critic's adapter."""
        own = [p for part in (self.value_head, self.value_trunk) if part is not None for p in part.parameters()]
        if self.value_adapter is not None:
            own += adapter_parameters(self.policy, self.value_adapter)
        return [p for p in own if p.requires_grad]

    def policy_parameters(self) -> list[nn.Parameter]:
        """Return the other trainable parameters."""
        critic = {id(p) for p in self.critic_parameters()}
        return [p for p in self.trainable_parameters() if id(p) not in critic]

    def decode(self, ids: Tensor, positions: Tensor, attention: Tensor, cache: Any) -> tuple[Tensor, Tensor | None]:
        """Run one decode step: logits [B, V] of the next token and the value [B] (shared trunk only)."""
        logits, state = self.runner.decode_step(ids, positions, attention, cache, hidden=self.shares_trunk)
        return logits, self._value(state) if self.shares_trunk and state is not None else None

    def _value(self, states: Tensor) -> Tensor:
        """Compute values, [*, O] -> [*], in float32 whatever the models compute in."""
        head = self.value_head
        assert head is not None
        with torch.autocast(states.device.type, enabled=False):
            return linear(states.to(head.weight.dtype), head.weight, head.bias).squeeze(-1)

    def in_reward_units(self, values: Tensor | None, mask: Tensor) -> Tensor | None:
        """Convert the head's values [*] to the reward's units, 0 outside ``mask``; a fresh head's are 0 everywhere."""
        if values is None or self.value_scale in (None, ValueScale()):
            return values
        return keep(self.value_scale.denormalize(values.to(exact_dtype(values.device))), mask)

    @torch.no_grad()
    def change_value_scale(self, scale: ValueScale | None) -> None:
        """Let the head predict in the units of ``scale``; what it has learned stays the same in the reward's units."""
        head, old = self.value_head, self.value_scale
        if head is not None and old is not None and scale is not None and scale != old:
            weight, bias = rescaled_head(head.weight, head.bias, old, scale)
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        self.value_scale = scale

    def load_head(self, head: SavedHead) -> None:
        """Start from a saved value head, with its units."""
        assert self.value_head is not None
        self.value_head.load_state_dict({"weight": head.weight, "bias": head.bias})
        self.value_scale = head.scale

    def restore_head(self, head: nn.Linear | None, scale: ValueScale | None) -> None:
        """Take weight, bias and units from a copy of the head: changing the units back would round."""
        if self.value_head is not None and head is not None:
            self.value_head.load_state_dict(head.state_dict())
        self.value_scale = scale

    def separate_values(self, sequences: Sequences) -> Tensor | None:
        """Compute values [B, T] where the critic has a forward pass of its own, 0 outside the mask; else None."""
        sequences, layout = sequences.laid_out()
        if self.value_adapter is not None:
            with use_adapter(self.policy, self.value_adapter):
                states = self.runner.hidden(sequences)
        elif self.value_runner is not None:
            states = self.value_runner.hidden(sequences)
        else:
            return None
        return layout.place(self._value(states))

    def head_values(self, sequences: Sequences) -> Tensor:
        """Compute the head's values [B, T] alone, without log-probs, 0 outside the mask."""
        sequences, layout = sequences.laid_out()
        values = self.separate_values(sequences)
        return layout.place(self._value(self.runner.hidden(sequences))) if values is None else values

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        response_ids: Tensor,
        mask: Tensor,
        real: Tensor | None = None,
        banned: BannedTokens | None = None,
        layout: Layout | None = None,
        *,
        temperature: float = 1.0,
        entropy: bool = True,
        reference: Outputs | None = None,
    ) -> PolicyOutput:
        """Compute log-probs, values and entropy [B, T] of recorded responses under current weights, 0 outside ``mask``.

        Args:
            prompt_ids, prompt_mask: [B, P], left-padded.
            response_ids, mask: [B, T], right-padded.
            real, banned, layout: see :class:`rlhf_ppo.models.forward.runner.Sequences`.
            temperature: divides the logits; the same as at sampling.
            entropy: compute it (otherwise None).
            reference: the reference's distributions at the same tokens, for the exact KL (otherwise None).
        """
        sequences, layout = Sequences(prompt_ids, prompt_mask, response_ids, mask, real, banned, layout).laid_out()
        outputs = self.runner.outputs(sequences, hidden=self.shares_trunk)
        tokens = layout.select(response_ids)
        logprobs, entropies = outputs.logprobs(tokens, temperature=temperature, entropy=entropy)
        kl = None if reference is None else exact_kl(outputs, reference, temperature=temperature)
        if self.shares_trunk and outputs.states is not None:
            values = layout.place(self._value(outputs.states))
        else:
            values = self.separate_values(sequences)
        return PolicyOutput(
            logprobs=layout.place(logprobs),
            values=values,
            entropy=None if entropies is None else layout.place(entropies),
            kl=None if kl is None else layout.place(kl),
        )

    def save_critic(self, folder: Path) -> None:
        """Save the value head beside the policy, as safetensors, and a separate trunk in ``critic/``."""
        if self.value_head is None:
            return
        save_value_head(self.value_head, self.value_scale, folder / VALUE_HEAD_FILE)
        if self.value_trunk is not None:
            self.value_trunk.save_pretrained(folder / "critic")


def choose_critic(args: RLHFConfig, *, value_model: Any, has_adapter: bool) -> CriticKind:
    """Return the kind of critic that settings and models ask for.

    Raises:
        ValueError: they contradict each other; names both.
    """
    if not args.has_critic:
        if value_model is not None:
            raise ValueError(f"{args.critic_free} has no critic, but a value_model is given: drop one of them")
        return "none"
    if value_model is not None and args.vf_coef == 0 and args.value_head_from is None:
        raise ValueError("a value_model is given, but under vf_coef=0 its values stay constant: drop one of them")
    kind = args.critic
    if kind == "auto":
        kind = "shared" if value_model is None else "separate"
    if kind == "separate" and value_model is None:
        raise ValueError(
            "critic='separate' needs a value_model: name its folder or hub id (that of model will do), or set "
            "critic='shared'"
        )
    if kind != "separate" and value_model is not None:
        raise ValueError(f"critic={kind!r} uses the policy's own model, but a value_model is given: drop one of them")
    if kind != "separate" and args.critic_frozen != "none":
        raise ValueError(
            f"critic_frozen={args.critic_frozen!r} is about a critic with a trunk of its own, but critic={kind!r} uses "
            "the policy's: give a value_model, or drop critic_frozen"
        )
    if kind == "adapter" and not has_adapter:
        raise ValueError(
            "critic='adapter' is a second adapter on the policy's base, so it needs peft_config (lora_rank on the "
            "command line)"
        )
    return kind


def critic_kind(model: ActorCritic) -> CriticKind:
    """Return the kind of critic that a model has."""
    if model.value_head is None:
        return "none"
    if model.value_adapter is not None:
        return "adapter"
    return "shared" if model.value_trunk is None else "separate"


def build_actor_critic(
    policy: Any,
    kind: CriticKind,
    *,
    trunk: PreTrainedModel | None,
    head: SavedHead | None,
    head_from: str | None,
    bare_base: bool = True,
) -> ActorCritic:
    """Build the policy with its critic.

    Args:
        policy: causal language model, its adapter in place.
        kind: see :func:`choose_critic`.
        trunk: a separate critic's.
        head: what the value head starts from; None: 0.
        head_from: where the head came from; a critic that is an adapter starts from the adapter beside it.
        bare_base: without its adapter the policy is a model that a critic can start from.
    """
    if kind == "adapter":
        add_value_adapter(policy, as_policy=not bare_base)
        if head_from is not None:
            # A run saves the critic's adapter in a folder of its own: the one beside the head is the policy's.
            inside = f"{VALUE_FOLDER}/" if find_file(head_from, VALUE_HEAD_FILE) else ""
            if (file := find_file(head_from, f"{inside}adapter_model.safetensors")) is not None:
                load_adapter(policy, VALUE_ADAPTER, file)
    model = ActorCritic(
        policy,
        critic=kind != "none",
        value_trunk=trunk,
        value_adapter=VALUE_ADAPTER if kind == "adapter" else None,
    )
    if head is not None and model.value_head is not None:
        if head.weight.shape != model.value_head.weight.shape:
            raise ValueError(
                f"value_head_from={head_from!r} fits hidden states of width {head.weight.shape[1]}, but the model "
                f"under it is {model.value_head.in_features} wide: take a head that was trained on this model"
            )
        model.load_head(head)
    return model
