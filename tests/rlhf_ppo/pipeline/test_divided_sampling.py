"""evaluate and generate over several processes: the same texts, and the same numbers to rounding, in float64.

And what is wrong: the same error on each process, and what was written before it stays.
"""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from processes import in_processes, require_close

from rlhf_ppo.config.arguments.inference import EvaluateArgs, GenerateArgs
from rlhf_ppo.config.arguments.reward_training import RewardTrainingArgs
from rlhf_ppo.config.arguments.sft import SFTArgs
from rlhf_ppo.pipeline import generate
from rlhf_ppo.pipeline.chat_session import chat
from rlhf_ppo.pipeline.evaluation import evaluate
from rlhf_ppo.pipeline.labelled.reward_training import train_reward_model
from rlhf_ppo.pipeline.labelled.sft import sft

FUNCTIONS = """
def vowels(prompts, completions, **columns):
    return [None if n == 3 else sum(c in 'aeiou' for c in str(t)) + len(str(t)) / 7 for t, n in
            zip(completions, columns["number"])]

def place(prompts, completions, **columns):
    return [sum(str(other) < str(one) for other in completions) / len(completions) for one in completions]

place.whole_rollout = True

def again(messages):
    said = messages[-1]["content"]
    return None if said[:1] < "e" else " go on"

class Letters:
    def reset(self, row):
        return row["prompt"] + " so" * (row["number"] % 2)

    async def step(self, messages):
        return " go on", len(messages[-1]["content"]) / 7, messages[-1]["content"][:1] < "e"
"""


@pytest.fixture
def folder(tmp_path, make_model, tokenizer) -> str:
    """Two models, rewards, and seven prompts with numbers."""
    for name, seed in (("first", 0), ("second", 1)):
        make_model(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    rows = [{"prompt": f"the {'very ' * (i % 3)}{word}", "number": i} for i, word in enumerate("abcdefg")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    return str(tmp_path)


def evaluated(folder: str, cases: list[dict[str, Any]]) -> list[list[Any]]:
    """Evaluate in float64; returns each report and the rows of its file."""
    usual = {"model": f"{folder}/second", "ref_model": f"{folder}/first", "dataset": f"{folder}/prompts.jsonl"}
    usual |= {"reward": (f"{folder}/functions.py:vowels", f"{folder}/functions.py:place"), "batch_size": 3}
    usual |= {"max_new_tokens": 6, "device": "cpu", "precision": "fp32", "num_threads": 1, "quiet": True}
    set_up, found = evaluate.set_up, []

    def in_float64(*args: Any, **arguments: Any) -> Any:
        run, model = set_up(*args, **arguments)
        run.reference.model.double()
        return dataclasses.replace(run, device=torch.device("cpu")), model.double()

    with patch.object(evaluate, "set_up", in_float64):
        for case in cases:
            torch.set_default_dtype(torch.float64)
            try:
                report = evaluate.evaluate(EvaluateArgs(**{**usual, "output_dir": f"{folder}/evaluation", **case}))
            finally:
                torch.set_default_dtype(torch.float32)
            lines = (Path(folder) / "evaluation" / "evaluation_samples.jsonl").read_text().splitlines()
            found.append([report, *map(json.loads, lines)])
    return found


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_evaluate_as_one(folder, count):
    """Batches of 3, 3 and 1: in the last one all processes but one have nothing to do."""
    turns = {"respond": f"{folder}/functions.py:again", "max_turns": 3, "judge": f"{folder}/functions.py:vowels"}
    environment = {"environment": f"{folder}/functions.py:Letters", "max_turns": 3, "reward": ()}
    cases = [{}, turns, environment]
    alone = evaluated(folder, cases)
    assert len({row["model"]["turns"] for row in alone[1][1:]}) > 1
    for found in in_processes(count, evaluated, folder, cases):
        require_close(alone, found)


def generated(folder: str, settings: dict[str, Any]) -> list[Any]:
    usual = {"model": f"{folder}/first", "max_new_tokens": 8, "batch_size": 3, "device": "cpu", "num_threads": 1}
    load = generate.load_policy
    with patch.object(generate, "load_policy", lambda name: load(name).double()):
        torch.set_default_dtype(torch.float64)
        try:
            return [list(pair) for pair in generate.generate(GenerateArgs(**{**usual, **settings}))]
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_generate_the_file_of_one(folder, count):
    """21 rows in batches of 4, and two completions of one prompt, of which a third process has none."""
    file = Path(folder) / "out.jsonl"
    settings = {"dataset": f"{folder}/prompts.jsonl", "output": str(file), "num_samples": 3, "batch_size": 4}
    alone = generated(folder, settings)
    written = file.read_bytes()
    file.unlink()
    assert in_processes(count, generated, folder, settings) == [alone] * count
    assert file.read_bytes() == written and written.count(b"\n") == 21
    few = {"prompt": ("the cat",), "num_samples": 2}
    assert in_processes(count, generated, folder, few) == [generated(folder, few)] * count


def completed(folder: str) -> list[list[str]]:
    """Complete one prompt, which one process has, then two, of which each has one."""
    generator = generate.load_generator(GenerateArgs(model=f"{folder}/first", chat=True, device="cpu"))
    return [generator.complete(["a"], [{}]), generator.complete(["the cat", "a dog"], [{}, {}])]


def test_draws_continue_from_call_to_call(folder):
    assert in_processes(2, completed, folder) == [completed(folder)] * 2


def fail_late(folder: str) -> str:
    """Generate, but the process that has the fifth prompt fails at it; returns the error."""
    sample = generate.encode_prompts

    def encode(prompts: list[str], *args: Any, **options: Any) -> Any:
        if "the very e" in prompts:
            raise RuntimeError("out of memory")
        return sample(prompts, *args, **options)

    with patch.object(generate, "encode_prompts", encode):
        return error_of(generated, folder, {"dataset": f"{folder}/prompts.jsonl", "output": f"{folder}/out.jsonl"})


def error_of(work: Any, *args: Any) -> str:
    try:
        work(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("there was no error")


def test_the_completions_before_a_failure_are_kept(folder):
    assert in_processes(2, fail_late, folder) == ["RuntimeError: out of memory"] * 2
    rows = [json.loads(line) for line in (Path(folder) / "out.jsonl").read_text().splitlines()]
    assert [row["number"] for row in rows] == [0, 1, 2]


def mistakes(folder: str) -> list[str]:
    prompts, model, out = f"{folder}/prompts.jsonl", f"{folder}/first", f"{folder}/out"
    pairs: Any = {"model": model, "dataset": prompts, "output_dir": out}
    router: Any = {"model": f"{folder}/experts", "dataset": prompts, "output_dir": out, "text_column": "prompt"}
    reward = (f"{folder}/functions.py:vowels",)
    with ExitStack() as stack:
        for name in (
            "rlhf_ppo.pipeline.labelled.sft._load_model",
            "rlhf_ppo.pipeline.labelled.reward_training._load_model",
        ):
            stack.enter_context(patch(name, side_effect=AssertionError("the model was loaded")))
        stack.enter_context(patch.object(generate, "load_generator", side_effect=AssertionError("likewise")))
        return [
            error_of(sft, SFTArgs(**pairs)),
            error_of(sft, SFTArgs(**router)),
            error_of(train_reward_model, RewardTrainingArgs(**pairs)),
            error_of(evaluate.evaluate, EvaluateArgs(**pairs, reward=reward)),
            error_of(generate.generate, GenerateArgs(model=model, dataset=f"{folder}/bad.jsonl", output=out)),
            error_of(generate.generate, GenerateArgs(model=model, dataset=prompts, output=model)),
            error_of(chat, GenerateArgs(model=model, chat=True), []),
        ]


def test_wrong_input_is_the_same_error_on_each_process_before_a_model_loads(folder, make_experts):
    make_experts(f"{folder}/experts")
    first, second = in_processes(2, mistakes, folder)
    assert first == second
    for said, wanted in zip(
        first,
        (
            "no column 'text'",
            "output_router_logits=true in its config: its loss has a term over all tokens of a batch, which 2",
            "no column 'chosen'",
            "does not say what it was trained from",
            "bad.jsonl row 1: the prompt is empty",
            "cannot be written",
            "chat runs in one: it answers one line at a time. Start it without torchrun",
        ),
        strict=True,
    ):
        assert said.startswith("ValueError") and wanted in said


@pytest.fixture
def make_experts(make_model, tokenizer):
    """``make_experts(folder)``: save the config of a model whose router has a loss."""
    from transformers import MixtralConfig

    def make(folder: str) -> None:
        MixtralConfig(vocab_size=30, max_position_embeddings=64, output_router_logits=True).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return make
