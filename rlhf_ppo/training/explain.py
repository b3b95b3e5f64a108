"""Explain a rollout token by token: reward, value, advantage, ratio and gradient."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from rlhf_ppo.data.detokenization import GrowingText, TextPieces, before_each, common_prefix_length
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.models.acceleration.working_copy import computing
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.runtime.explain import Explanation, explain_actions
from rlhf_ppo.training.advantages import next_decisions
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.rewards import shape_rewards
from rlhf_ppo.training.run import Run
from rlhf_ppo.training.state import TrainState


def explain_rollout(state: TrainState, run: Run, rollout: Rollout) -> Explanation:
    """Explain every token that the policy chose, as an update on ``rollout`` sees it; raises what that would raise."""
    args = run.args
    rewards = shape_rewards(rollout, args, state.kl_coef, state.score_statistics)
    estimates = estimate(rollout, rewards, args)
    mask, values = estimates.experience.mask, estimates.values
    baseline = torch.zeros_like(rollout.logprobs) if values is None else values
    next_values, last = next_decisions(baseline, mask)
    # Where a whole turn is one action, a token has no successor of its own.
    by_token = values is not None and args.turn_credit == "token"
    return explain_actions(
        rewards=rewards.per_token,
        values=values,
        next_values=next_values if by_token else None,
        terminated=last,
        truncated=torch.zeros_like(last),
        advantages=estimates.advantages,
        old=estimates.experience,
        new_logprobs=_logprobs_now(state.model, run, rollout),
        config=state.objective(args),
        gamma=args.gamma,
        labels=[[repr(piece) for piece in row] for row in _pieces(run, rollout)],
    )


def _pieces(run: Run, rollout: Rollout) -> list[list[str]]:
    """Return [B, T] what each token adds to the text before it; special tokens are spelled out."""
    pieces = TextPieces(run.tokenizer, special=True)
    before = before_each(pieces, rollout.prompts, rollout.prompt_ids, rollout.prompt_mask)
    found: list[list[str]] = []
    for start, row in zip(before, rollout.response_ids.tolist(), strict=True):
        growing = GrowingText(pieces, start)
        texts = ["", *map(growing.add, row)]
        found.append([text[common_prefix_length(last, text) :] for last, text in pairwise(texts)])
    return found


@torch.no_grad()
def _logprobs_now(model: ActorCritic, run: Run, rollout: Rollout) -> Tensor:
    """Compute log-probs [B, T] of the response tokens under the policy as it is now."""
    logprobs = torch.zeros_like(rollout.logprobs)
    for rows in run.microbatches(model, rollout, range(len(rollout.prompts))):
        part = rollout.sequences(rows)
        with computing(model, bf16=run.bf16):
            new = model(*part, temperature=run.args.temperature, entropy=False)
        logprobs[rows, : part.mask.shape[1]] = new.logprobs.to(logprobs.dtype)
    return logprobs
