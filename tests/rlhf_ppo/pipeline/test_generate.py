"""generate: prompts and data sets, the run's sampling settings, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_ppo.cli import main
from rlhf_ppo.pipeline.generate import GenerateArgs, TextGenerator, generate


@pytest.fixture
def folder(tmp_path, make_model, tokenizer, monkeypatch) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"question": f"the {word}", "n": i} for i, word in enumerate(("cat", "dog", "cow"))]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_data_set_becomes_a_file_with_its_other_columns(folder, capsys):
    flags = "generate --model model --dataset prompts.jsonl --prompt-column question --output out/text.jsonl"
    assert main([*flags.split(), "--num-samples", "2", "--batch-size", "4", "--max-new-tokens", "3"]) == 0
    rows = [json.loads(line) for line in Path("out/text.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["n"]) for row in rows] == [(f"the {w}", i) for i, w in enumerate(("cat", "dog", "cow"))
                                                           for _ in range(2)]  # fmt: skip
    assert all(isinstance(row["completion"], str) for row in rows) and "6 completions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a", "b", ""], r"p\.jsonl row 2: the prompt is empty"),
        (["a", "b" * 62], r"p\.jsonl row 1: the prompt has 62 tokens"),
        (["a", "z"], r"p\.jsonl row 1: token id 28 is not in the model's vocabulary of 28"),
    ],
)
def test_every_row_is_checked_before_the_model_is_loaded(folder, make_model, monkeypatch, rows, message):
    make_model(vocab_size=28).save_pretrained("model")
    monkeypatch.setattr("rlhf_ppo.pipeline.generate.load_generator", lambda args: pytest.fail("the model was loaded"))
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in rows))
    with pytest.raises(ValueError, match=message):
        generate(GenerateArgs(model="model", dataset="p.jsonl", output="o.jsonl", max_new_tokens=3))


@pytest.mark.parametrize("output", ["model", "prompts.jsonl/o.jsonl"])
def test_an_output_that_cannot_be_written_is_one_line_before_the_model_is_loaded(folder, monkeypatch, capsys, output):
    monkeypatch.setattr("rlhf_ppo.pipeline.generate.load_generator", lambda args: pytest.fail("the model was loaded"))
    flags = f"generate --model model --dataset prompts.jsonl --prompt-column question --output {output}"
    assert main(flags.split()) == 2
    assert f"output {output} cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(("batch_size", "kept"), [(1, ["the cat", "the dog"]), (3, ["earlier"])])
def test_a_failure_keeps_the_completions_before_it_or_else_the_earlier_run(
    folder, tokenizer, monkeypatch, batch_size, kept
):
    def complete(prompts, templates):
        if "the cow" in prompts:
            raise RuntimeError("out of memory")
        return ["ok"] * len(prompts)

    Path("o.jsonl").write_text('{"prompt": "earlier"}\n')
    monkeypatch.setattr(
        "rlhf_ppo.pipeline.generate.load_generator", lambda args: TextGenerator(tokenizer, None, complete)
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(
            GenerateArgs(
                model="model",
                dataset="prompts.jsonl",
                prompt_column="question",
                output="o.jsonl",
                batch_size=batch_size,
            )
        )
    rows = [json.loads(line) for line in Path("o.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == kept


def test_the_same_seed_gives_the_same_completions(folder):
    small = {"model": "model", "prompt": ("a cat", "blue"), "max_new_tokens": 4, "device": "cpu"}
    pairs = generate(GenerateArgs(**small))
    assert [prompt for prompt, _ in pairs] == ["a cat", "blue"] and pairs == generate(GenerateArgs(**small))


def test_stop_strings_are_the_runs_or_the_ones_given(folder):
    """Every letter stops, so no letter is left in a completion."""
    letters = [chr(97 + i) for i in range(26)]
    small = {"model": "model", "prompt": ("a cat",), "num_samples": 8, "max_new_tokens": 6, "device": "cpu"}
    texts = [text for _, text in generate(GenerateArgs(**small))]
    assert any(set(text) & set(letters) for text in texts)
    Path("model/run.json").write_text(json.dumps({"stop_strings": letters}))
    assert not any(set(text) & set(letters) for _, text in generate(GenerateArgs(**small)))
    assert [text for _, text in generate(GenerateArgs(**small, stop_strings=()))] == texts


def test_stop_tokens_and_the_minimum_length_are_the_runs(folder, tokenizer):
    """All tokens but one stop, so a completion has one token, or two where the run wanted two."""
    small = {"model": "model", "prompt": ("a cat",), "num_samples": 8, "max_new_tokens": 6, "device": "cpu"}
    stops = list(range(1, len(tokenizer)))
    for least in (0, 2):
        Path("model/run.json").write_text(json.dumps({"stop_token_ids": stops, "min_new_tokens": least}))
        texts = [text for _, text in generate(GenerateArgs(**small))]
        assert max(map(len, texts)) <= (1 if least == 0 else 3)
    Path("model/run.json").write_text(json.dumps({"stop_token_ids": None}))
    assert max(len(text) for _, text in generate(GenerateArgs(**small))) > 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of prompt, dataset and chat, got none"),
        ({"prompt": ("a",), "chat": True}, "got prompt and chat"),
        ({"dataset": "x.jsonl"}, "dataset and output go together"),
        ({"prompt": ("a",), "output": "x"}, "dataset and output go together"),
        ({"chat": True, "num_samples": 2}, "chat gives one reply per turn"),
        ({"prompt": ("a",), "batch_size": 0}, "batch_size must be 1 or more"),
        ({"prompt": ("a",), "split": "test"}, "split='test' has no effect on prompt"),
        ({"chat": True, "prompt_column": "q"}, "prompt_column='q' has no effect on chat"),
        ({"chat": True, "batch_size": 8}, "batch_size=8 has no effect on chat"),
    ],
)
def test_contradicting_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerateArgs(model="m", **settings)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dataset prompts.jsonl --output o", "no column 'prompt'"),
        ("--dataset none.jsonl --output o", "none.jsonl does not exist"),
        ("--prompt a --max-new-tokens 64", "leaves room for 0"),
        ("--prompt a --model nowhere", "model 'nowhere' cannot be loaded"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(folder, capsys, flags, message):
    model = [] if "--model" in flags else ["--model", "model"]
    assert main(["generate", *model, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_an_adapter_whose_base_is_gone_says_so(folder, capsys):
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/nowhere/base"}))
    assert main(["generate", "--model", "adapter", "--prompt", "a"]) == 2
    assert "holds an adapter alone" in capsys.readouterr().err
