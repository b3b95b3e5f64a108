"""What a critic learns from and is judged by: the returns of recorded rollouts, split into training and held-out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ppo.config.rlhf import RLHFConfig, restore_settings
from rlhf_ppo.core.masked import keep
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.pipeline.critic.analysis import WORDS, Evidence, fold_numbers
from rlhf_ppo.training.advantages import gae
from rlhf_ppo.training.models.fitted_critic import SHAPING
from rlhf_ppo.training.recorded.recorded_rollouts import Recording, RecordingFacts, open_recording
from rlhf_ppo.training.rewards import ScoreStatistics, shape_rewards

_MOST_TOKENS = 50_000
"""Tokens that an analysis reads at most: beyond it, standard errors are small and memory is not."""


@dataclass(frozen=True)
class ScoredRollout:
    """A recorded rollout of B responses with its rewards and Monte Carlo returns, [B, T] in float64."""

    rollout: Rollout
    rewards: Tensor
    returns: Tensor
    mask: Tensor
    """[B, T] bool, the policy's tokens in scored responses."""


@dataclass(frozen=True)
class CriticData:
    """Recorded rollouts of one policy, tokenizer and reward."""

    facts: RecordingFacts
    """Of the first recording."""
    settings: RLHFConfig
    """The run's that recorded it."""
    gamma: float
    kl_coef: float
    rollouts: list[ScoredRollout]
    folders: list[str]

    @property
    def num_responses(self) -> int:
        """Number of responses."""
        return sum(len(part.rollout.prompts) for part in self.rollouts)


def load_critic_data(
    folders: Sequence[str], *, gamma: float | None = None, kl_coef: float | None = None, last: int | None = None
) -> CriticData:
    """Read recordings, shape their rewards as the run did, and sum them to returns.

    Args:
        folders: of runs with recorded rollouts, or of the recordings.
        gamma, kl_coef: None: the recording's.
        last: use the newest rollouts only.
    Raises:
        FileNotFoundError, ValueError: no recording, a damaged or empty one, recordings that do not belong together, or
            credit by turns; says which, and what to do.
    """
    recordings = [open_recording(folder) for folder in folders]
    first = recordings[0]
    settings = restore_settings(first.facts.settings)
    for other in recordings[1:]:
        _require_same(first, other, given=gamma is not None)
    if settings.turn_credit == "turn":
        raise ValueError(
            f"{first.folder} was recorded under turn_credit='turn', where values count at the first token of a turn "
            "alone: fitting and reporting read values at every token; record with turn_credit='token'"
        )
    gamma = settings.gamma if gamma is None else gamma
    kl_coef = settings.kl_coef if kl_coef is None else kl_coef
    scored = [part for recording in recordings for part in _score(recording, settings, gamma=gamma, kl_coef=kl_coef)]
    scored = scored if last is None else scored[-last:]
    if not any(part.mask.any() for part in scored):
        raise ValueError(f"{first.folder}: no recorded response has a score, so there are no returns: record again")
    return CriticData(first.facts, settings, gamma, kl_coef, scored, [str(r.folder.resolve()) for r in recordings])


def _require_same(first: Recording, other: Recording, *, given: bool) -> None:
    """Raise a ValueError unless two recordings are of one tokenizer, model, reward and discount."""
    compared = {name: (getattr(first.facts, name), getattr(other.facts, name)) for name in ("tokenizer", "model")}
    compared["rewards"] = first.facts.rewards, other.facts.rewards
    for name in (*SHAPING, *(() if given else ("gamma",))):
        compared[name] = first.facts.settings[name], other.facts.settings[name]
    for name, (one, two) in compared.items():
        if one != two:
            raise ValueError(
                f"{first.folder} was recorded with {name}={one!r} and {other.folder} with {name}={two!r}: their "
                "returns are not of one kind, so fit a critic on each"
            )


def _score(recording: Recording, settings: RLHFConfig, *, gamma: float, kl_coef: float) -> Iterator[ScoredRollout]:
    statistics = ScoreStatistics()  # of normalize_scores: they run from rollout to rollout, as in training
    for rollout in recording:
        exact = dataclasses.replace(rollout, logprobs=rollout.logprobs.double(), ref_logprobs=_double(rollout))
        rewards = shape_rewards(exact, settings, kl_coef, statistics)
        statistics = rewards.score_statistics
        per_token = rewards.per_token.double()
        _, returns = gae(per_token, torch.zeros_like(per_token), rewards.mask, gamma=gamma, gae_lambda=1.0)
        yield ScoredRollout(rollout, per_token, returns, rewards.mask)


def _double(rollout: Rollout) -> Tensor | None:
    return None if rollout.ref_logprobs is None else rollout.ref_logprobs.double()


def hold_out(data: CriticData, fraction: float, *, by: str, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Split the responses: for each rollout, its training rows and its held-out rows.

    Args:
        data: recorded rollouts.
        fraction: share of prompts (or rollouts) held out.
        by: "prompt" or "rollout".
        seed: of the random choice.
    Raises:
        ValueError: there are fewer than two of them.
    """
    if by == "prompt":
        names = [[repr(prompt) for prompt in part.rollout.prompts] for part in data.rollouts]
    else:
        names = [[str(i)] * len(part.rollout.prompts) for i, part in enumerate(data.rollouts)]
    distinct = list(dict.fromkeys(name for part in names for name in part))
    if len(distinct) < 2:
        other = "rollout" if by == "prompt" else "prompt"
        raise ValueError(
            f"{data.folders[0]} has {data.num_responses} responses of 1 {by}, of which none can be held out: record "
            f"more, or set split_by to {other!r}"
        )
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    held = {distinct[i] for i in order[:count]}
    scored = [part.mask.any(dim=1).tolist() for part in data.rollouts]
    parts = list(zip(names, scored, strict=True))
    train, held_out = (
        [[i for i, name in enumerate(part) if ok[i] and (name in held) == out] for part, ok in parts]
        for out in (False, True)
    )
    if not all(sum(map(len, rows)) > 1 for rows in (train, held_out)):
        raise ValueError(
            f"{data.folders[0]}: of {data.num_responses} responses, too few are scored to hold any out (2 to train on "
            "and 2 to judge by are the least): record more rollouts"
        )
    return train, held_out


def recorded_values(data: CriticData) -> list[Tensor]:
    """Return the values [B, T] that each rollout recorded, in the reward's units; a new head's are the mean return.

    Raises:
        ValueError: a rollout has none.
    """
    mean = torch.cat([part.returns[part.mask] for part in data.rollouts]).mean()
    found = []
    for part in data.rollouts:
        rollout = part.rollout
        if rollout.values is None:
            raise ValueError(
                f"{data.folders[0]} was recorded without a critic, so that it holds no values: name a fitted one with "
                "--critic, or record with advantage_estimator='gae'"
            )
        # A new head predicts 0 in standard deviations from a mean that was not known yet.
        values = rollout.values.double() + (mean if rollout.value_scale is None else 0.0)
        found.append(keep(values, part.mask))
    return found


def gather_evidence(
    parts: Sequence[ScoredRollout], values: Sequence[Tensor], rows: Sequence[Sequence[int]], gamma: float, seed: int = 0
) -> Evidence:
    """Put rows of several rollouts into one record, at most 50,000 tokens, chosen at random among the responses.

    Args:
        parts: scored rollouts.
        values: [B, T] a critic's, for each of them.
        rows: of each rollout, those to take.
        gamma: discount.
        seed: of folds and choice.
    Raises:
        ValueError: fewer than two responses.
    """
    picked = [(i, row) for i, some in enumerate(rows) for row in some if parts[i].mask[row].any()]
    order = torch.randperm(len(picked), generator=torch.Generator().manual_seed(seed)).tolist()
    total, chosen = 0, []
    for place in order:
        total += int(parts[picked[place][0]].mask[picked[place][1]].sum())
        if chosen and total > _MOST_TOKENS:
            break
        chosen.append(picked[place])
    chosen.sort()
    length = max(parts[i].mask.shape[1] for i, _ in chosen)

    def stack(tensors: Sequence[Tensor]) -> Tensor:
        found = [tensors[i][row] for i, row in chosen]
        return torch.stack([torch.nn.functional.pad(x, (0, length - len(x))) for x in found])

    asked = [parts[i].rollout.prompt_ids[row][parts[i].rollout.prompt_mask[row]] for i, row in chosen]
    words = _numbering([parts[i].rollout.response_ids[row][parts[i].mask[row]] for i, row in chosen])
    prompts = [parts[i].rollout.prompts[row] for i, row in chosen]
    return Evidence(
        rewards=stack([part.rewards for part in parts]),
        values=stack(values),
        returns=stack([part.returns for part in parts]),
        mask=stack([part.mask for part in parts]),
        words=words(stack([part.rollout.response_ids for part in parts])),
        prompts=torch.stack([_counts(words(ids)) for ids in asked]),
        folds=fold_numbers(prompts, seed),
        gamma=gamma,
    )


def _numbering(responses: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function that numbers token ids: the most frequent ones from 0, all others as the last number."""
    counts = torch.bincount(torch.cat(list(responses)))
    frequent = counts.argsort(descending=True, stable=True)[: WORDS - 1]
    number = torch.full_like(counts, WORDS - 1)
    number[frequent] = torch.arange(len(frequent))
    # A prompt may have tokens beyond the largest one that was sampled.
    return lambda ids: torch.where(ids < len(number), number[ids.clamp(max=len(number) - 1)], WORDS - 1)


def _counts(words: Tensor) -> Tensor:
    return torch.bincount(words, minlength=WORDS)


def all_rows(data: CriticData) -> list[list[int]]:
    """Return all rows of each rollout."""
    return [list(range(len(part.rollout.prompts))) for part in data.rollouts]
