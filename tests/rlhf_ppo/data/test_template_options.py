"""chat_template_kwargs and tools reach every template that the policy reads, by setting and by row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_templates import QWEN3, letters
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_ppo.cli import main
from rlhf_ppo.config.arguments.inference import EvaluateArgs, GenerateArgs
from rlhf_ppo.config.arguments.sft import SFTArgs
from rlhf_ppo.data.examples import encode_examples, read_examples
from rlhf_ppo.data.preferences import read_preferences
from rlhf_ppo.data.template_options import TemplateDefaults
from rlhf_ppo.pipeline.evaluation.evaluation_settings import find_respond, sampler_config
from rlhf_ppo.pipeline.generate import TextGenerator, generate

USER, OFF = [{"role": "user", "content": "hi"}], {"enable_thinking": False}
EMPTY = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
ON = {"chat_template_kwargs": {"enable_thinking": True}}


def test_sft_renders_prompts_with_them():
    args = SFTArgs(
        model="m", dataset=("d",), output_dir="o", prompt_column="prompt", completion_column="answer",
        chat_template_kwargs=OFF,
    )  # fmt: skip
    rows = [{"prompt": USER, "answer": "yes", **own} for own in ({}, ON, {"tools": [{"name": "spell"}]})]
    tokenizer = letters(QWEN3)
    data = encode_examples(read_examples(rows, args), tokenizer, 999, "train", vocab_size=999)
    texts = [tokenizer.decode(ids) for ids in data["input_ids"]]
    assert [EMPTY + "yes" in text for text in texts] == [True, False, True]
    assert ['"name": "spell"' in text for text in texts] == [False, False, True]


def test_preferences_are_rendered_with_them():
    tokenizer = letters("{{ style }}:{% for m in messages %}{{ m.content }};{% endfor %}")
    rows = [{"prompt": USER, "chosen": "yes", "rejected": "no", **own}
            for own in ({}, {"chat_template_kwargs": {"style": "b"}})]  # fmt: skip
    columns = {"prompt_column": "prompt", "chosen_column": "chosen", "rejected_column": "rejected"}
    found = read_preferences(rows, tokenizer, **columns, template=TemplateDefaults({"style": "a"}))
    assert [pair.chosen for pair in found] == ["a:hi;yes;", "b:hi;yes;"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A model that reads Qwen's chats letter by letter, a tool, a reward, and four questions."""
    tokenizer = letters(QWEN3)
    wide = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, "eos_token_id": 0}
    for part in (LlamaForCausalLM(LlamaConfig(**wide, **size)), tokenizer):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "tools.py").write_text(
        'def double(x: int) -> int:\n    """Double it.\n\n    Args:\n        x: a number.\n    """\n    return 2 * x\n'
        "def reward(prompts, completions, **columns):\n    return [float(i) for i in range(len(prompts))]\n"
    )
    rows = [{"prompt": USER}, {"prompt": USER, **ON}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_generate_takes_the_runs_or_its_own(folder, monkeypatch):
    seen: list[object] = []
    stub = TextGenerator(None, None, lambda prompts, templates: seen.extend(templates) or ["x"] * len(prompts))
    monkeypatch.setattr("rlhf_ppo.pipeline.generate.load_generator", lambda args: stub)
    given = {"model": "model", "dataset": "rows.jsonl", "output": "out.jsonl", "max_new_tokens": 3}
    generate(GenerateArgs(**given, chat_template_kwargs=OFF))
    (folder / "model" / "run.json").write_text(json.dumps({"chat_template_kwargs": OFF}))
    generate(GenerateArgs(**given))
    assert seen == [OFF, ON["chat_template_kwargs"]] * 4
    with pytest.raises(ValueError, match=r"rows\.jsonl row 0: the chat template reads no variable 'thinking'"):
        generate(GenerateArgs(**given, chat_template_kwargs={"thinking": False}))


def test_the_shell_trains_with_tools_and_evaluates_with_those_of_the_run(folder, capsys):
    flags = ["--dataset", "rows.jsonl", "--device", "cpu", "--precision", "fp32", "--quiet", "True"]
    flags += ["--reward", "tools.py:reward", "--max-new-tokens", "4"]
    train = ["train", "--model", "model", *flags, "--eval-size", "0", "--rollout-batch-size", "4"]
    train += ["--total-episodes", "4", "--max-turns", "2", "--output-dir", "out"]
    assert main([*train, "--tools", "tools.py", "--chat-template-kwargs", '{"enable_thinking": false}']) == 0
    run = json.loads(Path("out/run.json").read_text())
    assert run["tools"] == ["tools.py"] and run["chat_template_kwargs"] == OFF
    metrics = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["tools/calls_per_response"] == 0
    given = EvaluateArgs(model="out", dataset="rows.jsonl", reward=("tools.py:reward",))
    assert sampler_config(given, run).chat_template_kwargs == OFF
    assert [tool.__name__ for tool in find_respond(given, run, 2)["tools"]] == ["double"]
    assert main(["evaluate", "--model", "out", *flags, "--output-dir", "e"]) == 0
    assert "turns" in json.loads(Path("e/evaluation.json").read_text())["model"]
    assert main([*train, "--tools", "tools.py:reward"]) == 2
    assert "tool 'reward' cannot be described to the policy" in capsys.readouterr().err
