"""A rollout of responses, token by token: what each was rewarded, believed to be worth, and taught."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_ppo.data.detokenization import GrowingText, TextPieces, before_each, common_prefix_length
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.runtime.device import autocast
from rlhf_ppo.runtime.explain import Explanation, explain_actions
from rlhf_ppo.training.advantages import next_decisions
from rlhf_ppo.training.experience import estimate_credit

if TYPE_CHECKING:
    from rlhf_ppo.trainer import PPOTrainer


def explain_rollout(trainer: PPOTrainer, rollout: Rollout) -> Explanation:
    """Every token that the policy chose, as an update on ``rollout`` sees it; errors are those of an update's."""
    args = trainer.args
    statistics = None
    if args.normalize_scores:
        statistics = copy.deepcopy(trainer.score_statistics)
        statistics.add(rollout)
    credit = estimate_credit(rollout, args, kl_coef=trainer.kl_coef, score_statistics=statistics)
    mask = credit.experience.mask
    baseline = torch.zeros_like(rollout.logprobs) if rollout.values is None else rollout.values
    next_values, last = next_decisions(baseline, mask)
    # Where a whole turn is one action, a token has no successor of its own.
    by_token = rollout.values is not None and args.turn_credit == "token"
    return explain_actions(
        rewards=credit.rewards,
        values=rollout.values,
        next_values=next_values if by_token else None,
        terminated=last,
        truncated=torch.zeros_like(last),
        advantages=credit.advantages,
        old=credit.experience,
        new_logprobs=_logprobs_now(trainer, rollout),
        config=trainer.objective,
        gamma=args.gamma,
        labels=[[repr(piece) for piece in row] for row in _pieces(trainer, rollout)],
    )


def _pieces(trainer: PPOTrainer, rollout: Rollout) -> list[list[str]]:
    """[B, T] what each token adds to the text before it; special tokens are spelled out."""
    pieces = TextPieces(trainer.tokenizer, special=True)
    before = before_each(pieces, rollout.prompts, rollout.prompt_ids, rollout.prompt_mask)
    found: list[list[str]] = []
    for start, row in zip(before, rollout.response_ids.tolist(), strict=True):
        growing = GrowingText(pieces, start)
        texts = ["", *map(growing.add, row)]
        found.append([text[common_prefix_length(last, text) :] for last, text in pairwise(texts)])
    return found


@torch.no_grad()
def _logprobs_now(trainer: PPOTrainer, rollout: Rollout) -> Tensor:
    """[B, T] log-probs of the response tokens under the policy as it is."""
    logprobs = torch.zeros_like(rollout.logprobs)
    for rows in trainer.parts.batches(rollout, range(len(rollout.prompts))):
        part = rollout.sequences(rows)
        with autocast(trainer.parts.bf16, trainer.device):
            new = trainer.model(*part, temperature=trainer.args.temperature, entropy=False)
        logprobs[rows, : part.mask.shape[1]] = new.logprobs.to(logprobs.dtype)
    return logprobs
