"""The policy with its critic, and the frozen reference that the KL is measured against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from rlhf_ppo.core import BannedTokens, PolicyOutput
from rlhf_ppo.models.forward.runner import Outputs, Reader, Sequences, place
from rlhf_ppo.models.loading import fuse_activations
from rlhf_ppo.models.lora import adapter_parameters, use_adapter
from rlhf_ppo.models.reference import exact_kl
from rlhf_ppo.models.value_head import VALUE_HEAD_FILE


class ActorCritic(nn.Module):
    """A policy and its critic: a value head on the policy's own trunk, on an adapter of its own there, or on a separate
    trunk; or no critic at all.

    Everything runs in evaluation mode, updates included: dropout would make old and new log-probs of the same weights
    differ, and the ratio would measure noise.
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
            value_trunk: headless model of its own for the critic.
            value_adapter: the policy's adapter that is in force while the critic reads; the policy has another.
            plain: take none of :class:`Reader`'s shortcuts.
        """
        super().__init__()
        self.policy = policy
        self.value_trunk = value_trunk
        self.value_adapter = value_adapter
        self.value_head: nn.Linear | None = None
        self.eval()
        if not plain:
            fuse_activations(self)
        self.reader = Reader(policy, plain=plain)
        self.value_reader = None if value_trunk is None else Reader(value_trunk, plain=plain)
        if critic:
            self.value_head = nn.Linear((self.value_reader or self.reader).require_width(), 1).eval()
            # A critic that starts at 0 lets the first rollouts be judged by their rewards alone.
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    @property
    def shares_trunk(self) -> bool:
        """True if one forward pass of the policy also gives the values."""
        return self.value_head is not None and self.value_trunk is None and self.value_adapter is None

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer moves."""
        return [p for p in self.parameters() if p.requires_grad]

    def critic_parameters(self) -> list[nn.Parameter]:
        """Those that learn from the value loss alone: the value head, and a separate trunk or the critic's adapter."""
        own = [p for part in (self.value_head, self.value_trunk) if part is not None for p in part.parameters()]
        if self.value_adapter is not None:
            own += adapter_parameters(self.policy, self.value_adapter)
        return [p for p in own if p.requires_grad]

    def policy_parameters(self) -> list[nn.Parameter]:
        """The rest of them."""
        critic = {id(p) for p in self.critic_parameters()}
        return [p for p in self.trainable_parameters() if id(p) not in critic]

    def decode(self, ids: Tensor, positions: Tensor, attention: Tensor, cache: Any) -> tuple[Tensor, Tensor | None]:
        """One decoding step: logits [B, V] of the next token and the value [B] (shared trunk only)."""
        logits, state = self.reader.step(ids, positions, attention, cache, hidden=self.shares_trunk)
        return logits, self._value(state) if self.shares_trunk and state is not None else None

    def _value(self, states: Tensor) -> Tensor:
        """[*, O] -> [*], in float32 whatever the models compute in."""
        head = self.value_head
        assert head is not None
        with torch.autocast(states.device.type, enabled=False):
            return linear(states.to(head.weight.dtype), head.weight, head.bias).squeeze(-1)

    def separate_values(self, sequences: Sequences) -> Tensor | None:
        """[B, T] values from a critic that reads in a pass of its own, 0 outside the mask, or None without one."""
        if self.value_adapter is not None:
            with use_adapter(self.policy, self.value_adapter):
                states = self.reader.hidden(sequences)
        elif self.value_reader is not None:
            states = self.value_reader.hidden(sequences)
        else:
            return None
        return place(self._value(states), sequences.mask)

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        response_ids: Tensor,
        mask: Tensor,
        real: Tensor | None = None,
        banned: BannedTokens | None = None,
        *,
        temperature: float = 1.0,
        entropy: bool = True,
        reference: Outputs | None = None,
    ) -> PolicyOutput:
        """Log-probs, values and entropy [B, T] of recorded responses under the current weights, 0 outside ``mask``.

        Args:
            prompt_ids, prompt_mask: [B, P], left-padded.
            response_ids, mask: [B, T], right-padded.
            real, banned: see :class:`rlhf_ppo.models.forward.runner.Sequences`.
            temperature: divides the logits; the same one as at sampling.
            entropy: compute it (otherwise None).
            reference: what the reference gives at the same tokens, for the exact KL to it (otherwise None).
        """
        sequences = Sequences(prompt_ids, prompt_mask, response_ids, mask, real, banned)
        outputs = self.reader.outputs(sequences, hidden=self.shares_trunk)
        logprobs, entropies, states = self.reader.logprobs(
            sequences, temperature=temperature, entropy=entropy, outputs=outputs
        )
        kl = None if reference is None else exact_kl(outputs, reference, temperature=temperature)
        if self.shares_trunk and states is not None:
            values = place(self._value(states), mask)
        else:
            values = self.separate_values(sequences)
        return PolicyOutput(
            logprobs=place(logprobs, mask),
            values=values,
            entropy=None if entropies is None else place(entropies, mask),
            kl=None if kl is None else place(kl, mask),
        )

    def save_critic(self, folder: Path) -> None:
        """Write the value head beside the policy, as safetensors, and a trunk of its own into ``critic``."""
        if self.value_head is None:
            return
        save_file(self.value_head.state_dict(), folder / VALUE_HEAD_FILE)
        if self.value_trunk is not None:
            self.value_trunk.save_pretrained(folder / "critic")
