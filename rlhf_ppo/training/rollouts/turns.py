"""Turns: choose what answers the policy's turns, and check that the chat template can hold the conversations."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_ppo.config.groups import RolloutSettings
from rlhf_ppo.core.validation import refuse_unread
from rlhf_ppo.data.chat import Messages, TemplateOptions, refuse_prefill, render_prompt
from rlhf_ppo.data.prompts import PromptSet
from rlhf_ppo.data.template_options import TOOLS, TemplateDefaults, template_of_rows
from rlhf_ppo.generation.environments.episodes import Episodes
from rlhf_ppo.generation.multi_turn import Respond
from rlhf_ppo.generation.reply_tokens import chat_reply_ids
from rlhf_ppo.generation.tools.calls import Tools
from rlhf_ppo.generation.tools.parsers import choose_parser
from rlhf_ppo.generation.tools.schemas import Functions

Partner = Respond | Tools | Episodes | None
"""What answers the policy's turns, or None where there is one turn."""

_THOUGHT, _RESULT = "a-thought-of-the-policy", "the-result-of-a-tool"


def require_partner(args: RolloutSettings, respond: Any, environment: Any, functions: Functions) -> None:
    """Raise a ValueError unless one partner answers the policy's turns, and there is a turn after its answer."""
    given = [name for name, x in (("respond", respond), ("tools", functions or None)) if x is not None]
    if environment is not None and given:
        raise ValueError(f"{given[0]} and environment both answer the policy's turns: pass one of them")
    if environment is None and not given and args.max_turns > 1:
        raise ValueError(
            f"max_turns={args.max_turns} needs respond, tools or an environment, which answer the policy's turns: pass "
            "respond=..., tools=[...] or environment=..., or set max_turns to 1"
        )
    if environment is None and not given:
        why = "it is about respond and environments, and max_turns=1 without an environment calls neither"
        refuse_unread(args, why, "respond_timeout_s", "respond_concurrency", "tool_parser", "stripped_thinking")
    if given and args.max_turns == 1:
        verb = "is" if given[0] == "respond" else "are"
        raise ValueError(f"{given[0]} {verb} given, but max_turns=1 leaves no turn after an answer: raise max_turns")
    if respond is not None and not callable(respond):
        raise ValueError(f"respond must be a function of the messages, got {type(respond).__name__}")


def checked_partner(
    partner: Partner, sets: Sequence[PromptSet], tokenizer: PreTrainedTokenizerBase, args: RolloutSettings
) -> Partner:
    """Return what answers turns, with a parser of tool calls if there are tools, of the run or of its rows.

    Raises:
        ValueError: the chat template cannot hold the conversations (see :func:`check_turns`), or nothing says how calls
            are written.
    """
    functions = partner.functions if isinstance(partner, Tools) else {}
    respond = partner.respond if isinstance(partner, Tools) else partner
    in_rows = any(TOOLS in prompts.columns for prompts in sets)
    if not isinstance(respond, Episodes) and (functions or (in_rows and respond is not None)):
        partner = Tools(functions, respond, tokenizer, choose_parser(tokenizer, args.tool_parser))
    elif args.tool_parser != "auto":
        raise ValueError(
            f"tool_parser={args.tool_parser!r} reads calls of tools, but there are none: pass tools=[...] (from the "
            "shell --tools file.py), or give the data set a column tools"
        )
    schemas = partner.schemas if isinstance(partner, Tools) else []
    asked = [prompts for prompts in sets if prompts.has_prompts]
    check_turns(tokenizer, asked, partner, TemplateDefaults(args.chat_template_kwargs, schemas), args)
    return partner


def check_turns(
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[PromptSet],
    respond: Partner,
    template: TemplateDefaults,
    args: RolloutSettings,
) -> None:
    """Check, for each order of roles in the prompts, that the chat template renders replies by appending text.

    Raises:
        ValueError: it does not, or drops what a run needs; names the row.
    """
    if respond is None:
        return
    tools = respond if isinstance(respond, Tools) else None
    roles = ["tool"] if tools is not None and tools.functions else []
    roles += ["user"] if tools is None or tools.respond is not None else []
    for prompts in sets:
        seen: set[tuple[str, ...]] = set()
        rows = prompts.rows
        for prompt, where, options in zip(rows["prompt"], rows.names, template_of_rows(rows, template), strict=True):
            if isinstance(prompt, str) or (order := tuple(message["role"] for message in prompt)) in seen:
                continue
            refuse_prefill(prompt, where)
            for role in roles:
                _check_reply(tokenizer, prompt, role, tools, where, options)
            if not seen and prompts is sets[0]:
                _check_tools_are_shown(tokenizer, prompt, where, options)
                dropped = [role for role in roles if _drops_thinking(tokenizer, prompt, role, where, options)]
                _say_dropped(dropped, args)
            seen.add(order)


def _check_reply(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Messages,
    role: str,
    tools: Tools | None,
    where: str,
    options: TemplateOptions,
) -> None:
    turn, reply = _turn_and_reply(role, tools)
    try:
        chat_reply_ids(tokenizer, prompt, turn, [reply], None, where, options)
    except ValueError as error:
        if role != "tool":
            raise
        raise ValueError(
            f"{error}; tools answer with messages of role tool: give the tokenizer a chat template that takes them "
            "(chat_template)"
        ) from None
    if role == "tool" and _RESULT not in render_prompt(tokenizer, [*prompt, turn, reply], where, options):
        raise ValueError(
            f"{where}: the chat template leaves out messages of role tool, with which tools answer: give the tokenizer "
            "a chat template that shows them (chat_template)"
        )


def _turn_and_reply(role: str, tools: Tools | None) -> tuple[dict[str, Any], dict[str, Any]]:
    turn: dict[str, Any] = {"role": "assistant", "content": ""}
    reply: dict[str, Any] = {"role": role, "content": _RESULT}
    if role == "tool" and tools is not None:
        name = next(iter(tools.functions))
        call = {"id": "call00000", "type": "function", "function": {"name": name, "arguments": {}}}
        turn, reply = {**turn, "tool_calls": [call]}, {**reply, "tool_call_id": call["id"], "name": name}
    return turn, reply


def _check_tools_are_shown(
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, where: str, options: TemplateOptions
) -> None:
    """Warn if the chat template does not tell the policy of its tools."""
    without = {name: value for name, value in options.items() if name != TOOLS}
    if TOOLS in options and render_prompt(tokenizer, prompt, where, options) == render_prompt(
        tokenizer, prompt, where, without
    ):
        warnings.warn(
            "the chat template does not show tools: the policy learns of them only if a prompt describes them, such as "
            "a system message",
            stacklevel=4,
        )


def _drops_thinking(
    tokenizer: PreTrainedTokenizerBase, prompt: Messages, role: str, where: str, options: TemplateOptions
) -> bool:
    turn = {"role": "assistant", "content": f"<think>\n{_THOUGHT}\n</think>\n\nyes"}
    reply = {"role": role, "content": _RESULT, "tool_call_id": "call00000", "name": "f"}
    try:
        return _THOUGHT not in render_prompt(tokenizer, [*prompt, turn, reply], where, options)
    except ValueError:  # a template that wants to see the call; its replies were checked
        return False


def _say_dropped(roles: Sequence[str], args: RolloutSettings) -> None:
    """Refuse, or warn, if the chat template drops thinking once a message of one of these roles follows."""
    if not roles:
        return
    what = f"the chat template drops the thinking of a turn once a message of role {' or '.join(roles)} follows it"
    if args.stripped_thinking == "refuse":
        raise ValueError(
            f"{what}, and stripped_thinking='refuse': take a chat template that keeps it (chat_template), have turns "
            "answered by tools alone if it drops it for users only, or set stripped_thinking to 'keep'"
        )
    warnings.warn(
        f"{what}, but the policy's context keeps its turns as they were sampled (stripped_thinking='keep'), so it "
        "reads more in training than it will behind this template",
        stacklevel=5,
    )
