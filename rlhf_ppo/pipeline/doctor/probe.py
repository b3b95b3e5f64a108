"""Probe: sample from the untrained policy, have its responses scored twice, and measure what the scores are made of."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.rewards.scoring import Responses, score_responses, total_score
from rlhf_ppo.rewards.validation import Score
from rlhf_ppo.runtime.seeding import EVALUATION, numbered_generator
from rlhf_ppo.training.collect import closing_episodes, decoding_of, make_batch, responses_of
from rlhf_ppo.training.generate import generate
from rlhf_ppo.training.run import Run

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Probe:
    """Scored responses of the untrained policy, ``each`` of them to a prompt, side by side."""

    rollout: Rollout
    each: int
    parts: dict[str, Numbers]
    """Reward function -> [B] scores, NaN where it gave none."""
    again: dict[str, Numbers]
    """The same responses' scores when asked a second time, last response first."""
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
    def lengths(self) -> Numbers:
        """[B] lengths of the responses: in tokens, or in characters where all have as many tokens."""
        tokens = self.rollout.lengths.double().numpy(force=True)
        return tokens if tokens.std() else np.array([len(str(said)) for said in self.rollout.completions], float)

    def by_prompt(self, numbers: Numbers) -> Numbers:
        """Return numbers [B] as [prompts, each]."""
        return numbers.reshape(-1, self.each)


def sample(run: Run, model: ActorCritic, prompts: int, each: int) -> tuple[Rollout, float]:
    """Sample responses to some prompts, spread over the data set; returns them and the seconds that took."""
    assert run.train_prompts is not None
    count = len(run.train_prompts)
    batch = run.train_prompts.take(sorted({i * count // prompts for i in range(prompts)}))
    batch = make_batch(batch.prompts, batch.columns, copies=each)
    started = time.perf_counter()
    with closing_episodes(run):
        rollout = generate(run, model, batch, numbered_generator(run.args.seed, EVALUATION, 0, run.device))
    return rollout, time.perf_counter() - started


def measure(run: Run, rollout: Rollout, each: int, sampling_s: float) -> Probe:
    """Score responses twice.

    Raises:
        RewardError: a reward function failed.
    """
    responses, order = responses_of(rollout), list(range(len(rollout.prompts)))
    parts, again, scoring_s = dict[str, Numbers](), dict[str, Numbers](), dict[str, float]()
    for name in run.rewards:
        parts[name] = ask(run, name, responses, rollout=rollout)  # what it loads at first is not timed
        started, backwards = time.perf_counter(), order[::-1]
        again[name] = ask(run, name, responses.take(backwards), rollout=rollout, rows=backwards)[::-1]
        scoring_s[name] = time.perf_counter() - started
    weights = {name: weight for name, (_, weight) in run.rewards.items()}
    return Probe(rollout, each, parts, again, weights, sampling_s, scoring_s)


def ask(
    run: Run, name: str, responses: Responses, *, rollout: Rollout | None = None, rows: Sequence[int] | None = None
) -> Numbers:
    """Return one reward function's scores of responses, NaN where it gave none.

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
    totals = [total_score(score) for score in scores[name]]
    return np.array([np.nan if total is None else total for total in totals], dtype=float)


def correlation(x: Numbers, y: Numbers) -> float:
    """Return Pearson's correlation; 0 where one of them does not vary, or there are fewer than three numbers."""
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    if len(x) < 3 or x.std() < 1e-9 * (1 + abs(x.mean())) or y.std() < 1e-9 * (1 + abs(y.mean())):
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
