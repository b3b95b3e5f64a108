"""Rollouts: sample responses, recording each action's log-prob and value at the moment it is taken."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.core import token_logprobs
from rlhf_ppo.data import Prompt
from rlhf_ppo.models import ActorCritic, position_ids


@dataclass(frozen=True)
class Rollout:
    """B responses and everything recorded about them. P prompt tokens, T response tokens, time last."""

    prompts: list[Prompt]
    """[B] as given."""
    columns: dict[str, list[Any]]
    """The other columns of the prompts' rows, [B] each."""
    prompt_ids: Tensor
    """[B, P] left-padded token ids."""
    prompt_mask: Tensor
    """[B, P] bool, True on prompt tokens."""
    response_ids: Tensor
    """[B, T] sampled token ids, the very ones that are trained on."""
    mask: Tensor
    """[B, T] bool, True on tokens that the policy chose, its stop token included."""
    finished: Tensor
    """[B] bool, True where a stop token ended the response, False where the length limit did."""
    logprobs: Tensor
    """[B, T] log-probs of the sampled tokens under the policy at the run's temperature."""
    values: Tensor | None
    """[B, T] the critic's value of the state before each token, or None without a critic."""
    completions: list[str] = field(default_factory=list)
    """[B] the responses as text, special tokens left out."""
    ref_logprobs: Tensor | None = None
    """[B, T] the same tokens under the frozen reference."""
    scores: Tensor | None = None
    """[B] weighted sum of the reward functions' scores; 0 where unscored."""
    scored: Tensor | None = None
    """[B] bool, False where a reward function had no score (None): the response is left out of training."""
    score_parts: dict[str, list[float | None]] = field(default_factory=dict)
    """Each reward function's own scores, [B]."""
    decode_gap: float | None = None
    """Largest |decoding log-prob - full forward log-prob| in nats, measured under recompute_logprobs."""

    @property
    def lengths(self) -> Tensor:
        """[B] response lengths in tokens."""
        return self.mask.sum(dim=1)

    def __getitem__(self, rows: Tensor) -> Rollout:
        """The same record for some rows of the tensors, trimmed to their longest prompt and response.

        Texts, columns and scores stay whole; only what a forward pass needs is indexed.
        """
        mask, prompt_mask = self.mask[rows], self.prompt_mask[rows]
        t, p = max(int(mask.sum(dim=1).max()), 1), max(int(prompt_mask.sum(dim=1).max()), 1)
        return replace(
            self,
            prompt_ids=self.prompt_ids[rows][:, -p:],
            prompt_mask=prompt_mask[:, -p:],
            response_ids=self.response_ids[rows][:, :t],
            mask=mask[:, :t],
            finished=self.finished[rows],
            logprobs=self.logprobs[rows][:, :t],
            values=None if self.values is None else self.values[rows][:, :t],
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs[rows][:, :t],
        )


def sample_tokens(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One draw per row from ``softmax(logits)`` by inverting its cumulative distribution: [B, V] -> [B].

    In float64 (where the device has it), so that tokens of tiny probability keep it.
    """
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = logits.to(dtype).softmax(dim=-1).cumsum(dim=-1)
    u = torch.rand(logits.shape[0], 1, generator=generator, dtype=dtype, device=logits.device)
    # right=True finds the first entry above u, so a token of probability 0 is never drawn.
    tokens = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).squeeze(-1)
    return tokens.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def sample_responses(
    model: ActorCritic,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    stop_token_ids: Collection[int],
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Sample a response to each prompt from exactly ``softmax(logits / temperature)``.

    The decoding loop is our own, so no sampler default and no model's generation config can change the distribution
    behind the recorded log-probs. Architecture, cache and attention masks stay transformers'.

    Args:
        model: policy and critic.
        prompt_ids: [B, P] left-padded.
        prompt_mask: [B, P] bool.
        max_new_tokens: length limit.
        temperature: divides the logits.
        stop_token_ids: tokens that end a response; they are actions too, so they are recorded.
        generator: source of randomness, on the model's device.
    Returns:
        (response_ids [B, T], mask [B, T], finished [B], logprobs [B, T], values [B, T] or None), T <= max_new_tokens.
        Values are recorded here only when the critic shares the policy's trunk.
    """
    batch, device = prompt_ids.shape[0], prompt_ids.device
    stops = torch.tensor(sorted(stop_token_ids), dtype=torch.long, device=device)
    alive = torch.ones(batch, dtype=torch.bool, device=device)
    finished = torch.zeros_like(alive)
    tokens, masks, logprobs, values = [], [], [], []
    ids, attention, cache = prompt_ids, prompt_mask, None
    for _ in range(max_new_tokens):
        positions = position_ids(attention)[:, -ids.shape[1] :]
        logits, value, cache = model.decode(ids, attention, positions, cache)
        logits = logits.float()
        token = sample_tokens(logits / temperature, generator)
        tokens.append(token)
        masks.append(alive)
        logprobs.append(token_logprobs(logits, token, temperature=temperature))
        if value is not None:
            values.append(value)
        finished = finished | (alive & torch.isin(token, stops))
        attention = torch.cat([attention, alive[:, None]], dim=1)
        ids = token[:, None]
        alive = alive & ~finished
        if not alive.any():
            break
    mask = torch.stack(masks, dim=1)

    def record(steps: list[Tensor]) -> Tensor:
        # What a finished row still drew while others went on is no action of the policy.
        return torch.where(mask, torch.stack(steps, dim=1), torch.zeros((), dtype=steps[0].dtype, device=device))

    return record(tokens), mask, finished, record(logprobs), record(values) if values else None
