"""Multi-turn: conversations of the policy with an environment, each one sequence to train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.core import BannedTokens
from rlhf_ppo.data.chat import Completion, Messages, Prompt, refuse_prefill
from rlhf_ppo.data.detokenization import Before, TextPieces
from rlhf_ppo.data.tokenization import left_pad
from rlhf_ppo.generation.reply_tokens import chat_reply_ids
from rlhf_ppo.generation.rollout import SampledResponses, SamplingParams
from rlhf_ppo.generation.stop_strings import cut_at_stop_string
from rlhf_ppo.runtime.command_line.user_code import FAILURES, has_ended, start
from rlhf_ppo.runtime.errors import RunError

Respond = Callable[[Messages], str | None]
"""``respond(messages)``, called after each turn of the policy with the whole conversation: the prompt's messages, then
assistant and user by turns (a text prompt is one user message). Text is the next message; None ends the conversation.
What it returns after the last turn of all (max_turns, or a full context) is not used. One conversation is one list that
grows from call to call; it must not be changed. If ``respond`` has a method ``close_episodes()``, it is called when a
rollout is over, or has failed."""


class RespondError(RunError):
    """The ``respond`` hook failed, hung, or returned no text; ``conversations`` is what was said until then."""

    def __init__(self, message: str, conversations: Sequence[Messages] = ()) -> None:
        super().__init__(message)
        self.conversations = conversations


class Conversations(NamedTuple):
    """B conversations. At most T tokens after the prompt, each row without holes and padded on the right."""

    sampled: SampledResponses
    """The policy's turns; the ids of replies are between them, outside the mask."""
    environment: Tensor
    """[B, T] bool, True on tokens of replies."""
    turns: Tensor
    """[B, T] long, the number of the turn, from 0; a reply's tokens count to the turn before it."""
    context_full: Tensor
    """[B] bool, True where the reply left no room for another turn of full length."""
    messages: list[Messages]
    """[B] what was said, the prompt's messages first."""
    completions: list[Completion]
    """[B] for chat prompts the messages after the prompt; for text prompts the text after it, as the policy read it."""


def sample_conversations(
    sample: Callable[[Tensor, Tensor, list[Before], list[int]], SampledResponses],
    prompts: Sequence[Prompt],
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    params: SamplingParams,
    *,
    respond: Respond,
    timeout_s: float | None = None,
    max_turns: int,
    room: int | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Conversations:
    """Sample turns of the policy, with the replies of ``respond`` between them.

    Each turn continues from the very ids that were sampled before it; only the reply is encoded.

    Args:
        sample: samples one turn with ``params``: (ids [N, P] left-padded, mask [N, P], the same contexts [N] as what
            the turn's text lies behind, and which of the B conversations these are [N]) -> responses.
        prompts: [B] text or chat messages.
        prompt_ids, prompt_mask: [B, P], left-padded.
        params: what ends a turn.
        respond: see :data:`Respond`.
        timeout_s: timeout in seconds for one call of ``respond``, which is then abandoned; None: no timeout.
        max_turns: maximum number of policy turns.
        room: maximum number of tokens before a turn; None: no limit. A reply that would exceed it is not added, and
            the conversation ends.
        tokenizer: the policy's.
    Raises:
        RespondError: ``respond`` raised, timed out, or returned something other than text; shows the conversation.
        ValueError: the chat template does not render a conversation by adding to its end.
    """
    device = prompt_ids.device
    codec = _Codec(tokenizer, TextPieces(tokenizer), TextPieces(tokenizer, special=True))
    rows = [ids[keep].tolist() for ids, keep in zip(prompt_ids, prompt_mask, strict=True)]
    conversations = [
        _Conversation(prompt, ids, codec, params, i) for i, (prompt, ids) in enumerate(zip(prompts, rows, strict=True))
    ]
    live, has_values = conversations, False
    for turn in range(max_turns):
        ids, mask = left_pad([conversation.context for conversation in live], device)
        numbers = [conversation.number for conversation in live]
        sampled = sample(ids, mask, [conversation.before for conversation in live], numbers)
        has_values = sampled.values is not None
        speakers, live = live, []
        for row, conversation in enumerate(speakers):
            conversation.add_turn(sampled, row, turn)
            reply = _ask(respond, conversation, conversations, timeout_s)
            if reply is None or turn == max_turns - 1:
                continue
            reply_ids = conversation.encode(reply)
            if room is not None and len(conversation.context) + len(reply_ids) > room:
                conversation.context_full = True
                continue
            conversation.add_reply(reply, reply_ids, turn)
            live.append(conversation)
        if not live:
            break
    return _collect(conversations, params, has_values=has_values)


class _Codec(NamedTuple):
    """The policy's tokenizer, and how it reads and writes pieces of text."""

    tokenizer: PreTrainedTokenizerBase
    pieces: TextPieces
    """With special tokens left out, as messages show them."""
    spelled: TextPieces
    """With special tokens spelled out, as the policy reads them."""


class _Part(NamedTuple):
    """Consecutive tokens [n] of a conversation: a turn of the policy, or a reply."""

    ids: Tensor
    mask: Tensor
    """True: a turn; False: a reply."""
    logprobs: Tensor
    entropy: Tensor
    values: Tensor
    banned: Tensor
    turn: Tensor


class _Conversation:
    """One conversation as it grows."""

    def __init__(self, prompt: Prompt, ids: list[int], codec: _Codec, params: SamplingParams, number: int) -> None:
        if isinstance(prompt, str):
            self.messages: Messages = [{"role": "user", "content": prompt}]
        else:
            refuse_prefill(prompt, f"prompt {number}")
            self.messages = [dict(message) for message in prompt]
        self.prompt, self.codec, self.params, self.number = prompt, codec, params, number
        self.context = ids
        """Every token so far, the prompt's first."""
        self.before = codec.pieces.before(ids, prompt)
        self.parts: list[_Part] = []
        self.finished = torch.tensor(False)
        """[] bool, True if a stop token or string ended the last turn."""
        self.context_full = False
        # The text after the prompt: all before the last turn, and the last turn.
        self._text, self._turn_text = "", ""

    def add_turn(self, sampled: SampledResponses, row: int, turn: int) -> None:
        """Add one row of what was sampled as the policy's turn."""
        n = int(sampled.mask[row].sum())
        ids, logprobs = sampled.response_ids[row, :n], sampled.logprobs[row, :n]
        values = torch.zeros_like(logprobs) if sampled.values is None else sampled.values[row, :n]
        mask = sampled.mask[row, :n]
        banned = torch.zeros_like(mask) if sampled.banned is None else sampled.banned.where[row, :n]
        self.parts.append(
            _Part(ids, mask, logprobs, sampled.entropy[row, :n], values, banned, torch.full_like(ids, turn))
        )
        self.finished = sampled.finished[row]
        said = ids.tolist()
        self._turn_text = self.codec.pieces.decode(self.before, said)
        self.context = self.context + said
        content = cut_at_stop_string(self._turn_text, self.params.stop_strings)
        self.messages.append({"role": "assistant", "content": content})

    def encode(self, reply: str) -> list[int]:
        """Return the ids of a reply to the last turn."""
        if isinstance(self.prompt, str):
            return self.codec.spelled.encode(Before(self.context), reply)
        last = self.context[-1]
        stop = last if last in self.params.stop_token_ids else None
        return chat_reply_ids(self.codec.tokenizer, self.messages, reply, stop)

    def add_reply(self, reply: str, ids: list[int], turn: int) -> None:
        """Add a reply, whose tokens are read and masked from the loss."""
        device = self.parts[-1].ids.device
        no, zeros = (torch.zeros(len(ids), dtype=dtype, device=device) for dtype in (torch.bool, torch.float32))
        heard = torch.tensor(ids, dtype=torch.long, device=device)
        self.parts.append(_Part(heard, no, zeros, zeros, zeros, no, torch.full_like(heard, turn)))
        self.context = self.context + ids
        self.before = self.codec.pieces.before(self.context, reply if isinstance(self.prompt, str) else None)
        self.messages.append({"role": "user", "content": reply})
        self._text, self._turn_text = self._text + self._turn_text + reply, ""

    @property
    def completion(self) -> Completion:
        """What came after the prompt: the text as the policy read it, or the messages of a chat."""
        if isinstance(self.prompt, str):
            return self._text + cut_at_stop_string(self._turn_text, self.params.stop_strings)
        return self.messages[len(self.prompt) :]


def _collect(conversations: Sequence[_Conversation], params: SamplingParams, *, has_values: bool) -> Conversations:
    """Pad what was recorded to [B, T]."""

    def padded(field: str) -> Tensor:
        rows = [torch.cat([getattr(part, field) for part in one.parts]) for one in conversations]
        return pad_sequence(rows, batch_first=True)

    mask = padded("mask")
    lengths = torch.tensor([sum(len(part.ids) for part in one.parts) for one in conversations], device=mask.device)
    real = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    sampled = SampledResponses(
        padded("ids"),
        mask,
        torch.stack([one.finished for one in conversations]),
        padded("logprobs"),
        padded("entropy"),
        padded("values") if has_values else None,
        BannedTokens(padded("banned"), params.stop_token_ids) if params.min_new_tokens else None,
    )
    return Conversations(
        sampled,
        real & ~mask,
        padded("turn"),
        torch.tensor([one.context_full for one in conversations], device=mask.device),
        [one.messages for one in conversations],
        [one.completion for one in conversations],
    )


def _ask(
    respond: Respond, conversation: _Conversation, conversations: Sequence[_Conversation], timeout_s: float | None
) -> str | None:
    """Call ``respond`` on one of the conversations and return its reply; errors carry all of them."""
    messages = conversation.messages

    def failure(what: str) -> RespondError:
        return RespondError(f"respond {what}", [one.messages for one in conversations])

    call = start(partial(respond, messages), timeout_s)
    if not has_ended(call, timeout_s):
        raise failure(f"did not return within respond_timeout_s={timeout_s}, asked about {messages!r:.500}")
    try:
        reply: Any = call.result()
    except FAILURES as error:
        raise failure(f"raised {type(error).__name__}: {error}, asked about {messages!r:.500}") from error
    if reply is None or isinstance(reply, str):
        return reply
    raise failure(
        f"must return text, or None to end the conversation; it returned {type(reply).__name__} "
        f"{reply!r:.80} about {messages!r:.500}"
    )
