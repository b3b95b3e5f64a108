"""Conversations: turns of the policy with an environment's replies between them, as one sequence to train on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.data.chat import Completion, Messages, Prompt, refuse_prefill, render_prompt
from rlhf_ppo.data.detokenization import Before, TextPieces
from rlhf_ppo.data.tokenization import encode_after, encode_bare, left_pad
from rlhf_ppo.generation.rollout import Sampled
from rlhf_ppo.generation.stop_strings import cut_at
from rlhf_ppo.runtime.user_code import FAILURES, has_ended, start

Respond = Callable[[Messages], str | None]
"""``respond(messages)``, called after each turn of the policy with the whole conversation: the prompt's messages, then
assistant and user by turns (a text prompt is one user message). Text is the next message; None ends the conversation.
What it says after the last turn of all (max_turns, or a full context) is not used. One conversation is one list that
grows from call to call; it must not be changed. If ``respond`` has a method ``close_episodes()``, it is called when a
rollout is over, or has failed."""

_SAID = "x"


class RespondError(RuntimeError):
    """The ``respond`` hook failed, hung, or returned no text; ``conversations`` is what was said until then."""

    def __init__(self, message: str, conversations: Sequence[Messages] = ()) -> None:
        super().__init__(message)
        self.conversations = conversations


class Conversations(NamedTuple):
    """B conversations. T tokens after the prompt at most, each row without holes and padded on the right."""

    sampled: Sampled
    """The policy's turns; ids of the replies' tokens lie between them, outside the mask."""
    environment: Tensor
    """[B, T] bool, True on tokens of replies."""
    turns: Tensor
    """[B, T] long, the number of the turn, from 0; a reply's tokens count to the turn before it."""
    place: Tensor
    """[B, T] long, the number of each action within its turn, from 0."""
    context_full: Tensor
    """[B] bool, True where the reply left no room for another turn of full length."""
    messages: list[Messages]
    """[B] what was said, the prompt's messages first."""
    completions: list[Completion]
    """[B] for chat prompts the messages after the prompt; for text prompts the text after it, as the policy read it."""


def converse(
    sample: Callable[[Tensor, Tensor, list[Before]], Sampled],
    prompts: Sequence[Prompt],
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    respond: Respond,
    timeout_s: float | None = None,
    max_turns: int,
    room: int | None,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Collection[int],
    stop_strings: Sequence[str] = (),
) -> Conversations:
    """Let the policy and ``respond`` speak in turn.

    A turn goes on from the very ids that were sampled before it; of text only what is new is encoded.

    Args:
        sample: one turn: (ids [N, P] left-padded, mask [N, P], [N] the same as what a piece of text lies behind) ->
            :class:`rlhf_ppo.generation.rollout.Sampled`.
        prompts: [B] text or chat messages.
        prompt_ids, prompt_mask: [B, P], left-padded.
        respond: see :data:`Respond`.
        timeout_s: longest time in seconds for one call of ``respond``; one that takes longer is left behind.
        max_turns: most turns of the policy.
        room: most tokens that may lie before a turn; None: no limit. A reply that would pass it is not added, and the
            conversation ends.
        tokenizer: the policy's.
        stop_token_ids: those that end a turn.
        stop_strings: a turn's text is cut before the first of them.
    Raises:
        RespondError: ``respond`` raised, ran out of time, or returned what is no text; shows the conversation.
        ValueError: the chat template does not render a conversation by adding to its end.
    """
    device = prompt_ids.device
    pieces, spelled = TextPieces(tokenizer), TextPieces(tokenizer, special=True)
    context = [ids[keep].tolist() for ids, keep in zip(prompt_ids, prompt_mask, strict=True)]
    before = [pieces.before(ids, p) for ids, p in zip(context, prompts, strict=True)]
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            refuse_prefill(prompt, f"prompt {i}")
    messages: list[Messages] = [
        [{"role": "user", "content": p}] if isinstance(p, str) else [dict(m) for m in p] for p in prompts
    ]
    spoken = [""] * len(prompts)
    records: list[list[tuple[Tensor, ...]]] = [[] for _ in prompts]
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    full = torch.zeros_like(finished)
    has_values = False
    live = list(range(len(prompts)))
    for turn in range(max_turns):
        turns_ids, turns_mask = left_pad([context[i] for i in live], filler=0, device=device)
        sampled = sample(turns_ids, turns_mask, [before[i] for i in live])
        has_values = sampled.values is not None
        values = sampled.logprobs if sampled.values is None else sampled.values
        finished[live] = sampled.finished
        speakers, live = live, []
        for k, i in enumerate(speakers):
            n = int(sampled.mask[k].sum())
            ids = sampled.response_ids[k, :n]
            recorded = (x[k, :n] for x in (sampled.mask, sampled.logprobs, sampled.entropy, values))
            records[i].append((ids, *recorded, torch.full_like(ids, turn), torch.arange(n, device=device)))
            said = ids.tolist()
            text = pieces.decode(before[i], said)
            messages[i].append({"role": "assistant", "content": cut_at(text, stop_strings)})
            reply = _ask(respond, messages, i, timeout_s)
            if reply is None or turn == max_turns - 1:
                spoken[i] += cut_at(text, stop_strings)
                continue
            if isinstance(prompts[i], str):
                new = spelled.encode(Before(context[i] + said), reply)
            else:
                new = reply_ids(tokenizer, messages[i], reply, said[-1] if said[-1] in stop_token_ids else None)
            if room is not None and len(context[i]) + len(said) + len(new) > room:
                spoken[i] += cut_at(text, stop_strings)
                full[i] = True
                continue
            heard = torch.tensor(new, dtype=torch.long, device=device)
            nothing = torch.zeros(len(new), device=device)
            silent = torch.zeros_like(heard)
            records[i].append((heard, silent.bool(), nothing, nothing, nothing, silent + turn, silent))
            context[i] += said + new
            before[i] = pieces.before(context[i], reply if isinstance(prompts[i], str) else None)
            messages[i].append({"role": "user", "content": reply})
            spoken[i] += text + reply
            live.append(i)
        if not live:
            break
    response_ids, mask, logprobs, entropy, values, turns, place = (
        pad_sequence([torch.cat(parts) for parts in rows], batch_first=True)
        for rows in zip(*([*zip(*row, strict=True)] for row in records), strict=True)
    )
    real = (
        pad_sequence([torch.ones(sum(len(p[0]) for p in row)) for row in records], batch_first=True).bool().to(device)
    )
    return Conversations(
        Sampled(response_ids, mask, finished, logprobs, entropy, values if has_values else None),
        real & ~mask,
        turns,
        place,
        full,
        messages,
        [
            spoken[i] if isinstance(prompt, str) else messages[i][len(prompt) :]  # the transcript, or what it says
            for i, prompt in enumerate(prompts)
        ],
    )


def _ask(respond: Respond, conversations: Sequence[Messages], i: int, timeout_s: float | None) -> str | None:
    messages = conversations[i]
    call = start(partial(respond, messages), timeout_s)
    if not has_ended(call, timeout_s):
        raise RespondError(
            f"respond did not return within respond_timeout_s={timeout_s}, asked about {messages!r:.500}", conversations
        )
    try:
        reply: Any = call.result()
    except FAILURES as error:
        raise RespondError(
            f"respond raised {type(error).__name__}: {error}, asked about {messages!r:.500}", conversations
        ) from error
    if reply is None or isinstance(reply, str):
        return reply
    raise RespondError(
        f"respond must return text, or None to end the conversation; it returned {type(reply).__name__} "
        f"{reply!r:.80} about {messages!r:.500}",
        conversations,
    )


def reply_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    reply: str,
    stop: int | None,
    where: str = "the conversation",
) -> list[int]:
    """Token ids to append after the policy's turn, ``messages[-1]``, so that it can answer ``reply`` in a chat.

    They are what the chat template puts behind the turn: its end, the reply as a user's message, the opening of the
    next turn.

    Args:
        stop: the stop token that the policy's turn ended with, or None. Where the template would put it, it is there.
    Raises:
        ValueError: the template renders the conversation differently once it goes on, or fails on it; names ``where``.
    """
    before = render_prompt(tokenizer, messages[:-1], where)
    # What the policy said is there as it was sampled; in the template anything may stand for it.
    answered = [*messages[:-1], {"role": "assistant", "content": _SAID}, {"role": "user", "content": reply}]
    after = render_prompt(tokenizer, answered, where)
    # Some templates put a space before what is said; the policy has written its own.
    turn = after[len(before) :].lstrip()
    if not after.startswith(before) or not turn.startswith(_SAID):
        raise ValueError(
            f"{where}: the chat template does not render a conversation by adding to its end, so a further turn would "
            "change what came before it: use a template that keeps earlier messages as they were, or write prompts as "
            "text "
            f"(before the turn: {before[-80:]!r}; with an answer: {after[-160:]!r})"
        )
    rest = turn[len(_SAID) :]
    ids = encode_after(tokenizer, _SAID, rest)
    if ids is None:
        ids = encode_bare(tokenizer, rest)
    # Some templates put a space before the end of a turn.
    if stop in ids and not str(tokenizer.decode(ids[: ids.index(stop)])).strip():
        return ids[ids.index(stop) + 1 :]
    return ids
