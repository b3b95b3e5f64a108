"""Explain a rollout token by token: reward, value, advantage, ratio and gradient."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import PPOConfig, kl_estimate
from rlhf_ppo.data.detokenization import GrowingText, TextPieces, before_each, common_prefix_length
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.models.acceleration.working_copy import computing
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.runtime.explain import Explanation, explain_actions
from rlhf_ppo.training.advantages import next_decisions
from rlhf_ppo.training.experience import Estimates, estimate
from rlhf_ppo.training.rewards import Rewards, shape_rewards
from rlhf_ppo.training.run import Run
from rlhf_ppo.training.state import TrainState


def explain_rollout(state: TrainState, run: Run, rollout: Rollout) -> Explanation:
    """Explain every token that the policy chose, as an update on ``rollout`` sees it; raises what that would raise."""
    args, model = run.args, state.model
    passes = run.microbatches(model, rollout, range(len(rollout.prompts)))
    return explain_scored(
        rollout,
        shape_rewards(rollout, args, state.kl_coef, state.score_statistics),
        args,
        run.tokenizer,
        objective=state.objective(args),
        new_logprobs=logprobs_now(model, rollout, passes, temperature=args.temperature, bf16=run.bf16),
    )


def explain_scored(
    rollout: Rollout,
    rewards: Rewards,
    args: RLHFConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    objective: PPOConfig,
    new_logprobs: Tensor | None,
) -> Explanation:
    """Explain a rollout, given its rewards.

    Args:
        rollout: scored, with reference log-probs.
        rewards: of :func:`rlhf_ppo.training.rewards.shape_rewards`.
        args: how advantages are estimated.
        tokenizer: the policy's.
        objective: the loss with the coefficients of that update.
        new_logprobs: [B, T] of :func:`logprobs_now`; None: without a policy to compare with.
    """
    estimates, rows = estimate(rollout, rewards, args), range(len(rollout.prompts))
    given = {"objective": objective, "new_logprobs": new_logprobs}
    return explain_estimates(rollout, estimates, args, token_pieces(tokenizer, rollout, rows), rows=rows, **given)


def explain_estimates(
    rollout: Rollout,
    estimates: Estimates,
    args: RLHFConfig,
    pieces: Sequence[Sequence[str]],
    *,
    objective: PPOConfig,
    new_logprobs: Tensor | None,
    rows: Sequence[int],
) -> Explanation:
    """Explain some rows of a rollout, given what was estimated about all of it; ``sequence`` counts among ``rows``.

    Args:
        rollout, args, objective: see :func:`explain_scored`.
        estimates: of :func:`rlhf_ppo.training.experience.estimate`.
        pieces: [n][T] of :func:`token_pieces`, of ``rows``.
        new_logprobs: [B, T] of :func:`logprobs_now`, read at ``rows`` alone; None: without a policy to compare with.
        rows: n rows of the rollout.
    """
    index = list(rows)
    experience, values = estimates.experience[index], estimates.values
    baseline = torch.zeros_like(rollout.logprobs) if values is None else values
    next_values, last = next_decisions(baseline[index], experience.mask)
    # Where a whole turn is one action, a token has no successor of its own.
    by_token = values is not None and args.turn_credit == "token"
    assert rollout.ref_logprobs is not None  # its rewards have charged the KL to the reference
    return explain_actions(
        rewards=estimates.rewards.per_token[index],
        values=None if values is None else values[index],
        next_values=next_values if by_token else None,
        terminated=last,
        truncated=torch.zeros_like(last),
        advantages=estimates.advantages[index],
        old=experience,
        new_logprobs=None if new_logprobs is None else new_logprobs[index],
        config=objective,
        gamma=args.gamma,
        labels=[[repr(piece) for piece in row] for row in pieces],
        kl=kl_estimate(rollout.logprobs[index], rollout.ref_logprobs[index], args.kl_estimator),
    )


def token_pieces(tokenizer: PreTrainedTokenizerBase, rollout: Rollout, rows: Sequence[int]) -> list[list[str]]:
    """Return [n][T] what each token of n rows adds to the text before it; special tokens are spelled out."""
    index, pieces = list(rows), TextPieces(tokenizer, special=True)
    prompts = [rollout.prompts[i] for i in index]
    before = before_each(pieces, prompts, rollout.prompt_ids[index], rollout.prompt_mask[index])
    found: list[list[str]] = []
    for start, row in zip(before, rollout.response_ids[index].tolist(), strict=True):
        growing = GrowingText(pieces, start)
        texts = ["", *map(growing.add, row)]
        found.append([text[common_prefix_length(last, text) :] for last, text in pairwise(texts)])
    return found


@torch.no_grad()
def logprobs_now(
    model: ActorCritic, rollout: Rollout, passes: Sequence[list[int]], *, temperature: float, bf16: bool
) -> Tensor:
    """Compute log-probs [B, T] of the response tokens under the policy as it is now; ``passes``: rows of each pass."""
    logprobs = torch.zeros_like(rollout.logprobs)
    for rows in passes:
        part = rollout.sequences(rows)
        with computing(model, bf16=bf16):
            new = model(*part, temperature=temperature, entropy=False)
        logprobs[rows, : part.mask.shape[1]] = new.logprobs.to(logprobs.dtype)
    return logprobs
