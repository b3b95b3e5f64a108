"""Collecting: sample responses to prompts, read them with the reference, and have them scored; one step each."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.data.chat import Message, Prompt, message_text
from rlhf_ppo.data.detokenization import Before, TextPieces
from rlhf_ppo.data.prompts import PromptBatch
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.models.acceleration.working_copy import computing
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward.runner import Sequences
from rlhf_ppo.models.sharded.sharding import gathered
from rlhf_ppo.rewards.logs import RewardLog
from rlhf_ppo.rewards.scoring import DecodeOf, Responses, score_responses
from rlhf_ppo.rewards.step_rewards import Decode
from rlhf_ppo.rewards.validation import RewardError, Score
from rlhf_ppo.runtime.machine.signals import stop_if_asked
from rlhf_ppo.runtime.seeding import TRAIN, numbered_generator
from rlhf_ppo.training.outside.publish import require_small_gap
from rlhf_ppo.training.rewards import with_scores
from rlhf_ppo.training.rollouts.generate import generate, write_failed
from rlhf_ppo.training.run import Run
from rlhf_ppo.training.state import TrainState


def collect(
    run: Run, model: ActorCritic, batch: PromptBatch, generator: torch.Generator, *, needs_scores: bool = True
) -> Rollout:
    """Sample one response to each prompt, read it with the reference, and have it scored.

    Args:
        run: the sampler, the reference and the rewards are its.
        model: policy and critic.
        batch: B prompts with their other columns, which the reward functions receive.
        generator: source of the draws, on the run's device.
        needs_scores: refuse a rollout without any score.
    Raises:
        ValueError: a prompt is bad; names its number.
        RewardError, RespondError: a reward function, ``respond`` or an environment failed; what it failed on is
            written to failed_rollout.jsonl first.
    """
    with closing_episodes(run):
        rollout = generate(run, model, batch, generator)
        rollout = read_reference(run, model, rollout)
        return score(run, rollout, needs_scores=needs_scores)


def next_prompts(run: Run, iteration: int, extra: int = 0) -> PromptBatch:
    """Return the prompts of the update after ``iteration`` others, each ``num_generations`` times.

    ``extra``: prompts that those drew beside their own.
    """
    assert run.train_prompts is not None
    copies = run.args.num_generations
    size = run.args.rollout_batch_size // copies
    batch = run.train_prompts.batch(iteration, size, extra=extra)
    return make_batch(batch.prompts, batch.columns, copies=copies)


def make_batch(prompts: Sequence[Prompt], columns: Mapping[str, Sequence[Any]], *, copies: int) -> PromptBatch:
    """Return the prompts with their other columns, each ``copies`` times, side by side.

    Raises:
        ValueError: there is no prompt, or a column has another length.
    """
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"rollout() takes a list of one or more prompts, got {prompts!r}")
    for name, column in columns.items():
        if len(column) != len(prompts):
            raise ValueError(f"column {name!r} has {len(column)} values for {len(prompts)} prompts: one each is needed")
    return PromptBatch(
        [prompt for prompt in prompts for _ in range(copies)],
        {name: [x for x in column for _ in range(copies)] for name, column in columns.items()},
    )


def next_draws(run: Run, state: TrainState) -> torch.Generator:
    """Return the generator of the next rollout's draws; it depends on the rollout's number alone."""
    return numbered_generator(run.args.seed, TRAIN, state.rollouts_made + 1, run.device)


@contextmanager
def closing_episodes(run: Run) -> Iterator[None]:
    """Close on exit, after rewards have read them or something failed, the episodes that are still open."""
    try:
        yield
    finally:
        if (close := getattr(run.respond, "close_episodes", None)) is not None:
            close()


def note_rows(read: dict[str, Tensor], rollout: Rollout, name: str, part: Tensor | None, rows: list[int]) -> None:
    """Write what a pass over some rows of a rollout gave, [n, t], into ``read[name]`` [B, T]; None: nothing."""
    if part is not None:
        whole = read.setdefault(name, rollout.logprobs.new_zeros(rollout.mask.shape, dtype=part.dtype))
        whole[rows, : part.shape[1]] = part


def read_reference(run: Run, model: ActorCritic, rollout: Rollout) -> Rollout:
    """Add the reference's log-probs, and with the same passes a separate critic's values or recomputed log-probs.

    Raises:
        VLLMError: a server sampled, and its log-probs are too far from the recomputed ones.
    """
    rollout = read_policies(run, model, rollout)
    require_small_gap(run, rollout)
    return rollout


def read_policies(run: Run, model: ActorCritic, rollout: Rollout) -> Rollout:
    """Do what :func:`read_reference` does, whatever the recomputed log-probs are."""
    with run.stopwatch.phase("reference"):
        read = read_divided(run, model, rollout, lambda part: _read_pass(run, model, rollout, part))
    if "logprobs" not in read:
        return dataclasses.replace(rollout, **read)
    gap = float((read["logprobs"] - rollout.logprobs).abs().max())
    return dataclasses.replace(rollout, **read, sampled_logprobs=rollout.logprobs, decode_gap=gap)


@torch.no_grad()
def read_divided(
    run: Run, model: ActorCritic, rollout: Rollout, read_pass: Callable[[Sequences], dict[str, Tensor | None]]
) -> dict[str, Tensor]:
    """Have each process read its share of a rollout's rows; returns what all have read, by name [B, T].

    ``read_pass`` reads some rows, [n, t] by name; None: nothing.
    """
    shares, whole = run.shares(rollout, range(len(rollout.prompts))), dict[str, Tensor]()

    def work() -> dict[str, Tensor]:
        own, read = shares[run.processes.rank], dict[str, Tensor]()
        for rows in run.passes(model, rollout, shares):
            stop_if_asked()
            with computing(model, bf16=run.bf16):
                found = read_pass(rollout.sequences(rows or [0]))  # of no rows: for the other processes' sake
            for name, part in found.items() if rows else ():
                note_rows(read, rollout, name, part, rows)
        return {name: x[own] for name, x in read.items()}

    # Processes that share the weights make all passes together.
    exchange = run.processes.exchange if run.plan.sharding is None else run.processes.exchange_together
    for rows, part in zip(shares, exchange(lambda: (work(), None)), strict=True):
        for name, x in part.tensors.items():
            note_rows(whole, rollout, name, x.to(run.device), rows)
    return whole


def _read_pass(run: Run, model: ActorCritic, rollout: Rollout, part: Sequences) -> dict[str, Tensor | None]:
    """Read some rows with the reference, and with the critic or the policy where that is needed."""
    read: dict[str, Tensor | None] = {"ref_logprobs": run.reference.logprobs(part, temperature=run.args.temperature)}
    if run.args.recomputes_logprobs or rollout.foreign:
        # Decoding has recorded the entropy; another program has not.
        again = model(*part, temperature=run.args.temperature, entropy=rollout.foreign)
        read |= {"logprobs": again.logprobs, "values": model.in_reward_units(again.values, part.mask)}
        return {**read, "entropy": again.entropy}
    if rollout.values is None:
        with gathered(model):
            read["values"] = model.in_reward_units(model.separate_values(part), part.mask)
    return read


def score(run: Run, rollout: Rollout, *, needs_scores: bool = True) -> Rollout:
    """Score the responses with every reward function; see :func:`collect`."""
    with run.stopwatch.phase("score"):
        before, log = _cache_use(run), RewardLog()
        try:
            parts = _score_parts(run, rollout, log, needs_scores=needs_scores)
            if needs_scores and all(None in row for row in zip(*parts.values(), strict=True)):
                raise RewardError("no completion was scored by every reward function")
        except RewardError as error:
            logged = log.columns(len(rollout.prompts))
            rows = (
                {"prompt": prompt, "completion": said, **{name: values[i] for name, values in logged.items()}}
                for i, (prompt, said) in enumerate(zip(rollout.prompts, rollout.completions, strict=True))
            )
            file = run.folder.path / "failed_rollout.jsonl"
            if run.processes.first:
                write_failed(file, rows)
            raise RewardError(f"{error}. The responses are in {file}") from error.__cause__
        rollout = with_scores(rollout, parts, [weight for _, weight in run.rewards.values()])
        logged = {"logged_metrics": log.metrics(), "logged_columns": log.columns(len(rollout.prompts))}
        rollout = dataclasses.replace(rollout, **logged)
        if run.score_caches:
            hits, lookups = (now - then for now, then in zip(_cache_use(run), before, strict=True))
            rollout = dataclasses.replace(rollout, cache_hit_fraction=hits / lookups)
        if needs_scores:
            _warn_of_constant_scores(rollout)
        return rollout


def responses_of(rollout: Rollout) -> Responses:
    """Return what reward functions receive about a rollout."""
    ids, turns = (
        None if x is None else [row[keep].tolist() for row, keep in zip(x, rollout.mask, strict=True)]
        for x in (rollout.response_ids, rollout.turns)
    )
    return Responses(rollout.prompts, rollout.completions, rollout.columns, ids, rollout.conversations, turns)


def decoding_of(run: Run, rollout: Rollout, rows: Sequence[int] | None = None) -> DecodeOf:
    """Return how the ids of a rollout's responses were decoded; of ``rows`` alone if they are given."""
    pieces = TextPieces(run.tokenizer)

    def decode_of(i: int, turn: int) -> Decode:
        return partial(pieces.decode, _before_turn(pieces, rollout, i if rows is None else rows[i], turn))

    return decode_of


def _score_parts(run: Run, rollout: Rollout, log: RewardLog, *, needs_scores: bool) -> dict[str, list[Score]]:
    return score_responses(
        {name: function for name, (function, _) in run.rewards.items()},
        responses_of(rollout),
        decode_of=decoding_of(run, rollout),
        timeout_s=run.args.reward_timeout_s,
        drop_nonfinite=run.args.drop_nonfinite_scores,
        needs_scores=needs_scores,
        caches=run.score_caches,
        processes=run.processes,
        own=run.own_rows(len(rollout.prompts)),
        whole_rollout=run.args.whole_rollout_rewards,
        log=log,
    )


def _warn_of_constant_scores(rollout: Rollout) -> None:
    assert rollout.scores is not None and rollout.scored is not None
    scores = rollout.scores[rollout.scored]
    if len(scores) > 1 and rollout.token_scores is None and torch.unique(scores).numel() == 1:
        warnings.warn(
            f"every response scored {float(scores[0])}: a constant reward gives no signal to learn from", stacklevel=5
        )


def _cache_use(run: Run) -> tuple[int, int]:
    caches = run.score_caches.values()
    return sum(cache.hits for cache in caches), sum(cache.lookups for cache in caches)


def _before_turn(pieces: TextPieces, rollout: Rollout, i: int, turn: int) -> Before:
    """Return what precedes the policy's turn ``turn`` in response ``i``."""
    ids, text = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist(), rollout.prompts[i]
    if turn and rollout.turns is not None and rollout.conversations is not None:
        ids += rollout.response_ids[i][rollout.real[i] & (rollout.turns[i] < turn)].tolist()
        text = _said_before(rollout.conversations[i], turn) if isinstance(text, str) else None
    return pieces.before(ids, text)


def _said_before(messages: Sequence[Message], turn: int) -> str:
    """Return the text between the policy's turn ``turn`` and the one before it."""
    turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    return "".join(message_text(message, "a reply") for message in messages[turns[turn - 1] + 1 : turns[turn]])
