"""Count the optimizer steps that TRL 1.12's PPO takes; runs in an environment that has trl (see test_migrate.py).

    python count_trl_steps.py '[{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}, ...]'

prints one list for each: the learning rate of every optimizer step of two rollouts of two epochs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import accelerate
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer


def learning_rates(batch: dict[str, int]) -> list[float]:
    """The learning rate at each optimizer step of a tiny run; fails if anything clips its gradients."""
    config = GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2, pad_token_id=29, num_labels=1)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(30)}, unk_token="w1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w29", padding_side="left")
    rows = Dataset.from_list([{"input_ids": [2 + i % 20, 3, 4]} for i in range(100)])  # more than the run reads
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            output_dir=folder,
            total_episodes=32,
            num_ppo_epochs=2,
            response_length=4,
            learning_rate=1e-3,
            max_grad_norm=1e-6,
            warmup_steps=1,
            num_sample_generations=0,
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1000,
            **batch,
        )
        trainer = PPOTrainer(
            args=args,
            processing_class=tokenizer,
            model=GPT2LMHeadModel(config),
            ref_model=GPT2LMHeadModel(config),
            reward_model=GPT2ForSequenceClassification(config),
            value_model=GPT2ForSequenceClassification(config),
            train_dataset=rows,
            eval_dataset=rows,
        )
        assert trainer.accelerator.mixed_precision == "no" and args.bf16
        assert args.gradient_checkpointing and not trainer.policy_model.is_gradient_checkpointing
        rates: list[float] = []
        optimizer = trainer.optimizer.optimizer
        optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
        trainer.train()
    return rates


def no_clipping(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("something clips gradients")


if __name__ == "__main__":
    accelerate.Accelerator.clip_grad_norm_ = torch.nn.utils.clip_grad_norm_ = no_clipping
    print(json.dumps([learning_rates(batch) for batch in json.loads(sys.argv[1])]))
