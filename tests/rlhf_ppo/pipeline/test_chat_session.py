"""Chat: keeps its history, drops what no longer fits, and ends with /exit."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from rlhf_ppo.cli import main
from rlhf_ppo.pipeline.chat_session import chat, drop_oldest
from rlhf_ppo.pipeline.generate import GenerateArgs, TextGenerator

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}.{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}a.{% endif %}"
)


@pytest.fixture
def folder(tmp_path, make_model, tokenizer, monkeypatch) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_chat_through_a_pipe_answers_each_line_until_exit(folder, tokenizer, monkeypatch, capsys, template):
    tokenizer.chat_template = template
    tokenizer.save_pretrained("model")
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\nyou\r\n/exit\nno more\n"))
    assert main(["generate", "--model", "model", "--chat", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    assert len(capsys.readouterr().out.split("\n")) == 3  # two answers, and no prompt sign in a pipe


def record_prompts(monkeypatch, tokenizer, room: int | None = None) -> list:
    """Replace the model by one that answers "ok", and return the list of its prompts."""
    heard: list = []

    def complete(prompts, templates):
        heard.extend(prompts)
        return ["ok"] * len(prompts)

    monkeypatch.setattr(
        "rlhf_ppo.pipeline.chat_session.load_generator", lambda args: TextGenerator(tokenizer, room, complete)
    )
    return heard


def test_the_history_is_kept_as_messages_or_as_one_text(monkeypatch, tokenizer, capsys):
    args = GenerateArgs(model="m", chat=True)
    heard = record_prompts(monkeypatch, tokenizer)
    chat(args, ["once ", "upon"])
    assert heard == ["once ", "once okupon"]
    tokenizer.chat_template = TEMPLATE
    heard = record_prompts(monkeypatch, tokenizer)
    chat(args, ["hi\n", "and\n"])
    assert heard[1] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "and"},
    ]
    assert capsys.readouterr().out == "ok\n" * 4


def test_what_no_longer_fits_is_dropped_oldest_first(tokenizer):
    """One token a character. "u.three a." is 10 tokens, with "u.one a.two " before it 22."""
    assert drop_oldest("abcdefgh", TextGenerator(tokenizer, 5, lambda _: [])) == "defgh"
    assert drop_oldest("abc", TextGenerator(tokenizer, None, lambda _: [])) == "abc"
    tokenizer.chat_template = TEMPLATE
    turns = [("user", "one"), ("assistant", "two"), ("user", "three")]
    history = [{"role": role, "content": text} for role, text in turns]
    assert drop_oldest(history, TextGenerator(tokenizer, 22, lambda _: [])) == history
    assert drop_oldest(history, TextGenerator(tokenizer, 21, lambda _: [])) == history[2:]
    assert drop_oldest(history, TextGenerator(tokenizer, 5, lambda _: [])) == history[2:]  # its own error follows
