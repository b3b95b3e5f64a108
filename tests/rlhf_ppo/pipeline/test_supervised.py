"""Supervised training: the loop against transformers' Trainer, and steps that are not taken."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from rlhf_ppo.config.arguments.sft import SFTArgs
from rlhf_ppo.data.examples import collate, encode_examples, hold_out, read_examples
from rlhf_ppo.data.files import load_rows
from rlhf_ppo.models.loading import load_policy
from rlhf_ppo.pipeline.labelled.sft import sft
from rlhf_ppo.pipeline.labelled.supervised import make_optimizer, take_step
from rlhf_ppo.runtime.errors import NonFiniteGradientError
from rlhf_ppo.runtime.processes.group import ALONE

SETTINGS = {"learning_rate": 1e-2, "weight_decay": 0.3, "warmup_steps": 2, "seed": 5}


def test_sft_gives_the_weights_of_transformers_trainer(make_model, tokenizer, tmp_path):
    """Same order of rows, dropout, warm-up, decayed parameters, clipping and last partial epoch."""
    folder, file = tmp_path / "model", tmp_path / "rows.jsonl"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file.write_text("".join(json.dumps({"text": "the cat sat"[: 3 + i % 8]}) + "\n" for i in range(24)))
    args = SFTArgs(dataset=(str(file),), model=str(folder), output_dir=str(tmp_path / "ours"), batch_size=5,
                   num_epochs=1.5, quiet=True, **SETTINGS)  # fmt: skip
    sft(args)
    examples = read_examples(hold_out(load_rows(str(file)), args)["train"], args)
    trainer = Trainer(
        model=load_policy(str(folder)),
        args=TrainingArguments(
            output_dir=str(tmp_path / "theirs"),
            num_train_epochs=1.5,
            per_device_train_batch_size=5,
            lr_scheduler_type="cosine",
            train_sampling_strategy="group_by_length",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            report_to="none",
            **SETTINGS,
        ),
        train_dataset=encode_examples(examples, tokenizer, 64, "train", vocab_size=30),
        data_collator=collate,
    )
    trainer.train()
    trainer.save_model()
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight.to(ours[name].device), msg=name)


def test_a_nonfinite_gradient_of_a_finite_loss_is_an_error_before_the_step():
    """The derivative of sqrt(w) at 0 is infinite, the loss itself 0."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer, scheduler = make_optimizer(model.parameters(), SFTArgs(dataset=("x",), model="m", output_dir="o"), 200)
    loss = {"loss": model.weight.sqrt().sum()}
    with pytest.raises(NonFiniteGradientError, match=r"step 3: the loss is 0 and .* norm inf.*learning_rate$"):
        take_step(model, lambda: loss, optimizer, scheduler, processes=ALONE, max_grad_norm=1.0, where="step 3")
    assert model.weight.item() == 0
    with pytest.raises(NonFiniteGradientError, match="lower learning_rate, or set precision to fp32"):
        again = {"loss": model.weight.sqrt().sum()}
        take_step(model, lambda: again, optimizer, scheduler, processes=ALONE, max_grad_norm=1.0, where="x", bf16=True)
