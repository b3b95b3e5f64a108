"""Probe: sample from the untrained policy, have its responses scored twice, and measure what the scores are made of."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_ppo.generation.environments.episodes import Episodes
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.rewards.scoring import Responses, score_responses, total_score
from rlhf_ppo.rewards.validation import Score
from rlhf_ppo.runtime.seeding import EVALUATION, numbered_generator
from rlhf_ppo.training.rollouts.collect import closing_episodes, decoding_of, make_batch, responses_of
from rlhf_ppo.training.rollouts.generate import generate
from rlhf_ppo.training.run import Run

Numbers = NDArray[np.float64]

TIES = 1e-6
"""Scores closer than this are the same."""


@dataclass(frozen=True)
class Probe:
    """Scored responses of the untrained policy, ``each`` of them to a prompt, side by side."""

    rollout: Rollout
    each: int
    parts: dict[str, Numbers]
    """Reward function -> [B] scores, NaN where it gave none."""
    again: dict[str, Numbers]
    """The same responses' scores when asked a second time, last response first; an environment is not asked twice."""
    to_go: Numbers
    """[B, T] what follows each token, in weighted sums of scores; NaN after the last one, and without a score."""
    weights: dict[str, float]
    sampling_s: float
    """Seconds in which the responses were sampled."""
    scoring_s: dict[str, float]
    """Reward function -> seconds in which it scored them."""

    @property
    def totals(self) -> Numbers:
        """[B] weighted sums of the parts; NaN where one gave none."""
        return np.sum([self.weights[name] * part for name, part in self.parts.items()], axis=0)

    @property
    def differs_by_token(self) -> bool:
        """Whether what follows the same token of a prompt's responses differs: with equal sums, too, they can teach."""
        groups = self.to_go.reshape(-1, self.each, self.to_go.shape[1])
        given = np.isfinite(groups)
        highest = groups.max(axis=1, where=given, initial=-np.inf)
        return bool((highest - groups.min(axis=1, where=given, initial=np.inf) > TIES).any())

    @property
    def lengths(self) -> Numbers:
        """[B] lengths of the responses: in tokens, or in characters where all have as many tokens."""
        tokens = self.rollout.lengths.double().numpy(force=True)
        return tokens if tokens.std() else np.array([len(str(said)) for said in self.rollout.completions], float)

    def by_prompt(self, numbers: Numbers) -> Numbers:
        """Return numbers [B] as [prompts, each]."""
        return numbers.reshape(-1, self.each)


def sample_and_measure(run: Run, model: ActorCritic, prompts: int, each: int) -> Probe:
    """Sample responses and score them, while their environments are there.

    Raises:
        RunError: a reward function, ``respond`` or an environment failed.
    """
    with closing_episodes(run):
        rollout, seconds = sample(run, model, prompts, each)
        return measure(run, rollout, each, seconds)


def sample(run: Run, model: ActorCritic, prompts: int, each: int) -> tuple[Rollout, float]:
    """Sample responses to some prompts, spread over the data set; returns them and the seconds that took."""
    assert run.train_prompts is not None
    count = len(run.train_prompts)
    batch = run.train_prompts.take(sorted({i * count // prompts for i in range(prompts)}))
    batch = make_batch(batch.prompts, batch.columns, copies=each)
    started = time.perf_counter()
    rollout = generate(run, model, batch, numbered_generator(run.args.seed, EVALUATION, 0, run.device))
    return rollout, time.perf_counter() - started


def measure(run: Run, rollout: Rollout, each: int, sampling_s: float) -> Probe:
    """Score responses, twice where that may differ.

    Raises:
        RewardError: a reward function failed.
    """
    responses, order = responses_of(rollout), list(range(len(rollout.prompts)))
    parts, again, scoring_s = dict[str, Numbers](), dict[str, Numbers](), dict[str, float]()
    to_go = np.where(rollout.mask.numpy(force=True), 0.0, np.nan)
    for name, (function, weight) in run.rewards.items():
        started = time.perf_counter()
        scores = scores_of(run, name, responses, rollout=rollout)
        parts[name], scoring_s[name] = totals_of(scores), time.perf_counter() - started
        to_go += weight * _to_go(scores, to_go.shape)
        if isinstance(function, Episodes):
            continue  # it gave each reward once, while it ran
        started, backwards = time.perf_counter(), order[::-1]  # again: what a reward loads at first is not timed
        again[name] = ask(run, name, responses.take(backwards), rollout=rollout, rows=backwards)[::-1]
        scoring_s[name] = time.perf_counter() - started
    weights = {name: weight for name, (_, weight) in run.rewards.items()}
    return Probe(rollout, each, parts, again, to_go, weights, sampling_s, scoring_s)


def _to_go(scores: Sequence[Score], shape: tuple[int, ...]) -> Numbers:
    """Return [B, T] what follows each token: the sum of its and later tokens' scores, or the whole response's score."""
    found = np.full(shape, np.nan)
    for row, score in zip(found, scores, strict=True):
        if isinstance(score, list):
            row[: len(score)] = np.cumsum(score[::-1])[::-1]
        elif score is not None:
            row[:] = score
    return found


def ask(
    run: Run, name: str, responses: Responses, *, rollout: Rollout | None = None, rows: Sequence[int] | None = None
) -> Numbers:
    """Return one reward function's scores of whole responses, NaN where it gave none; see :func:`scores_of`."""
    return totals_of(scores_of(run, name, responses, rollout=rollout, rows=rows))


def totals_of(scores: Sequence[Score]) -> Numbers:
    """Return the scores of whole responses, NaN for none."""
    totals = [total_score(score) for score in scores]
    return np.array([np.nan if total is None else total for total in totals], dtype=float)


def scores_of(
    run: Run, name: str, responses: Responses, *, rollout: Rollout | None = None, rows: Sequence[int] | None = None
) -> list[Score]:
    """Return one reward function's scores of responses.

    Args:
        run: the rewards and their settings are its.
        name: the reward function.
        responses: what it is asked about.
        rollout: where they are from, if they were sampled; ``rows`` of it if these are given.
        rows: see there.
    Raises:
        RewardError: it failed.
    """
    scores: Mapping[str, list[Score]] = score_responses(
        {name: run.rewards[name][0]},
        responses,
        decode_of=None if rollout is None else decoding_of(run, rollout, rows),
        timeout_s=run.args.reward_timeout_s,
        drop_nonfinite=run.args.drop_nonfinite_scores,
        needs_scores=False,
    )
    return scores[name]


def correlation(x: Numbers, y: Numbers) -> float:
    """Return Pearson's correlation; 0 where one of them does not vary, or there are fewer than three numbers."""
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    if len(x) < 3 or x.std() < 1e-9 * (1 + abs(x.mean())) or y.std() < 1e-9 * (1 + abs(y.mean())):
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
