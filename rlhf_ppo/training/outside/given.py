"""Given rollouts: responses that were sampled elsewhere, checked, become a rollout that an update learns from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_ppo.data.chat import Prompt
from rlhf_ppo.data.detokenization import TextPieces
from rlhf_ppo.data.tokenization import fit_prompt, left_pad, tokenize_prompt
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.generation.stop_strings import cut_at_stop_string
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.loading import context_length, vocabulary_size
from rlhf_ppo.training.rewards import with_scores
from rlhf_ppo.training.rollouts.collect import closing_episodes, read_policies, score
from rlhf_ppo.training.run import Run

_ROUNDING = 1e-3
"""Nats by which rounding may lift a log-prob above 0."""


class GivenResponses(NamedTuple):
    """Responses to B prompts; arguments of :meth:`rlhf_ppo.PPOTrainer.rollout_from`."""

    prompts: Sequence[Prompt]
    prompt_ids: Sequence[Sequence[int]] | None
    completion_ids: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float | None]]
    masks: Sequence[Sequence[bool]] | None
    scores: Sequence[float | None] | None


def given_rollout(run: Run, model: ActorCritic, given: GivenResponses, columns: Mapping[str, Sequence[Any]]) -> Rollout:
    """Make a rollout of responses from elsewhere; see :meth:`rlhf_ppo.PPOTrainer.rollout_from`."""
    given = _checked(run, model, given, columns)
    assert given.prompt_ids is not None and given.masks is not None
    device, pieces, strings = run.device, TextPieces(run.tokenizer), run.sampling.stop_strings
    prompt_ids, prompt_mask = left_pad(given.prompt_ids, device)
    ids = _padded(given.completion_ids, torch.long, device)
    mask = _padded(given.masks, torch.bool, device)
    known = [
        [float(x or 0.0) if own else 0.0 for x, own in zip(row, masks, strict=True)]
        for row, masks in zip(given.logprobs, given.masks, strict=True)
    ]
    real = _padded([[True] * len(row) for row in given.completion_ids], torch.bool, device)
    foreign = real & ~mask
    rows = zip(given.prompts, given.prompt_ids, given.completion_ids, given.masks, strict=True)
    texts, stopped = zip(*(_text(pieces, strings, *row) for row in rows), strict=True)
    rows = zip(stopped, given.completion_ids, given.masks, strict=True)
    ends = [end or (own[-1] and row[-1] in run.sampling.stop_token_ids) for end, row, own in rows]
    turns = bool(foreign.any())
    rollout = Rollout(
        list(given.prompts),
        {name: list(column) for name, column in columns.items()},
        prompt_ids,
        prompt_mask,
        ids,
        mask,
        torch.tensor(ends, device=device),
        _padded(known, torch.float32, device),
        torch.zeros(mask.shape, device=device),
        None,
        model.value_scale,
        list(texts),
        foreign=True,
        environment=foreign if turns else None,
        turns=_turns(mask, real) if turns else None,
        context_full=torch.zeros(len(ids), dtype=torch.bool, device=device) if turns else None,
    )
    rollout = read_policies(run, model, rollout)
    if given.scores is not None:
        return with_scores(rollout, {"given": list(given.scores)}, [1.0])
    with closing_episodes(run):
        return score(run, rollout)


def _text(
    pieces: TextPieces,
    strings: Sequence[str],
    prompt: Prompt,
    prompt_ids: Sequence[int],
    ids: Sequence[int],
    mask: Sequence[bool],
) -> tuple[str, bool]:
    """Decode a response; returns the text, its last turn cut before a stop string, and whether it had one.

    A stop string ends one turn, not the conversation: those of earlier turns, and of replies, end nothing here.
    """
    end = max(i for i, own in enumerate(mask) if own) + 1
    first = max((i for i, own in enumerate(mask[:end]) if not own), default=-1) + 1
    head = pieces.decode(pieces.before(prompt_ids, prompt), ids[:first])
    before = pieces.before([*prompt_ids, *ids[:first]], prompt if not first else None)
    turn, after = pieces.decode(before, ids[first:end]), ""
    if end < len(ids):
        after = pieces.decode(pieces.before([*prompt_ids, *ids[:end]]), ids[end:])
    cut = cut_at_stop_string(turn, strings)
    return head + cut + after, cut != turn


def _turns(mask: Tensor, real: Tensor) -> Tensor:
    """Number the policy's turns: one begins with each of its tokens that follows another's."""
    begins = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return ((begins.cumsum(dim=1) - 1).clamp(min=0)) * real


def _padded(rows: Sequence[Sequence[Any]], dtype: torch.dtype, device: torch.device) -> Tensor:
    return pad_sequence([torch.tensor(list(row), dtype=dtype) for row in rows], batch_first=True).to(device)


def _checked(
    run: Run, model: ActorCritic, given: GivenResponses, columns: Mapping[str, Sequence[Any]]
) -> GivenResponses:
    """Raise a ValueError that names the response and what is wrong with it; return all that was left out, too."""
    given = GivenResponses(given.prompts, *(_plain(rows) for rows in given[1:]))
    count, group = len(given.prompts), run.args.num_generations
    _check_counts(given, columns)
    if not count or count % group:
        raise ValueError(
            f"rollout_from() takes one prompt for each response, those of a group side by side: got {count} for groups "
            f"of num_generations={group}"
        )
    if given.scores is not None and (run.args.normalize_scores or run.args.reward_weights):
        name = "normalize_scores" if run.args.normalize_scores else "reward_weights"
        raise ValueError(f"scores are given, and {name} is about the reward functions': leave one of them out")
    if given.scores is not None and (bad := [x for x in given.scores if x is not None and not _is_finite(x)]):
        raise ValueError(f"scores must be finite, or None where a response has none, got {bad[0]!r:.80}")
    prompts = _prompt_ids(run, given.prompts, columns) if given.prompt_ids is None else given.prompt_ids
    masks = [[True] * len(ids) for ids in given.completion_ids] if given.masks is None else given.masks
    policy: Any = model.policy
    vocabulary = vocabulary_size(policy.config)
    for i, rows in enumerate(zip(prompts, given.completion_ids, given.logprobs, masks, strict=True)):
        if problem := _problem(*rows, vocabulary=vocabulary, context=context_length(policy.config)):
            raise ValueError(f"response {i}: {problem}")
    return given._replace(prompt_ids=prompts, masks=[[bool(x) for x in row] for row in masks])


def _prompt_ids(run: Run, prompts: Sequence[Prompt], columns: Mapping[str, Sequence[Any]]) -> list[list[int]]:
    """Encode prompts as a rollout of our own would, with their rows' template variables and tools."""
    templates = run.template.of_columns(columns, len(prompts))
    rows = [tokenize_prompt(x, run.tokenizer, f"prompt {i}", templates[i]) for i, x in enumerate(prompts)]
    if run.args.overlong_prompts != "truncate":  # then the check against the context says what is too long
        return rows
    bos = run.tokenizer.bos_token_id
    return [fit_prompt(ids, run.room, "truncate", f"prompt {i}", bos=bos) or [] for i, ids in enumerate(rows)]


def _plain(value: Any) -> Any:
    """Return tensors and arrays, in sequences too, as lists and numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(part) for part in value]
    return value


def _is_finite(x: Any) -> bool:
    return isinstance(x, (int, float)) and math.isfinite(x)


def _check_counts(given: GivenResponses, columns: Mapping[str, Sequence[Any]]) -> None:
    needed = ("completion_ids", "logprobs")
    for name, rows in {**given._asdict(), **columns}.items():
        if rows is None and name not in needed:
            continue
        if not isinstance(rows, Sequence) or isinstance(rows, str):
            raise ValueError(f"{name} must be a list with one entry for each response, got {rows!r:.80}")
        if len(rows) != len(given.prompts):
            raise ValueError(f"{name} has {len(rows)} rows for {len(given.prompts)} prompts: one each is needed")
        if name in (*needed, "prompt_ids", "masks"):
            for i, row in enumerate(rows):
                if not isinstance(row, list):
                    raise ValueError(f"response {i}: its {name} must be a list, got {row!r:.80}")


def _problem(
    prompt: Sequence[int],
    ids: Sequence[int],
    logprobs: Sequence[float | None],
    mask: Sequence[bool],
    *,
    vocabulary: int,
    context: int | None,
) -> str | None:
    """Return what is wrong with one response; None: nothing."""
    if wrong := [i for i in (*prompt, *ids) if type(i) is not int]:
        return f"token ids must be whole numbers, got {wrong[0]!r:.80}"
    if wrong := [own for own in mask if own not in (False, True)]:
        return f"masks must be True or False, got {wrong[0]!r:.80}"
    if not len(prompt) or not any(mask):
        return "it has no token of the prompt, or none that the policy chose"
    for name, row in (("logprobs", logprobs), ("masks", mask)):
        if len(row) != len(ids):
            return f"{len(ids)} completion_ids and {len(row)} {name}: one each is needed"
    if outside := [i for i in (*prompt, *ids) if not 0 <= i < vocabulary]:
        return f"token id {outside[0]} is not in the model's vocabulary of {vocabulary}: another tokenizer made it"
    if context is not None and len(prompt) + len(ids) > context:
        return f"prompt and completion have {len(prompt)} + {len(ids)} tokens, but the model's context holds {context}"
    for place, (x, own) in enumerate(zip(logprobs, mask, strict=True)):
        if own and (not _is_finite(x) or x is None or x > _ROUNDING):
            said = f"token {place} has the log-prob {x!r:.80}"
            return f"{said}: it must be finite and at most 0, at the run's temperature"
    return None
