"""chat_template: one setting gives the policy's tokenizer a template in train, sft, reward, generate and evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rlhf_ppo.cli import main
from rlhf_ppo.data.chat import with_chat_template
from rlhf_ppo.models.loading import load_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['content'] }}.{% endfor %}{% if add_generation_prompt %}a{% endif %}"


@pytest.fixture
def folder(tmp_path, make_model, tokenizer, monkeypatch) -> Path:
    """A model whose tokenizer has no template, prompts and answers that are chats, and a file with the template."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)

    def says(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows = [
        {"prompt": says("user", f"the {x}"), "chosen": says("assistant", "yes"), "rejected": says("assistant", "no")}
        for x in "abcdefghij"
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(
        "def length(prompts, completions, **columns):\n    return [1.0 * i for i in range(len(prompts))]\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN = (
    "train --model model --reward judge.py:length --dataset rows.jsonl --eval-size 2 --output-dir out --device cpu "
    "--total-episodes 4 --rollout-batch-size 4 --max-new-tokens 3 --precision fp32 --quiet True"
)
COMMANDS = {
    "train": TRAIN,
    "sft": "sft --model model --dataset rows.jsonl --prompt-column prompt --completion-column chosen --output-dir out "
    "--batch-size 4 --warmup-steps 0 --quiet True",
    "reward": "reward --model model --dataset rows.jsonl --output-dir out --warmup-steps 0 --device cpu --quiet True",
    "generate": "generate --model model --dataset rows.jsonl --output out.jsonl --max-new-tokens 3 --device cpu",
    "evaluate": "evaluate --model model --ref-model model --reward judge.py:length --dataset rows.jsonl "
    "--max-new-tokens 3 --device cpu --quiet True",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_template_from_a_file_or_as_text_and_what_is_trained_keeps_it(command, folder, capsys):
    flags = COMMANDS[command].split()
    if command != "reward":  # which writes a chat out where there is no template
        assert main(flags) == 2
        assert "chat template" in capsys.readouterr().err
    assert main([*flags, "--chat-template", "missing.jinja"]) == 2
    assert "chat template file missing.jinja does not exist" in capsys.readouterr().err
    assert main([*flags, "--chat-template", TEMPLATE if command == "generate" else "chat.jinja"]) == 0
    if command in ("train", "sft", "reward"):
        assert AutoTokenizer.from_pretrained("out").chat_template == TEMPLATE


def test_an_evaluation_reads_both_models_by_the_template_of_the_run(folder, capsys):
    """The reference's own tokenizer has none, and the file may have gone: the run's folder keeps the template."""
    assert main([*TRAIN.split(), "--chat-template", "chat.jinja"]) == 0
    (folder / "chat.jinja").unlink()
    flags = "evaluate --model out --reward judge.py:length --dataset rows.jsonl --device cpu --quiet True"
    assert main([*flags.split(), "--max-new-tokens", "3"]) == 0


def test_a_given_tokenizer_is_not_modified(folder):
    given = load_tokenizer("model")
    assert with_chat_template(given, TEMPLATE).chat_template == TEMPLATE
    assert given.chat_template is None and with_chat_template(given, None) is given
