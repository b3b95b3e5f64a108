"""A reward adapter on the policy's base: the scores of the same reward model loaded apart, and nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from rlhf_ppo.models.lora import adapter_parameters
from rlhf_ppo.rewards.adapter_reward import REWARD_ADAPTER, AdapterReward
from rlhf_ppo.rewards.loading import load_reward

TEXTS = (["once upon", "a", "dog and cow"], [" a cat.", "b", " the longest of them"])


@pytest.fixture(params=["gpt2", "llama"])
def base(request, make_model, tokenizer, tmp_path) -> str:
    make_model(request.param).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def reward_adapter(tmp_path):
    """``reward_adapter(base)``: the folder of a sequence classifier's adapter with random weights."""

    def make(base: str, num_labels: int = 1, name: str = "judge") -> str:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
            config = LoraConfig(r=3, task_type="SEQ_CLS", init_lora_weights=False, lora_dropout=0.5)
            get_peft_model(model, config).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False, **settings})


def test_scores_equal_those_of_the_model_loaded_apart(make_trainer, base, reward_adapter, prompts):
    folder = reward_adapter(base)
    trainer = make_trainer(
        model=base, reward_funcs=folder, peft_config=lora(), critic="adapter", share_reward_base=True, kl_coef=0.0
    )
    ((shared, weight),) = trainer.parts.rewards.values()
    assert isinstance(shared, AdapterReward) and weight == 1 and list(trainer.parts.rewards) == [Path(folder).name]
    apart = load_reward(folder, device="cpu")
    expected = apart(*TEXTS)
    # The adapter is merged into the base there: the same up to float32 rounding.
    assert shared(*TEXTS) == pytest.approx(expected, abs=1e-4) and max(expected) - min(expected) > 0.01
    for _ in range(2):
        trainer.step(trainer.rollout(prompts))
    assert shared(*TEXTS) == pytest.approx(expected, abs=1e-4)  # policy and critic have moved, the reward has not


def test_the_reward_adapter_is_frozen_and_in_no_checkpoint(make_trainer, base, reward_adapter, prompts):
    folder = reward_adapter(base)
    trainer = make_trainer(model=base, reward_funcs=folder, peft_config=lora(), share_reward_base=True)
    before = [p.clone() for p in adapter_parameters(trainer.model.policy, REWARD_ADAPTER)]
    trainer.step(trainer.rollout(prompts))
    after = adapter_parameters(trainer.model.policy, REWARD_ADAPTER)
    assert before and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(p.requires_grad for p in after)
    assert not (trainer.save_model() / REWARD_ADAPTER).exists()
    assert trainer.model.policy.active_adapter == "default"


def test_policy_and_reference_are_those_of_a_run_without_it(make_trainer, base, reward_adapter, prompts):
    folder = reward_adapter(base)
    runs = [
        make_trainer(model=base, reward_funcs=folder, peft_config=lora(), share_reward_base=share)
        for share in (False, True)
    ]
    apart, shared = (trainer.rollout(prompts) for trainer in runs)
    assert torch.equal(apart.response_ids, shared.response_ids)
    assert torch.equal(apart.logprobs, shared.logprobs) and torch.equal(apart.ref_logprobs, shared.ref_logprobs)
    torch.testing.assert_close(apart.scores, shared.scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("critic", ["adapter", "separate"])
def test_a_critic_that_starts_as_the_reward_adapter(make_trainer, base, reward_adapter, prompts, critic):
    """Value adapter and head are the reward's, or a whole trunk and its head: the value of a text is its score."""
    folder = reward_adapter(base)
    kind = {"critic": critic, "value_model": folder if critic == "separate" else None}
    trainer = make_trainer(model=base, reward_funcs=folder, peft_config=lora(r=3), value_head_from=folder, **kind)
    rollout = trainer.rollout(prompts)
    # V_t has read the response's first t tokens, as text when they are decoded.
    parts = trainer.tokenizer.batch_decode([ids[:2].tolist() for ids in rollout.response_ids])
    ((reward, _),) = trainer.parts.rewards.values()
    rows = [i for i, n in enumerate(rollout.lengths.tolist()) if n > 2]
    scores = reward([prompts[i] for i in rows], [parts[i] for i in rows])
    assert len(rows) > 2 and rollout.values[rows, 2].tolist() == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("base", ["gpt2"], indirect=True)
def test_bases_that_cannot_be_shared(make_trainer, make_model, base, reward_adapter, tokenizer, tmp_path):
    folder = reward_adapter(base)
    with pytest.raises(ValueError, match=r"share_reward_base=True needs a frozen base.*peft_config"):
        make_trainer(model=base, reward_funcs=folder, share_reward_base=True)
    with pytest.raises(ValueError, match="share_reward_base=True needs one reward that is an adapter"):
        make_trainer(model=base, peft_config=lora(), share_reward_base=True)
    with pytest.raises(ValueError, match="share_reward_base=True needs one reward that is an adapter"):
        make_trainer(model=base, reward_funcs=[folder, folder], peft_config=lora(), share_reward_base=True)
    make_model(seed=3).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"is an adapter of .*base' and the policy's model is .*other'"):
        make_trainer(model=str(tmp_path / "other"), reward_funcs=folder, peft_config=lora(), share_reward_base=True)
    two = reward_adapter(base, num_labels=2, name="two")
    with pytest.raises(ValueError, match=r"reward=.*has shape \[2, 16\]"):
        make_trainer(model=base, reward_funcs=two, peft_config=lora(), share_reward_base=True)
