"""Conversations: the turns of the policy and the replies between them, token by token and as messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.core import BannedTokens
from rlhf_ppo.data.chat import (
    SAMPLED_TEXT,
    Completion,
    Message,
    Messages,
    Prompt,
    TemplateOptions,
    is_chat,
    message_text,
    refuse_prefill,
)
from rlhf_ppo.data.detokenization import Before, TextPieces
from rlhf_ppo.generation.reply_tokens import chat_reply_ids
from rlhf_ppo.generation.rollout import SampledResponses, SamplingParams
from rlhf_ppo.generation.stop_strings import cut_at_stop_string
from rlhf_ppo.runtime.files import plain_json

Reply = str | Message | list[Message] | None
"""What answers a turn: text is a user message; a mapping is that message (``{"role": "tool", "content": "42"}``); a
list is several, such as the results of several tool calls; None ends the conversation."""


def reply_messages(reply: Any) -> Messages | None:
    """Return a reply as the messages that it stands for, or None.

    Raises:
        ValueError: no :data:`Reply`, the policy's own role, or nothing for JSON; says what it is.
    """
    if reply is None:
        return None
    said = [{"role": "user", "content": reply}] if isinstance(reply, str) else reply
    said = [said] if isinstance(said, Mapping) else said
    got = f"it returned {type(reply).__name__} {reply!r:.80}"
    if not is_chat(said):
        raise ValueError(f"must return text, a message, messages, or None to end the conversation; {got}")
    for message in said:
        message_text(message, got)
    if any(message["role"] == "assistant" for message in said):
        raise ValueError(
            f"must not write the policy's own messages, which are sampled: give replies another role; {got}"
        )
    try:
        return plain_json([dict(message) for message in said])
    except ValueError as error:
        raise ValueError(f"must return what JSON can hold ({error}); {got}") from None


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
    prompts: list[Prompt]
    """[B] what each began with."""


ReadTurn = Callable[[str, str, Messages], dict[str, Any]]
"""(A turn with its special tokens, what it follows, what was said before) -> the policy's message."""


class Codec(NamedTuple):
    """The policy's tokenizer, and how it reads and writes pieces of text."""

    tokenizer: PreTrainedTokenizerBase
    pieces: TextPieces
    """With special tokens left out, as messages show them."""
    spelled: TextPieces
    """With special tokens spelled out, as the policy reads them."""
    read: ReadTurn | None = None
    """Finds thinking and tool calls in a turn; None: a turn's text is its content."""


class Part(NamedTuple):
    """Consecutive tokens [n] of a conversation: a turn of the policy, or a reply."""

    ids: Tensor
    mask: Tensor
    """True: a turn; False: a reply."""
    logprobs: Tensor
    entropy: Tensor
    values: Tensor
    banned: Tensor
    turn: Tensor


class Conversation:
    """One conversation as it grows."""

    def __init__(
        self,
        prompt: Prompt,
        ids: list[int],
        codec: Codec,
        params: SamplingParams,
        number: int,
        template: TemplateOptions | None = None,
    ) -> None:
        if isinstance(prompt, str):
            self.messages: Messages = [{"role": "user", "content": prompt}]
        else:
            refuse_prefill(prompt, f"prompt {number}")
            self.messages = [dict(message) for message in prompt]
        self.prompt, self.codec, self.params, self.number = prompt, codec, params, number
        self.template = template
        self.context = ids
        """Every token so far, the prompt's first."""
        self.before = codec.pieces.before(ids, prompt)
        self.parts: list[Part] = []
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
            Part(ids, mask, logprobs, sampled.entropy[row, :n], values, banned, torch.full_like(ids, turn))
        )
        self.finished = sampled.finished[row]
        said = ids.tolist()
        self._turn_text = self.codec.pieces.decode(self.before, said)
        self.messages.append(self._message(said))
        self.context = self.context + said

    def _message(self, said: list[int]) -> dict[str, Any]:
        """Return the policy's message of the ids that it has sampled after the context."""
        text = cut_at_stop_string(self._turn_text, self.params.stop_strings)
        plain = {"role": "assistant", "content": text}
        if self.codec.read is None:
            return plain
        body = said[:-1] if said and said[-1] in self.params.stop_token_ids else said
        spelled = cut_at_stop_string(self.codec.spelled.decode(Before(self.context), body), self.params.stop_strings)
        message = self.codec.read(spelled, self.codec.spelled.text(self.context), self.messages)
        # Special tokens are no content: only thinking and calls may be made of them.
        return {**message, SAMPLED_TEXT: text} if message.keys() != plain.keys() else plain

    def encode(self, reply: Messages) -> list[int]:
        """Return the ids of a reply to the last turn: of a text conversation, of the messages' text."""
        if isinstance(self.prompt, str):
            return self.codec.spelled.encode(Before(self.context), _text(reply))
        last = self.context[-1]
        stop = last if last in self.params.stop_token_ids else None
        turn, where = self.messages[-1], f"conversation {self.number}"
        return chat_reply_ids(self.codec.tokenizer, self.prompt, turn, reply, stop, where, self.template)

    def add_reply(self, reply: Messages, ids: list[int], turn: int) -> None:
        """Add a reply, whose tokens are read and masked from the loss."""
        device = self.parts[-1].ids.device
        no, zeros = (torch.zeros(len(ids), dtype=dtype, device=device) for dtype in (torch.bool, torch.float32))
        heard = torch.tensor(ids, dtype=torch.long, device=device)
        self.parts.append(Part(heard, no, zeros, zeros, zeros, no, torch.full_like(heard, turn)))
        self.context = self.context + ids
        self.before = self.codec.pieces.before(self.context, _text(reply) if isinstance(self.prompt, str) else None)
        self.messages.extend(reply)
        self._text, self._turn_text = self._text + self._turn_text + _text(reply), ""

    @property
    def completion(self) -> Completion:
        """What came after the prompt: the text as the policy read it, or the messages of a chat."""
        if isinstance(self.prompt, str):
            return self._text + cut_at_stop_string(self._turn_text, self.params.stop_strings)
        return self.messages[len(self.prompt) :]


def _text(reply: Messages) -> str:
    """Join the text of a reply's messages."""
    return "".join(message_text(message, "a reply") for message in reply)


def collect(conversations: Sequence[Conversation], params: SamplingParams, *, has_values: bool) -> Conversations:
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
        [one.prompt for one in conversations],
    )
