"""Tool calls: read them in the policy's turns, run the functions, and answer with their results or errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_ppo.data.chat import MALFORMED, Message, Messages
from rlhf_ppo.data.template_options import Schema, tool_name
from rlhf_ppo.generation.conversation import reply_messages
from rlhf_ppo.generation.tools.parsers import PARSERS, TEMPLATE, Call, Turn, named_call, parse_turn, read_call
from rlhf_ppo.generation.tools.schemas import Functions, argument_error, typed_arguments
from rlhf_ppo.runtime.command_line.user_code import FAILURES
from rlhf_ppo.runtime.side_by_side import settled


class Tools:
    """A ``respond`` that runs the functions which a turn calls; turns without a call are another respond's.

    What it answers depends on the conversation alone, so conversations may ask from several threads at once.
    """

    def __init__(
        self,
        functions: Functions,
        respond: Callable[[Messages], Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        parser: str = "",
    ) -> None:
        """Take the functions, what answers other turns, and to read turns the policy's tokenizer and a parser's name.

        Without functions every turn is ``respond``'s, which finds the calls in ``tool_calls``.
        """
        self.functions, self.respond, self.tokenizer, self.parser = dict(functions), respond, tokenizer, parser
        self._shown = frozenset(self.functions)

    def for_row(self, schemas: Sequence[Schema]) -> Tools:
        """Return the tools of a row that is shown these schemas: those of the run among them, and ``respond``'s."""
        row = Tools(self.functions, self.respond, self.tokenizer, self.parser)
        row._shown = frozenset(map(tool_name, schemas))
        return row

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The functions as chat templates know them."""
        return [schema for _, schema in self.functions.values()]

    def __call__(self, messages: Messages) -> Any:
        """Return a message of role tool for each call of the last turn, in order; else what ``respond`` returns.

        Its messages for calls of a row's own schemas come last.
        """
        turn = messages[-1]
        calls = _in_order(turn)
        if not self.functions or not calls:
            return None if self.respond is None else self.respond(messages)
        theirs = [] if self.respond is None else [call for call in calls if self._is_of_respond(call)]
        own: Messages = [self._answer(call) for call in calls if call not in theirs]
        if not theirs or self.respond is None:
            return own
        said = self.respond(messages)
        if not own:
            return said
        said = reply_messages(settled(said))
        return None if said is None else [*own, *said]

    def _is_of_respond(self, call: Mapping[str, Any]) -> bool:
        """Whether a call is of a schema that the row alone has."""
        name = call.get("function", {}).get("name")
        return name in self._shown and name not in self.functions

    def close_episodes(self) -> None:
        """Pass on that a rollout is over."""
        if (close := getattr(self.respond, "close_episodes", None)) is not None:
            close()

    def read(self, text: str, before: str, messages: Sequence[Message]) -> dict[str, Any]:
        """Return the policy's message.

        Args:
            text: the turn, special tokens included, without its stop token.
            before: the end of what precedes it, which may have opened the thinking.
            messages: what was said before; its calls are counted, so that each has an id of its own.
        """
        turn = self._parse(text, before)
        first = sum(len(_in_order(message)) for message in messages)
        calls: list[dict[str, Any]] = []
        malformed: list[dict[str, Any]] = []
        for i, call in enumerate(turn.calls):
            # Nine letters and digits, because Mistral's templates refuse others.
            known = {"id": f"call{first + i:05d}"}
            if call.error:
                malformed.append({**known, "text": call.text, "error": call.error})
            else:
                function = {"name": call.name, "arguments": self._typed(call)}
                calls.append({**known, "type": "function", "function": function})
        message: dict[str, Any] = {"role": "assistant", "content": turn.content}
        fields = {"reasoning_content": turn.thinking, "tool_calls": calls, MALFORMED: malformed}
        return {**message, **{name: value for name, value in fields.items() if value}}

    def _parse(self, text: str, before: str) -> Turn:
        if self.parser != TEMPLATE:
            opened = before.rstrip().endswith("<think>")
            return parse_turn(text, self.parser, thinks=opened)
        assert self.tokenizer is not None
        try:
            schemas: list[Any] = list(self.schemas)
            found: Any = self.tokenizer.parse_response(text, prefix=before, tools=schemas)
            written = found.get("tool_calls") or []
            calls = tuple(read_call(str(call), lambda _, call=call: named_call(call)) for call in written)
        except Exception as error:  # a response template may fail in any way on what a policy writes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return Turn(text, calls=(Call(text, error=reason),))
        thinking = next((found[n] for n in ("reasoning_content", "thinking", "reasoning") if found.get(n)), "")
        return Turn(str(found.get("content") or ""), str(thinking), calls)

    def _typed(self, call: Call) -> dict[str, Any]:
        """Return a call's arguments, those of a format that writes all values as text read by the schema's types."""
        if self.parser == TEMPLATE or PARSERS[self.parser].typed or call.name not in self.functions:
            return call.arguments
        return typed_arguments(self.functions[call.name][1], call.arguments)

    def _answer(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Run one call."""
        name = call.get("function", {}).get("name", "")
        error, result = "", None
        if "error" in call:
            example = "" if self.parser == TEMPLATE else f"; write {PARSERS[self.parser].example}"
            error = f"this call cannot be read: {call['error']}{example}"
        elif name not in self.functions or name not in self._shown:
            there = [known for known in self.functions if known in self._shown]
            error = f"there is no tool {name!r}; there are {', '.join(there) or 'none'}"
        else:
            function, schema = self.functions[name]
            arguments = call["function"]["arguments"]
            error = argument_error(function, schema, arguments)
            if not error:
                try:
                    result = function(**arguments)
                    result = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
                except FAILURES as failure:
                    error = f"{type(failure).__name__}: {failure}"
        said = {"role": "tool", "tool_call_id": call["id"], **({"name": name} if name else {})}
        if error:
            return {**said, "content": f"Error: {error}", "is_error": True}
        return {**said, "content": result}


def _in_order(message: Message) -> list[Mapping[str, Any]]:
    """Return the calls of a message, malformed ones among them."""
    calls = [*(message.get("tool_calls") or ()), *(message.get(MALFORMED) or ())]
    return sorted(calls, key=lambda call: str(call.get("id"))) if message["role"] == "assistant" else []


def tool_counts(messages: Sequence[Message]) -> dict[str, int]:
    """Count a conversation's calls, those that cannot be read, and the others that were answered with an error."""
    malformed = {call["id"] for message in messages for call in message.get(MALFORMED) or ()}
    return {
        "calls": sum(len(_in_order(message)) for message in messages),
        "malformed": len(malformed),
        "errors": sum(bool(m.get("is_error")) and m.get("tool_call_id") not in malformed for m in messages),
    }
