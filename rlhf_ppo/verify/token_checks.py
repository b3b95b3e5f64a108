"""Checks of tokens: padding, sampling, decoding, and the ids that are trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_ppo.core import Experience
from rlhf_ppo.data.tokenization import encode_prompts, tokenize_prompt
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.generation.sampling import RowsOf
from rlhf_ppo.models.acceleration.working_copy import computing
from rlhf_ppo.verify.changed_rollouts import all_sequences, widened
from rlhf_ppo.verify.report import Check, Finding
from rlhf_ppo.verify.subject import Subject, largest

PLAIN_ROWS = 8
"""Responses that are read one by one."""


# Padding


def _compare_padding(subject: Subject, one: Rollout, other: Rollout) -> tuple[float, float, float]:
    """Return how log-probs (nats), values (relative to the largest) and the gradient differ between two paddings."""
    width = subject.rollout.mask.shape[1]
    read = [subject.forward(all_sequences(rollout)) for rollout in (one, other)]
    gap = largest([read[0].logprobs[:, :width] - read[1].logprobs[:, :width]])
    values = [x.values[:, :width] for x in read if x.values is not None]
    share = largest([values[0] - values[1]]) / max(1.0, largest(values)) if values else 0.0
    gradients = [subject.gradient(rollout, _padded(subject.experience, rollout)) for rollout in (one, other)]
    return gap, share, gradients[0].difference(gradients[1])


def _padded(old: Experience, rollout: Rollout) -> Experience:
    more, pad = rollout.mask.shape[1] - old.mask.shape[1], torch.nn.functional.pad
    fields: dict[str, Any] = {n: None if x is None else pad(x, (0, more)) for n, x in vars(old).items()}
    return Experience(**fields)


def _padding(subject: Subject) -> Finding:
    wide = widened(subject.scored, left=7, right=5, filler=0)
    together = _compare_padding(subject, subject.scored, wide)
    alone = [subject.forward(subject.rollout.sequences([row])).logprobs for row in subject.rows]
    whole = subject.forward(all_sequences(subject.rollout)).logprobs
    by_row = largest(whole[row, : part.shape[1]] - part[0] for row, part in enumerate(alone))
    gap, values, gradient = max(together[0], by_row), *together[1:]
    said = (
        f"7 places more before each prompt and 5 after each response, or each response alone, change log-probs by "
        f"{gap:.2g} nats, values by {values:.2g} of their size and the gradient by {gradient:.2g} of its norm"
    )
    right = max(gap, values) <= subject.bound and gradient <= subject.gradient_bound
    return Finding(right, said, {"gap_nats": gap, "values": values, "gradient": gradient})


def _pad_is_eos(subject: Subject) -> Finding:
    run, tokenizer = subject.run, subject.run.tokenizer
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos")}
    filler = next((i for i in (*run.sampling.stop_token_ids, *ids.values()) if i is not None), None)
    if filler is None:
        return Finding(None, "the tokenizer has neither a pad nor an end-of-text token, and the run no stop token")
    usual, other = (widened(subject.scored, left=3, right=3, filler=i) for i in (int(filler == 0), filler))
    gap, values, gradient = _compare_padding(subject, usual, other)
    text = next((prompt for prompt in subject.rollout.prompts if isinstance(prompt, str)), None)
    spelt = tokenizer.convert_ids_to_tokens(filler)
    lost = 0
    if text is not None:
        twice = f"{text}{spelt}{text}"
        _, mask = encode_prompts([text, twice], tokenizer, room=None, truncate=False, device=run.device)
        lost = len(tokenize_prompt(twice, tokenizer, "the prompt")) - int(mask[1].sum())
    said = (
        f"with {spelt!r} ({filler}; pad is {ids['pad']}, eos {ids['eos']}) in all padding log-probs change by "
        f"{gap:.2g} nats and the gradient by {gradient:.2g} of its norm; a prompt with {spelt!r} inside loses {lost} "
        "tokens"
    )
    right = max(gap, values) <= subject.bound and gradient <= subject.gradient_bound and lost == 0
    return Finding(right, said, {"gap_nats": gap, "gradient": gradient, "lost": lost})


# Sampling


def _frequencies(subject: Subject) -> Finding:
    run, model, rollout = subject.run, subject.model, subject.rollout
    prompt = rollout.prompt_ids[0][rollout.prompt_mask[0]]
    expected = (subject.plain_logits(prompt)[-1].double() / run.args.temperature).softmax(dim=0)
    size = len(expected)
    # Fewer from large vocabularies, and where few are decoded at once.
    draws = max(256, min(4096, 2**28 // size, 128 * (run.args.decode_batch_size or 32)))
    params = dataclasses.replace(run.sampling, max_new_tokens=1, min_new_tokens=0, stop_strings=())
    generator = torch.Generator(run.device).manual_seed(run.args.seed)
    tokens, logprobs = list[Tensor](), list[Tensor]()
    for first in range(0, draws, most := max(1, min(512, 2**25 // size))):
        n = min(most, draws - first)
        ids, whole = prompt.repeat(n, 1), RowsOf(range(n), n)
        with torch.no_grad(), computing(model, bf16=run.bf16):
            part = run.sample(
                model, ids, torch.ones_like(ids, dtype=torch.bool), params, generator=generator, whole=whole
            )
        tokens.append(part.response_ids[:, 0])
        logprobs.append(part.logprobs[:, 0])
    drawn = torch.cat(tokens)
    gap = largest([torch.cat(logprobs) - expected[drawn].log().float()])
    p, bins = _chi_square(torch.bincount(drawn, minlength=size).double(), expected * draws)
    said = (
        f"{draws} first tokens against the model's own softmax in {bins} bins: p = {p:.2g} (at least 1e-5), and "
        f"recorded log-probs differ by {gap:.2g} nats (at most {subject.bound:g})"
    )
    return Finding(p >= 1e-5 and gap <= subject.bound, said, {"p": p, "bins": bins, "gap_nats": gap})


def _chi_square(observed: Tensor, expected: Tensor) -> tuple[float, int]:
    """Return the p value of Pearson's test and its number of bins; tokens expected less than 5 times share one."""
    own = expected >= 5
    pairs = [torch.cat([x[own], x[~own].sum()[None]]) for x in (observed, expected)]
    if not own.all() and pairs[1][-1] < 5 and len(pairs[1]) > 1:  # too rare even together
        pairs = [torch.cat([x[:-2], x[-2:].sum()[None]]) for x in pairs]
    seen, wanted = (x[pairs[1] > 0] for x in pairs)
    if len(seen) < 2:
        return 1.0, len(seen)
    statistic = ((seen - wanted).square() / wanted).sum()
    half = torch.tensor((len(seen) - 1) / 2, dtype=torch.float64, device=statistic.device)
    return float(torch.special.gammaincc(half, statistic / 2)), len(seen)


def _decode(subject: Subject) -> Finding:
    rollout, rows = subject.rollout, subject.rows[:PLAIN_ROWS]
    plain = [subject.plain_logprobs(row) for row in rows]
    sampled = rollout.logprobs if rollout.sampled_logprobs is None else rollout.sampled_logprobs
    trained = subject.forward(rollout.sequences(subject.rows))
    gaps = {
        words: largest(x[row][rollout.mask[row]] - own for row, own in zip(rows, plain, strict=True))
        for words, x in (("decoding", sampled), ("an update", trained.logprobs))
    }
    values = 0.0
    if rollout.values is not None and (now := subject.model.in_reward_units(trained.values, rollout.mask)) is not None:
        values = largest([now - rollout.values]) / max(1.0, largest([rollout.values]))
    said = (
        f"log-probs of {len(rows)} responses differ from the model's own forward pass by {gaps['decoding']:.2g} nats "
        f"in decoding and {gaps['an update']:.2g} in an update (at most {subject.bound:g}), values by {values:.2g}"
    )
    gap = max(gaps.values())
    return Finding(max(gap, values) <= subject.bound, said, {"gap_nats": gap, "values": values})


# Ids


def _trained_ids(subject: Subject) -> Finding:
    rollout, tokenizer, room = subject.rollout, subject.run.tokenizer, subject.run.room
    wrong: dict[str, int] = {"prompts": 0, "turns": 0, "updates": 0}
    seen = _read_in_update(subject)
    templates = subject.run.template.of_columns(rollout.columns, len(rollout.prompts))
    for row in subject.rows:
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        real, mask = rollout.real[row], rollout.mask[row][rollout.real[row]].tolist()
        said = rollout.response_ids[row][real].tolist()
        own = tokenize_prompt(rollout.prompts[row], tokenizer, f"prompt {row}", templates[row])
        wrong["prompts"] += prompt != own and (room is None or len(own) <= room)
        turns, whole = subject.sampler.turns[row], prompt + said
        places = [(len(turn.context), len(turn.context) + len(turn.said)) for turn in turns]
        same = all(
            whole[:start] == turn.context and whole[start:end] == turn.said
            for turn, (start, end) in zip(turns, places, strict=True)
        )
        chosen = [any(start <= i < end for start, end in places) for i in range(len(prompt), len(whole))]
        wrong["turns"] += not same or chosen != mask
        wrong["updates"] += _bytes(whole[:-1]) not in seen
    count = sum(len(turns) for turns in subject.sampler.turns.values())
    said = (
        f"{len(subject.rows)} responses, {count} turns: {wrong['turns']} differ from what the sampler read and drew, "
        f"{wrong['updates']} from what the update's forward pass read, {wrong['prompts']} from the tokenizer's prompt"
    )
    return Finding(not any(wrong.values()), said, {name: float(n) for name, n in wrong.items()})


def _read_in_update(subject: Subject) -> bytes:
    """Return the ids that the embedding layer reads while the rollout's gradient is computed."""
    read: list[bytes] = []

    def note(_: Any, inputs: tuple[Tensor, ...]) -> None:
        read.extend(_bytes(row) for row in inputs[0].tolist())

    policy: Any = subject.model.policy
    hook = policy.get_input_embeddings().register_forward_pre_hook(note)
    try:
        subject.gradient()
    finally:
        hook.remove()
    return b"".join(read)


def _bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype=np.int64).tobytes()


CHECKS = (
    Check(
        "padding",
        _padding,
        "padding, and the company of other responses, change no log-prob, value or gradient",
        "positions that count padding, an attention mask that is not read, layers that mix rows",
        "attn_implementation='sdpa' or 'eager'; a model whose code takes position_ids",
    ),
    Check(
        "pad_is_eos",
        _pad_is_eos,
        "which id stands in padding changes nothing, even that of a stop token (pad == eos)",
        "masks made by comparing ids with the pad id",
        "nothing to set in this library; in a model's or tokenizer's own code, take masks from lengths",
    ),
    Check(
        "frequencies",
        _frequencies,
        "tokens are drawn from exactly softmax(logits / temperature), and recorded with that probability",
        "top-k, top-p or another filter in the sampler or a generation config, log-probs renormalised after it",
        "no filters: temperature is the one setting that sampling and training share",
    ),
    Check(
        "decode",
        _decode,
        "decoding with a cache and the update's pass give the log-probs of the model's own plain forward pass",
        "a stale or misplaced cache, another temperature, low precision, packed sequences that see each other",
        "recompute_logprobs=True; generation='dynamic'; precision='fp32'",
    ),
    Check(
        "trained_ids",
        _trained_ids,
        "the ids that are trained are those that were sampled, after the context in which they were, over all turns",
        "text that is tokenized again, separators lost between turns, a tokenizer that changes between calls",
        "a tokenizer without state; responses as ids",
    ),
)
