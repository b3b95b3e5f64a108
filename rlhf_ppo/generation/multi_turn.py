"""Multi-turn: conversations of the policy with an environment, each one sequence to train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.data.chat import Messages, Prompt, TemplateOptions
from rlhf_ppo.data.detokenization import Before, TextPieces
from rlhf_ppo.data.tokenization import left_pad
from rlhf_ppo.generation.conversation import Codec, Conversation, Conversations, Reply, collect, reply_messages
from rlhf_ppo.generation.rollout import SampledResponses, SamplingParams
from rlhf_ppo.runtime.command_line.user_code import FAILURES, has_ended, start
from rlhf_ppo.runtime.errors import RunError

Respond = Callable[[Messages], Reply]
"""``respond(messages)``, called after each turn of the policy with the whole conversation: the prompt's messages, then
assistant and replies by turns (a text prompt is one user message). See :data:`.conversation.Reply`.
What it returns after the last turn of all (max_turns, or a full context) is not used. One conversation is one list that
grows from call to call; it must not be changed. If ``respond`` has a method ``close_episodes()``, it is called when a
rollout is over, or has failed."""


class RespondError(RunError):
    """The ``respond`` hook failed, hung, or returned no reply; ``conversations`` is what was said until then."""

    def __init__(self, message: str, conversations: Sequence[Messages] = ()) -> None:
        super().__init__(message)
        self.conversations = conversations


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
    templates: Sequence[TemplateOptions] | None = None,
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
        templates: [B] what the chat template of each gets besides messages; None: nothing.
    Raises:
        RespondError: ``respond`` raised, timed out, or returned something other than a reply; shows the conversation.
        ValueError: the chat template does not render a conversation by adding to its end, or fails on a reply.
    """
    device = prompt_ids.device
    codec = Codec(tokenizer, TextPieces(tokenizer), TextPieces(tokenizer, special=True))
    rows = [ids[keep].tolist() for ids, keep in zip(prompt_ids, prompt_mask, strict=True)]
    given = enumerate(zip(prompts, rows, templates or [{}] * len(rows), strict=True))
    conversations = [Conversation(prompt, ids, codec, params, i, template) for i, (prompt, ids, template) in given]
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
    return collect(conversations, params, has_values=has_values)


def _ask(
    respond: Respond, conversation: Conversation, conversations: Sequence[Conversation], timeout_s: float | None
) -> Messages | None:
    """Call ``respond`` on one of the conversations and return its reply; errors carry all of them."""
    messages = conversation.messages

    def failure(what: str) -> RespondError:
        return RespondError(f"respond {what}", [one.messages for one in conversations])

    call = start(partial(respond, messages), timeout_s)
    if not has_ended(call, timeout_s):
        raise failure(f"did not return within respond_timeout_s={timeout_s}, asked about {messages!r:.500}")
    try:
        reply = call.result()
    except FAILURES as error:
        raise failure(f"raised {type(error).__name__}: {error}, asked about {messages!r:.500}") from error
    try:
        return reply_messages(reply)
    except ValueError as error:
        raise failure(f"{error} about {messages!r:.500}") from None
