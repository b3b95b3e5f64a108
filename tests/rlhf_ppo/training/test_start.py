"""The start of a run: train, sft and reward say alike what they are about to do and how far they are, or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.utils import logging

from rlhf_ppo.pipeline.labelled.reward_training import RewardTrainingArgs, train_reward_model
from rlhf_ppo.pipeline.labelled.sft import SFTArgs, sft
from rlhf_ppo.runtime.logs.progress import model_rows


@pytest.fixture
def run(tmp_path, make_model, tokenizer, make_trainer):
    """``run(command, quiet, num_threads)`` on a tiny model; returns the threads that its forward passes had."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"text": f"the {a} {b}", "prompt": f"{a}{b}", "chosen": "x", "rejected": "y"} for a in "abcd" for b in "efgh"
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"model": str(tmp_path / "model"), "output_dir": str(tmp_path / "out"), "batch_size": 4}
    data = {"dataset": (str(tmp_path / "rows.jsonl"),), "eval_fraction": 0.25, **common}
    logging.enable_progress_bar()
    seen: set[int] = set()
    hook = nn.modules.module.register_module_forward_hook(lambda *_: seen.add(torch.get_num_threads()))

    def start(command: str, **settings) -> set[int]:
        seen.clear()
        if command == "train":
            make_trainer(eval_dataset=[{"prompt": "a"}], **settings).train()
        elif command == "sft":
            sft(SFTArgs(warmup_steps=0, **data, **settings))
        else:
            train_reward_model(RewardTrainingArgs(warmup_steps=0, device="cpu", precision="fp32", **data, **settings))
        return set(seen)

    yield start
    hook.remove()
    logging.disable_progress_bar()


@pytest.mark.parametrize(
    ("command", "named", "counted"),
    [
        ("train", {"reward": "early_letters", "prompts": "8 train, 1 evaluation",
                   "run": "2 rollouts of 8 responses, 8 optimizer steps"}, "episodes 8/16"),
        ("sft", {"rows": "12 train, 4 held out", "run": "3 optimizer steps of 4 rows"}, "steps 1/3"),
        ("reward", {"pairs": "12 train, 4 held out", "run": "3 optimizer steps of 4 pairs"}, "pairs 4/12"),
    ],
)  # fmt: skip
def test_a_run_says_what_it_is_about_to_do_and_how_long_it_takes(command, named, counted, run, capsys):
    before = torch.get_num_threads()
    threads = run(command, quiet=False, num_threads=before + 1)
    assert torch.get_num_threads() == before
    out, err = capsys.readouterr()
    lines = err.splitlines()
    rows = {name: text.strip() for name, _, text in (line.partition(" ") for line in lines[::-1])}
    assert rows["trained"].endswith("parameters (100 %)") and rows["precision"] == "fp32"
    assert rows["threads"].startswith(f"{before + 1} on ") and before + 1 in threads
    assert Path(rows["folder"]).is_dir() and ("device" in rows and "model" in rows)
    assert {name: rows[name] for name in named} == named
    # The first step says at once how long one takes and how much time is left.
    (first,) = (line for line in lines if line.startswith(counted))
    assert " left  " in first and ("/iteration" if command == "train" else "/step") in first
    assert lines.index(first) > lines.index(next(line for line in lines if line.startswith("folder")))
    assert "{'" not in out + err and "%|" not in err  # neither transformers' own log lines nor its bar


@pytest.mark.parametrize("command", ["train", "sft", "reward"])
def test_quiet_is_quiet(command, run, capfd):
    run(command, quiet=True)
    assert capfd.readouterr() == ("", "")


def test_parameters_that_are_frozen_or_shared_are_counted_as_such():
    model = nn.ModuleDict({"base": nn.Linear(99, 10), "new": nn.Linear(100, 10, bias=False)})
    model["again"] = model["new"]
    model["base"].requires_grad_(False)
    rows = model_rows("m", model, device=torch.device("cpu"), bf16=True)
    assert rows["trained"] == "1 k of 2 k parameters (50 %)"
    assert rows["precision"] == "bf16 products, fp32 weights"
