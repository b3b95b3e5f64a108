"""The record of decoding: what has been sampled in B responses so far, and which of them have ended."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_ppo.core import BannedTokens
from rlhf_ppo.generation.rollout import SampledResponses, SamplingParams


class Sampled(NamedTuple):
    """One token each of some responses, all of one shape [*]."""

    tokens: Tensor
    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None


class Record:
    """What has been sampled so far, [B, max_new_tokens]."""

    def __init__(self, batch: int, params: SamplingParams, device: torch.device) -> None:
        """Start with empty responses."""
        # The last row takes what was sampled in place of nothing: a response that had ended.
        self.response_ids = torch.zeros(batch + 1, params.max_new_tokens, dtype=torch.long, device=device)
        self.mask = torch.zeros_like(self.response_ids, dtype=torch.bool)
        self.logprobs = torch.zeros(self.mask.shape, device=device)
        self.entropy, self.values = torch.zeros_like(self.logprobs), torch.zeros_like(self.logprobs)
        self.ended = torch.zeros(batch + 1, dtype=torch.bool, device=device)
        """[B + 1] bool, True where a stop token or string has ended the response."""
        self.params = params

    def add(self, rows: Tensor, steps: Tensor, alive: Tensor, sampled: Sampled, ended: Tensor) -> None:
        """Record tokens [*].

        Args:
            rows: [*] which responses they belong to.
            steps: [*] which token of the response each is.
            alive: [*] bool, False: not to be recorded.
            sampled: the tokens, with what is recorded about each.
            ended: [*] bool, True where the token ends its response.
        """
        place = torch.where(alive, rows, len(self.mask) - 1), steps
        self.mask[place] = True
        self.response_ids[place] = sampled.tokens
        self.logprobs[place] = sampled.logprobs
        self.entropy[place] = sampled.entropy
        if sampled.values is not None:
            self.values[place] = sampled.values
        self.ended[torch.where(ended, place[0], len(self.mask) - 1)] = True

    def responses(self, *, has_values: bool) -> SampledResponses:
        """Return the record, cut to the longest response."""
        longest = int(self.mask[:-1].any(dim=0).sum())
        response_ids, mask, logprobs, entropy, values = (
            x[:-1, :longest] for x in (self.response_ids, self.mask, self.logprobs, self.entropy, self.values)
        )
        banned = None
        if self.params.min_new_tokens:
            early = torch.arange(longest, device=mask.device) < self.params.min_new_tokens
            banned = BannedTokens(mask & early, self.params.stop_token_ids)
        return SampledResponses(
            response_ids, mask, self.ended[:-1], logprobs, entropy, values if has_values else None, banned
        )
