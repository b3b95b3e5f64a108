"""Tools: calls are found, run and answered; what the policy says is trained on as it was sampled."""

from __future__ import annotations

import json
import re
import threading

import pytest
import torch
from chat_templates import CHATML, LLAMA3, MISTRAL, NO_TOOL_ROLE, QWEN3, letters
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_ppo.generation.multi_turn import RespondError
from rlhf_ppo.generation.reply_tokens import chat_reply_ids
from rlhf_ppo.generation.tools.calls import Tools
from rlhf_ppo.generation.tools.parsers import choose_parser, parse_turn
from rlhf_ppo.generation.tools.schemas import tool_functions

USER = [{"role": "user", "content": "what is 2+2?"}]


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: one of them.
        b: the other.
    """
    return a + b


def shout(text: str, mood: str = "glad") -> str:
    """Say it loudly.

    Args:
        text: what to say.
        mood: how. (choices: ["glad", "sad"])
    """
    if not text:
        raise LookupError("nothing to say")
    return text.upper()


def call(name: str, **arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def answers(text: str, parser: str = "hermes", tools=(add, shout), respond=None) -> list[dict]:
    """What the tools answer to a turn."""
    made = Tools(tool_functions(list(tools)), respond, letters(QWEN3), parser)
    return made([*USER, made.read(text, "", USER)])


# Calls in a text


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        ("hermes", 'so\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n<tool_call>{"name": "g", '
         '"arguments": "{}"}</tool_call>'),
        ("qwen3_xml", "so\n<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"
         "<tool_call><function=g></function></tool_call>"),
        ("mistral", 'so[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]'),
        ("mistral", 'so[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]{}'),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("thought", ["", "<think>\n2 <tool_call>, I think\n</think>\n\n"])
def test_each_format_gives_name_arguments_and_content_in_order(parser, text, thought):
    turn = parse_turn(thought + text, parser, thinks=False)
    x = "1" if parser == "qwen3_xml" else 1  # a schema says what its text means
    assert [(c.name, c.arguments, c.error) for c in turn.calls] == [("f", {"x": x}, ""), ("g", {}, "")]
    assert turn.content == ("" if parser == "llama3_json" else "so")
    assert turn.thinking == thought[8:-11].strip("\n")


@pytest.mark.parametrize(
    ("text", "thinks", "content", "thinking"),
    [
        ("  plain ", False, "  plain ", ""),  # nothing found: nothing changed
        ("a</think> b", True, "b", "a"),
        ("still at it", True, "", "still at it"),
        ("<think>still", False, "", "still"),
        ("<think>a</think>", False, "", "a"),
        ("<think>\n\n</think>\n\nb", False, "b", ""),
    ],
)
def test_thinking_is_apart_wherever_it_was_opened(text, thinks, content, thinking):
    turn = parse_turn(text, "hermes", thinks=thinks)
    assert (turn.content, turn.thinking, turn.calls) == (content, thinking, ())


@pytest.mark.parametrize(
    ("parser", "text", "error"),
    [
        ("hermes", "<tool_call>{'name': 1}</tool_call>", "not valid JSON: .* at character 1"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {', "</tool_call> is missing"),
        ("hermes", "<tool_call>[]</tool_call>", "a call is a JSON object"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', 'a call needs a "name"'),
        ("hermes", '<tool_call>{"name": "f", "arguments": 3}</tool_call>', 'needs "arguments"'),
        ("hermes", f"<tool_call>{'[' * 100_000}</tool_call>", "recursion"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}</tool_call>", "digits"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": ["\\ud800"]}}</tool_call>', "half a character"),
        ("hermes", '<tool_call>{"name": "\\udfff", "arguments": {}}</tool_call>', "half a character"),
        ("qwen3_xml", "<tool_call>f(1)</tool_call>", "<function=NAME>"),
        ("mistral", "[TOOL_CALLS] f(1)", "not valid JSON"),
        ("mistral", "[TOOL_CALLS] []", "a call is a JSON object"),
        ("llama3_json", '{"name": "f", "parameters": }', "not valid JSON"),
    ],
)
def test_a_malformed_call_is_an_error_that_says_why_and_stays_in_the_content(parser, text, error):
    turn = parse_turn(text, parser, thinks=False)
    (malformed,) = turn.calls
    assert re.search(error, malformed.error), malformed.error
    assert turn.content == text.strip()


def test_the_parser_is_the_tokenizers_own_or_the_one_that_its_template_shows():
    assert [choose_parser(letters(t), "auto") for t in (QWEN3, MISTRAL)] == ["hermes", "mistral"]
    assert choose_parser(letters(QWEN3 + "<function="), "auto") == "qwen3_xml"
    assert choose_parser(letters(LLAMA3), "auto") == "llama3_json"
    assert choose_parser(letters(CHATML), "llama3_json") == "llama3_json"
    with pytest.raises(ValueError, match=r"finds no known format .* hermes, qwen3_xml, llama3_json, mistral"):
        choose_parser(letters(CHATML), "auto")
    with pytest.raises(ValueError, match="tool_parser='template', but the tokenizer has no response template"):
        choose_parser(letters(QWEN3), "template")


RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>)", "content": "text"},
    },
}


def test_a_response_template_reads_turns_and_what_it_refuses_is_malformed():
    tokenizer = letters(QWEN3)
    tokenizer.response_template = RESPONSE_TEMPLATE
    tools = Tools(tool_functions([add]), None, tokenizer, choose_parser(tokenizer, "auto"))
    before = tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    message = tools.read("<think>hm</think>so\n" + call("add", a=2, b=2), before, USER)
    assert message["reasoning_content"] == "hm" and message["content"].strip() == "so"
    assert tools([*USER, message])[0]["content"] == "4"
    broken = tools.read("<tool_call>{", before, USER)
    assert broken["content"] == "<tool_call>{"
    assert "cannot be read" in tools([*USER, broken])[0]["content"]
    deep = {"name": "add", "arguments": "[" * 100_000}
    for written in (deep, {"name": "add", "arguments": '{"a": "\\ud800"}'}):
        tokenizer.parse_response = lambda *_, written=written, **__: {"tool_calls": [written]}
        assert "cannot be read" in tools([*USER, tools.read("", before, USER)])[0]["content"]


# Answers


def test_calls_are_answered_in_order_with_results_and_errors_for_the_policy_to_read():
    said = "\n".join([
        call("add", a=2, b=2), "<tool_call>{]</tool_call>", call("sub", a=1), call("add", a=1), call("add", a=1, b="2"),
        call("add", a=1, b=2, c=3), call("shout", text=""), call("shout", text="hi", mood="odd"),
        call("shout", text="é"),
    ])  # fmt: skip
    messages = answers(said)
    assert [m["role"] for m in messages] == ["tool"] * 9
    assert [m["tool_call_id"] for m in messages] == [f"call{i:05d}" for i in range(9)]
    assert [m["content"] for m in messages] == [
        "4",
        "Error: this call cannot be read: not valid JSON: Expecting property name enclosed in double quotes at "
        'character 1; write <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
        "Error: there is no tool 'sub'; there are add, shout",
        "Error: missing a required argument: 'b'",
        "Error: argument 'b' must be integer, got '2'",
        "Error: got an unexpected keyword argument 'c'",
        "Error: LookupError: nothing to say",
        "Error: argument 'mood' must be one of ['glad', 'sad'], got 'odd'",
        "É",
    ]  # fmt: skip
    assert [m.get("is_error", False) for m in messages] == [False] + [True] * 7 + [False]


def test_a_format_of_text_alone_is_read_by_the_schemas_types():
    said = "<tool_call><function={}><parameter={}>3</parameter><parameter={}>4</parameter></function></tool_call>"
    assert answers(said.format("add", "a", "b"), "qwen3_xml")[0]["content"] == "7"
    assert answers(said.format("shout", "text", "mood"), "qwen3_xml")[0]["content"].startswith("Error: argument 'mood'")


def test_a_tool_that_exits_is_an_error_of_the_tool():
    def leave() -> str:
        """Leave."""
        raise SystemExit(3)

    assert answers(call("leave"), tools=[leave])[0]["content"] == "Error: SystemExit: 3"


def test_turns_without_a_call_are_responds():
    assert answers("done") is None
    assert answers("done", respond=lambda messages: messages[-1]["content"] + "?") == "done?"
    assert answers(call("add", a=1, b=1), respond=lambda messages: "?")[0]["content"] == "2"
    # Tools of the data set are the respond's own to run.
    assert (
        answers(call("add", a=1, b=1), tools=[], respond=lambda m: m[-1]["tool_calls"][0]["function"]["name"]) == "add"
    )


def undocumented(x: int) -> int:
    return x


def unhinted(x):
    """Do it.

    Args:
        x: this.
    """


async def waiting() -> None:
    """Wait."""


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([undocumented], r"tool 'undocumented' cannot be described .*no docstring.*: give it a docstring"),
        ([unhinted], r"tool 'unhinted' cannot be described .*missing a type hint.*type hint for each"),
        ([add, add], "two functions named 'add'"),
        ([waiting], "tool 'waiting' is asynchronous"),
        ("tools.py", r"tools must be a list of functions, got 'tools\.py'"),
        ([3], "tools must be functions, got 3"),
    ],
)
def test_bad_tools_are_refused_before_models_load(make_trainer, monkeypatch, tools, message):
    monkeypatch.setattr("rlhf_ppo.training.setup.load_models", lambda *_, **__: pytest.fail("the policy was loaded"))
    with pytest.raises(ValueError, match=message):
        make_trainer(tools=tools, max_turns=2)


# Conversations


@pytest.fixture
def talk(make_trainer):
    """A trainer whose policy reads whole conversations, letter by letter."""

    def make(template=QWEN3, **settings):
        tokenizer = letters(template)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            wide = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            model = LlamaForCausalLM(
                LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, eos_token_id=0, **wide)
            )
        usual = {"reward_funcs": lambda prompts, completions, **_: [0.0, 1.0], "train_dataset": [{"prompt": USER}]}
        return make_trainer(
            **{
                "model": model,
                "processing_class": tokenizer,
                "tools": [add, shout],
                "max_turns": 3,
                **usual,
                "max_new_tokens": 180,
                "stop_token_ids": (0, 2),
                "rollout_batch_size": 2,
                "num_minibatches": 1,
                **settings,
            }
        )

    return make


@pytest.fixture
def say(script):
    """``say([row 0, row 1], ...)``: what is sampled in each turn by the rows that are still there."""

    def use(*turns, template=QWEN3):
        tokenizer = letters(template)
        ids = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in rows] for rows in turns]
        script(*[[row + [0] * (180 - len(row)) for row in rows] for rows in ids])

    return use


def spoken(trainer, rollout, row: int) -> str:
    ids = [*rollout.prompt_ids[row][rollout.prompt_mask[row]], *rollout.response_ids[row][rollout.real[row]]]
    return trainer.fixed.tokenizer.decode(ids)


THOUGHT = "<think>\nadd\n</think>\n\n"


def test_a_thinking_tool_user_is_trained_on_its_own_ids_and_reads_what_the_template_writes(talk, say):
    trainer = talk()
    first, last = (
        THOUGHT + "I  add.\n" + call("add", a=2, b=2) + "\n" + call("shout", text="hi") + "<|im_end|>",
        "It is 4<|im_end|>",
    )
    say([first, "Four<|im_end|>"], [last])
    rollout = trainer.rollout([USER, USER])
    tokenizer = trainer.fixed.tokenizer
    sampled = tokenizer(first, add_special_tokens=False)["input_ids"] + tokenizer(last)["input_ids"]
    assert rollout.response_ids[0][rollout.mask[0]].tolist() == sampled
    messages = rollout.conversations[0]
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert messages[1]["content"] == "I  add." and messages[1]["reasoning_content"] == "add"
    assert [c["function"]["name"] for c in messages[1]["tool_calls"]] == ["add", "shout"]
    assert messages[1]["sampled_text"] == first.removesuffix("<|im_end|>")
    assert messages[-1] == {"role": "assistant", "content": "It is 4"}
    assert rollout.completions[0] == messages[1:]
    # Within one task Qwen's template keeps thinking, so the context is what it would render of these messages.
    schemas = [schema for _, schema in tool_functions([add, shout]).values()]
    shown = tokenizer.apply_chat_template(messages[:-1], tools=schemas, tokenize=False, add_generation_prompt=True)
    assert spoken(trainer, rollout, 0) == shown + last
    assert spoken(trainer, rollout, 1).endswith("assistant\nFour<|im_end|>")
    metrics = trainer.step(rollout)
    assert metrics["policy/first_minibatch_max_abs_log_ratio"] < 1e-5
    assert metrics["tools/calls_per_response"] == 1.0  # two calls, two conversations
    assert metrics["tools/malformed_fraction"] == metrics["tools/error_fraction"] == 0.0


def test_malformed_and_failing_calls_are_answered_and_counted(talk, say):
    trainer = talk()
    say(["<tool_call>{<|im_end|>"] * 2, [call("shout", text="") + "<|im_end|>"] * 2, ["ok<|im_end|>"] * 2)
    rollout = trainer.rollout([USER, USER])
    assert [m["role"] for m in rollout.conversations[0]] == ["user", *["assistant", "tool"] * 2, "assistant"]
    assert rollout.conversations[0][1]["malformed_tool_calls"][0]["text"] == "<tool_call>{"
    assert "nothing to say" in spoken(trainer, rollout, 0)
    metrics = trainer.step(rollout)
    assert [metrics[f"tools/{n}"] for n in ("calls_per_response", "malformed_fraction", "error_fraction")] == [
        2,
        0.5,
        0.5,
    ]


def test_half_characters_of_a_tool_are_replaced_before_the_policy_and_the_files_get_them(talk, say):
    def half(fail: bool) -> str:
        """Return half a character.

        Args:
            fail: whether it fails.
        """
        if fail:
            raise ValueError("bad \ud800")
        return "good \ud800"

    trainer = talk(tools=[half])
    say([call("half", fail=x) + "<|im_end|>" for x in (False, True)], ["ok<|im_end|>"] * 2)
    rollout = trainer.rollout([USER, USER])
    assert [messages[2]["content"] for messages in rollout.conversations] == ["good ?", "Error: ValueError: bad ?"]


def test_a_template_that_wants_to_see_calls_takes_the_answer_to_one_that_cannot_be_read(talk, say):
    trainer = talk(MISTRAL, stop_token_ids=(0, 3))
    tokenizer = trainer.fixed.tokenizer
    end = tokenizer.convert_ids_to_tokens(3)
    both = '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2, "b": 2}}][TOOL_CALLS]x'
    say([f"[TOOL_CALLS] [{{{end}", both + end], ["ok" + end] * 2, template=MISTRAL)
    rollout = trainer.rollout([USER, USER])
    assert [[m["role"] for m in messages[1:]] for messages in rollout.conversations] == [
        ["assistant", "tool", "assistant"],
        ["assistant", "tool", "tool", "assistant"],
    ]
    assert "tool_calls" not in rollout.conversations[0][1]
    assert "[TOOL_RESULTS]Error: this call cannot be read" in spoken(trainer, rollout, 0)
    assert "[TOOL_RESULTS]4[/TOOL_RESULTS][TOOL_RESULTS]Error: this call cannot" in spoken(trainer, rollout, 1)


def test_a_reply_that_the_template_refuses_is_named_with_the_conversation(talk, say):
    trainer = talk(NO_TOOL_ROLE, tools=(), respond=lambda messages: {"role": "critic", "content": "no"})
    say(["4<|im_end|>"] * 2, template=NO_TOOL_ROLE)
    with pytest.raises(RespondError, match=r"respond returned a reply that cannot be used: .*Unexpected role!"):
        trainer.rollout([USER, USER])
    assert len(trainer.run.read("failed_rollout.jsonl")) == 2


def test_thinking_that_the_template_would_strip_stays_as_sampled_with_a_warning_or_is_refused(talk, say):
    settings = {"respond": lambda messages: "sure?", "max_turns": 2}
    with pytest.warns(UserWarning, match=r"drops the thinking .* role user .*stripped_thinking='keep'"):
        trainer = talk(**settings)
    say([THOUGHT + "4<|im_end|>"] * 2, ["yes<|im_end|>"] * 2)
    rollout = trainer.rollout([USER, USER])
    assert spoken(trainer, rollout, 0).endswith(
        f"assistant\n{THOUGHT}4<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    )
    assert trainer.step(rollout)["policy/first_minibatch_max_abs_log_ratio"] < 1e-5
    with pytest.raises(ValueError, match="role user follows it, and stripped_thinking='refuse': take a chat template"):
        talk(**settings, stripped_thinking="refuse")
    talk(stripped_thinking="refuse")  # a tool's result is no new question
    talk(CHATML, tools=(), respond=settings["respond"], stripped_thinking="refuse")  # keeps what it is given


def test_thinking_can_be_switched_off_for_all_rows_and_on_for_one(talk, say):
    off = {"enable_thinking": False}
    rows = [
        {"prompt": USER, "chat_template_kwargs": None},
        {"prompt": USER, "chat_template_kwargs": '{"enable_thinking": true}'},
    ]
    trainer = talk(chat_template_kwargs=off, train_dataset=rows)
    say(["4<|im_end|>"] * 2)
    rollout = trainer.rollout([USER] * 2, chat_template_kwargs=[None, {"enable_thinking": True}])
    assert spoken(trainer, rollout, 0).endswith("assistant\n<think>\n\n</think>\n\n4<|im_end|>")
    assert spoken(trainer, rollout, 1).endswith("assistant\n4<|im_end|>")
    # With thinking opened and closed by the prompt, replies still follow.
    say([call("add", a=1, b=1) + "<|im_end|>"] * 2, ["2<|im_end|>"] * 2)
    again = trainer.rollout([USER] * 2)
    assert spoken(trainer, again, 0).endswith(
        "</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n2<|im_end|>"
    )


def test_a_rows_own_tools_reach_the_template_in_place_of_the_runs(talk):
    schema = {"type": "function", "function": {"name": "spell", "description": None, "parameters": {}}}
    rows = [{"prompt": USER, "tools": tools} for tools in (None, ["shout"], [schema], json.dumps([schema]), [])]
    trainer = talk(train_dataset=rows, rollout_batch_size=5)
    batch = trainer.fixed.train_prompts.take(range(5))
    named = [[tool["function"]["name"] for tool in one.get("tools", [])]
             for one in trainer.fixed.template.of_columns(batch.columns, 5)]  # fmt: skip
    assert named == [["add", "shout"], ["shout"], ["spell"], ["spell"], []]
    assert "description" not in trainer.fixed.template.of_columns(batch.columns, 5)[2]["tools"][0]["function"]


def test_a_row_has_its_own_tools_alone_and_respond_answers_those_that_are_not_the_runs(talk, say):
    schema = {"type": "function", "function": {"name": "spell", "description": "Spell.", "parameters": {}}}
    columns = [["shout"], [schema, "add"]]
    heard: list[list[str]] = []

    def respond(messages):
        heard.append([one["function"]["name"] for one in messages[-1].get("tool_calls", ())])
        return {"role": "tool", "content": "s p e l t"} if heard[-1] else None

    trainer = talk(train_dataset=[{"prompt": USER, "tools": tools} for tools in columns], respond=respond, max_turns=2)
    both = call("spell") + call("add", a=2, b=2)
    say([both + "<|im_end|>"] * 2, ["ok<|im_end|>"] * 2)
    rollout = trainer.rollout([USER] * 2, tools=columns)
    said = [[m["content"] for m in messages if m["role"] == "tool"] for messages in rollout.conversations]
    lacks = "Error: there is no tool {!r}; there are shout"
    assert said == [[lacks.format("spell"), lacks.format("add")], ["4", "s p e l t"]]
    assert heard.count(["spell", "add"]) == 1


LEAVES_OUT = CHATML.replace("for m in messages", "for m in messages if m.role != 'tool'")


def row(**columns) -> dict:
    return {"train_dataset": [{"prompt": USER, **columns}]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": NO_TOOL_ROLE}, r"row 0: .*Unexpected role!.*tools answer with messages of role tool: give"),
        ({"template": LEAVES_OUT, "tool_parser": "hermes"}, "leaves out messages of role tool"),
        ({"template": CHATML}, "tool_parser='auto' finds no known format"),
        ({"max_turns": 1}, "tools are given, but max_turns=1 leaves no turn"),
        ({"tools": ()}, "max_turns=3 needs respond, tools or an environment"),
        ({"tools": (), "respond": str, "tool_parser": "hermes"}, "tool_parser='hermes' reads calls of tools, but"),
        ({"tools": (), "max_turns": 1, "tool_parser": "hermes"}, "tool_parser='hermes' has no effect"),
        ({"tool_parser": "hermess"}, "unknown tool_parser 'hermess'.*did you mean 'hermes'"),
        ({"chat_template_kwargs": {"enable_thinkin": False}},
         "row 0: the chat template reads no variable 'enable_thinkin': did you mean 'enable_thinking'"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs has 'tokenize', which rendering sets"),
        ({"chat_template_kwargs": ["x"]}, r"must be a mapping from text to anything or None, got \['x'\]"),
        (row(chat_template_kwargs=3), "row 0: chat_template_kwargs must be a mapping such as"),
        (row(tools=["sub"]), "row 0: tools names 'sub', which is no tool of the run: it has add, shout"),
        (row(tools=[3]), "row 0: tools has 3, which is no JSON schema"),
        (row(tools=3), "row 0: tools must be a list of JSON schemas"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_models_load(talk, monkeypatch, settings, message):
    monkeypatch.setattr("rlhf_ppo.training.setup.load_models", lambda *_, **__: pytest.fail("the policy was loaded"))
    with pytest.raises(ValueError, match=message):
        talk(**settings)


def test_a_template_that_does_not_show_tools_is_warned_of(talk):
    with pytest.warns(UserWarning, match="does not show tools"):
        talk(CHATML, tool_parser="hermes")


def test_a_tool_that_hangs_falls_under_the_time_limit(talk, say):
    never = threading.Event()

    def wait(seconds: int) -> str:
        """Wait.

        Args:
            seconds: how long.
        """
        never.wait()
        return "awake"

    trainer = talk(tools=[wait], respond_timeout_s=0.2)
    say([call("wait", seconds=1) + "<|im_end|>"] * 2)
    with pytest.raises(RespondError, match=r"respond_timeout_s=0\.2"):
        trainer.rollout([USER, USER])
    never.set()


# Templates of other families


@pytest.mark.parametrize(
    ("template", "stop", "tool", "user"),
    [
        (CHATML, "<|im_end|>", "\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n",
         "\n<|im_start|>user\n4<|im_end|>\n<|im_start|>assistant\n"),
        (QWEN3, "<|im_end|>",
         "\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
         "\n<|im_start|>user\n4<|im_end|>\n<|im_start|>assistant\n"),
        (LLAMA3, "<|eot_id|>",
         '<|start_header_id|>ipython<|end_header_id|>\n\n"4"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n',
         "<|start_header_id|>user<|end_header_id|>\n\n4<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
        (MISTRAL, "</s>", "[TOOL_RESULTS]4[/TOOL_RESULTS]", "[INST]4[/INST]"),
    ],
)  # fmt: skip
def test_what_follows_a_turn_is_what_the_family_writes(template, stop, tool, user):
    """After the stop token that the policy sampled; where it ran out of tokens, with that token in front."""
    tokenizer = letters(template)
    called = {"id": "call00000", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    turn = {"role": "assistant", "content": "hm", "tool_calls": [called]}
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    for role, expected in (("tool", tool), ("user", user)):
        reply = [{"role": role, "content": "4", "tool_call_id": "call00000", "name": "add"}]
        ids = chat_reply_ids(tokenizer, USER, turn, reply, stop_id)
        assert tokenizer.decode(ids) == expected
        if role == "user":
            assert tokenizer.decode(chat_reply_ids(tokenizer, USER, turn, reply, None)) == stop + expected


def test_thinking_in_the_prompt_may_be_dropped_once_the_conversation_goes_on():
    tokenizer = letters(QWEN3)
    called = {"id": "call00000", "type": "function", "function": {"name": "add", "arguments": {}}}
    prompt = [
        *USER,
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [called]},
        {"role": "tool", "content": "4"},
    ]
    reply = [{"role": "user", "content": "sure?"}]
    ids = chat_reply_ids(tokenizer, prompt, {"role": "assistant", "content": "4"}, reply, 0)
    assert tokenizer.decode(ids) == "\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n"
