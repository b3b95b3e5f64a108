"""Chats: what cannot be rendered is one line with its row before a model is loaded; none is read as another chat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers

import rlhf_ppo.models.loading
from rlhf_ppo import RewardModel
from rlhf_ppo.cli import main
from rlhf_ppo.data.chat import render_chat, render_completed, render_prompt
from rlhf_ppo.data.examples import Example
from rlhf_ppo.data.preferences import prompt_and_answer
from rlhf_ppo.data.tokenization import tokenize_prompt
from rlhf_ppo.pipeline.labelled.sft import SFTArgs, encode_examples, read_examples

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }}. {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
REFUSALS = {
    "raise_exception": "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
    "an undefined name": "{% if messages[0].role == 'system' %}{{ messages[7].content.text }}{% endif %}",
    "a type": "{% if messages[0].role == 'system' %}{{ 1 + messages[0].content }}{% endif %}",
}
USER, BEGUN = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "the answer is"}
SYSTEM = {"role": "system", "content": "be kind"}
COMMANDS = {
    "train": "train --reward reward.py:length --output-dir run --eval-size 0 --max-new-tokens 3",
    "sft": "sft --prompt-column prompt --completion-column chosen --output-dir run",
    "reward": "reward --output-dir run --quiet",
    "generate": "generate --output o.jsonl --max-new-tokens 3",
    "evaluate": "evaluate --ref-model other --reward reward.py:length --output-dir run --max-new-tokens 3",
}


@pytest.fixture
def folder(tmp_path, make_model, tokenizer, monkeypatch) -> Path:
    """Folders model and other, ten rows of chats with a system message in the last, a reward."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "other"):
        make_model().save_pretrained(name)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(name)
    chats = [[USER]] * 9 + [[SYSTEM, USER]]
    lines = (json.dumps({"prompt": chat, "chosen": "yes", "rejected": "no"}) for chat in chats)
    Path("rows.jsonl").write_text("\n".join(lines))
    Path("reward.py").write_text("def length(prompts, completions, **_):\n    return [len(x) for x in completions]\n")
    return tmp_path


def put_template(folder: str, template: str) -> None:
    Path(folder, "chat_template.jinja").write_text(template)


def refused(command: str, capsys) -> str:
    """What the one line of a refused command says."""
    assert main([*command.split(), "--dataset", "rows.jsonl", "--model", "model"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    return line


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_template_that_fails_on_a_row_is_one_line_before_a_model_is_loaded(
    folder, monkeypatch, capsys, command, refusal
):
    monkeypatch.setattr(rlhf_ppo.models.loading, "read_weights", lambda *_, **__: pytest.fail("a model was loaded"))
    put_template("model", refusal + TEMPLATE)
    assert "error: rows.jsonl row 9: the chat template fails on this chat (" in refused(command, capsys)


def test_the_template_of_the_second_model_of_an_evaluation_is_tried_first(folder, monkeypatch, capsys):
    monkeypatch.setattr(rlhf_ppo.models.loading, "read_weights", lambda *_, **__: pytest.fail("a model was loaded"))
    put_template("other", REFUSALS["raise_exception"] + TEMPLATE)
    assert "rows.jsonl row 9: the chat template fails on this chat (TemplateError: no system" in refused(
        COMMANDS["evaluate"], capsys
    )


def test_a_reward_models_template_is_tried_on_every_prompt_before_the_policy_is_loaded(
    folder, make_classifier, tokenizer, monkeypatch, capsys
):
    make_classifier().save_pretrained("judge")
    tokenizer.save_pretrained("judge")
    put_template("judge", REFUSALS["raise_exception"] + TEMPLATE)
    monkeypatch.setattr(
        "rlhf_ppo.training.models.load_models.load_policy", lambda *_: pytest.fail("the policy was loaded")
    )
    line = refused(COMMANDS["train"].replace("reward.py:length", "judge"), capsys)
    assert "reward model 'judge', rows.jsonl row 9: the chat template fails on this chat" in line


def test_parts_of_text_are_joined_and_others_refused(tokenizer):
    tokenizer.chat_template = TEMPLATE
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert render_prompt(tokenizer, [{"role": "user", "content": parts}], "row 3") == "user hi. assistant "
    assert prompt_and_answer([USER], [{"role": "assistant", "content": parts}], "row 3") == ([USER], "hi")
    assert render_completed(tokenizer, [{"role": "user", "content": parts}], "yo", "row 3") == "user hi. assistant yo. "
    for content, said in (
        ([*parts, {"type": "image", "image": "cat.png"}], "has a part 'image', but only text is supported"),
        ([{"type": "text"}], "has a part 'text'"),
        (["hi"], "has a part 'hi'"),
        (3, "must be text, got 3"),
        (None, "must be text, got None"),
    ):
        for read in (tokenize_prompt, lambda prompt, tokenizer, where: render_chat(tokenizer, prompt, where)):
            with pytest.raises(ValueError, match=f"row 3: the content of the user message {said}"):
                read([{"role": "user", "content": content}], tokenizer, "row 3")


def test_a_prefill_is_continued_everywhere(make_trainer, tokenizer):
    """PPO, sft and judges read the same text; it is neither closed nor opened again."""
    tokenizer.chat_template = TEMPLATE
    text = "user hi. assistant the answer is"
    chat = [USER, BEGUN]
    rollout = make_trainer(train_dataset=[{"prompt": chat}] * 8).rollout([chat] * 2)
    assert tokenizer.decode(rollout.prompt_ids[0][rollout.prompt_mask[0]]) == text
    assert render_completed(tokenizer, chat, " four", "row 3") == f"{text} four. "
    args = SFTArgs(dataset=("x",), output_dir="o", model="m", prompt_column="prompt", completion_column="answer")
    for answer in (" four", [{"role": "assistant", "content": " four"}]):
        (example,) = read_examples([{"prompt": chat, "answer": answer}], args)
        (row,) = encode_examples([example], tokenizer, 64, "train", vocab_size=30)
        assert tokenizer.decode(row["input_ids"][:-1]) == f"{text} four"


def test_a_completion_is_encoded_as_part_of_the_prefilled_message(tokenizer):
    """This tokenizer puts a space before a text that stands alone, which would make "4 2" of "42"."""
    core = tokenizer.backend_tokenizer
    spaces = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    vocabulary = {character: i for i, character in enumerate(["<|endoftext|>", "?", *"abehinorstuw.42", "\u2581"])}
    core.model = models.WordLevel(vocabulary, unk_token="?")
    core.pre_tokenizer = pre_tokenizers.Sequence([spaces, pre_tokenizers.Split(Regex("."), "isolated")])
    core.decoder = decoders.Metaspace()
    tokenizer.chat_template = TEMPLATE
    example = Example([USER, {"role": "assistant", "content": "it is 4"}], "2", "row 0")
    (row,) = encode_examples([example], tokenizer, 64, "train", vocab_size=18)
    assert tokenizer.decode(row["input_ids"], skip_special_tokens=True) == "user hi. assistant it is 42"


def test_an_ambiguous_answer_is_refused_by_row(tokenizer, make_trainer):
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="row 3: the chat ends with an empty assistant message: remove it"):
        render_prompt(tokenizer, [USER, {"role": "assistant", "content": " "}], "row 3")
    for prompt, answer in ((None, [USER, BEGUN, BEGUN]), ([USER, BEGUN], [USER, BEGUN, BEGUN])):
        with pytest.raises(ValueError, match="row 3: two consecutive assistant messages at the end: join them"):
            prompt_and_answer(prompt, answer, "row 3")
    args = SFTArgs(dataset=("x",), output_dir="o", model="m", text_column="chat")
    with pytest.raises(ValueError, match="row 0, chat: a conversation needs a message before the assistant's answer"):
        read_examples([{"chat": [BEGUN]}], args)
    turns = {"respond": lambda messages: None, "max_turns": 2}
    with pytest.raises(ValueError, match="train_dataset row 1: the prompt ends with an assistant message, but"):
        make_trainer(train_dataset=[{"prompt": [USER]}, {"prompt": [USER, BEGUN]}], **turns)
    with pytest.raises(ValueError, match="prompt 1: the prompt ends with an assistant message"):
        make_trainer(train_dataset=[{"prompt": [USER]}], **turns).rollout([[USER], [USER, BEGUN]])


def test_each_order_of_roles_is_tried_before_conversations_begin(make_trainer, tokenizer):
    tokenizer.chat_template = REFUSALS["raise_exception"].replace("if", "if messages | length > 1 and", 1) + TEMPLATE
    rows = [{"prompt": [USER]}, {"prompt": [SYSTEM]}]  # fails once an answer and a reply follow
    with pytest.raises(ValueError, match="train_dataset row 1: the chat template fails on this chat"):
        make_trainer(train_dataset=rows, respond=lambda messages: None, max_turns=2)


def test_tool_calls_and_other_fields_reach_the_template_unchanged(tokenizer, make_classifier):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{{ m.name }};"
        "{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "at": None}}}]
    chat = [{"role": "assistant", "tool_calls": calls}, {"role": "tool", "name": "weather", "content": "sun"}]
    read = f"assistant{json.dumps(calls)};toolsunweather;"
    assert render_prompt(tokenizer, chat, "row") == f"{read}assistant"
    assert render_prompt(tokenizer, chat[:1], "row") == f"assistant{json.dumps(calls)};assistant"  # calls end a message
    assert RewardModel(make_classifier(), tokenizer)._text(chat, "ok") == f"{read}assistantok;"
    tokenizer.chat_template = None
    assert render_chat(tokenizer, chat, "row") == f"assistant: {json.dumps(calls)}\n\ntool: sun"


def test_every_call_of_a_template_is_in_one_module():
    package = Path(rlhf_ppo.__file__).parent
    callers = [file.name for file in package.rglob("*.py") if "apply_chat_template" in file.read_text()]
    assert callers == ["chat.py"]
