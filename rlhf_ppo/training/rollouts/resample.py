"""Dynamic sampling: replace prompts whose responses all scored alike by further prompts.

Source: Yu et al., "DAPO" (2025), section 3.2. There whole batches are drawn until one is full. Here each round draws as
many prompts as are missing, and rounds are bounded.
"""

from __future__ import annotations

from rlhf_ppo.generation.rollout import Rollout, pick_rows
from rlhf_ppo.runtime.seeding import TRAIN, numbered_generator
from rlhf_ppo.training.advantages import with_signal
from rlhf_ppo.training.rewards import shape_rewards
from rlhf_ppo.training.rollouts.collect import collect, make_batch
from rlhf_ppo.training.run import Run
from rlhf_ppo.training.state import TrainState


def replace_without_signal(run: Run, state: TrainState, rollout: Rollout) -> tuple[Rollout, dict[str, float]]:
    """Replace the groups of a rollout whose scores are equal, under ``zero_signal_prompts="resample"``.

    ``state`` counts what was drawn once all is done: a run that ends in the middle resumes with the same rollout.

    Returns:
        (the rollout, metrics of what was drawn). After ``zero_signal_rounds`` rounds some groups may be left.
    Raises:
        RewardError, RespondError: see :func:`rlhf_ppo.training.rollouts.collect.collect`.
    """
    args, size, data = run.args, run.args.num_generations, run.train_prompts
    assert data is not None and rollout.scores is not None and rollout.scored is not None
    metrics: dict[str, float] = {}
    if args.curriculum_column is not None:
        metrics["progress/curriculum_fraction"] = data.order.window(state.iteration) / len(data)
    if args.zero_signal_prompts != "resample":
        return rollout, metrics
    metrics["score/first_draw_mean"] = float(rollout.scores[rollout.scored].mean())
    wanted, missing, rounds, drawn = args.rollout_batch_size // size, _groups(run, state, rollout, signal=False), 0, 0
    silent = len(missing)
    while missing and rounds < args.zero_signal_rounds:
        prompts = data.batch(
            state.iteration, wanted, count=len(missing), after=wanted + drawn, extra=state.extra_prompts
        )
        draws = numbered_generator(args.seed, TRAIN, state.rollouts_made + 2 + rounds, run.device)
        batch = make_batch(prompts.prompts, prompts.columns, copies=size)
        fresh = collect(run, state.model, batch, draws, needs_scores=False)
        rounds, drawn = rounds + 1, drawn + len(missing)
        good = _groups(run, state, fresh, signal=True)
        silent += len(missing) - len(good)
        rows = list(range(len(rollout.prompts)))
        for old, new in zip(missing, good, strict=False):
            first = len(rows) + new * size
            rows[old * size : (old + 1) * size] = range(first, first + size)
        rollout, missing = pick_rows(rollout, fresh, rows), missing[len(good) :]
    state.rollouts_made += rounds
    if state.iteration >= data.order.growing:  # a growing window has an order of its own in each iteration
        state.extra_prompts += drawn
    metrics |= {"score/zero_signal_fraction": silent / (wanted + drawn), "score/resampled_prompts": drawn}
    return rollout, metrics


def _groups(run: Run, state: TrainState, rollout: Rollout, *, signal: bool) -> list[int]:
    """Return the numbers of the groups with a signal, or of those without."""
    rewards = shape_rewards(rollout, run.args, state.kl_coef, state.score_statistics)
    found = with_signal(rewards.scores, rewards.mask.any(dim=1), run.args.num_generations)
    return [i for i, has in enumerate(found[:: run.args.num_generations].tolist()) if has is signal]
