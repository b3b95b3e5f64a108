"""The critic as a second adapter on the policy's base: learning, gradients, saving, resuming."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest
import torch
from peft import LoraConfig

from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.adapters.lora import VALUE_ADAPTER, adapter_parameters, use_adapter
from rlhf_ppo.models.forward.runner import Sequences

INPUTS = ("prompt_ids", "prompt_mask", "response_ids", "mask")


def lora(**settings) -> LoraConfig:
    """With dropout, so that a forgotten eval() shows."""
    usual = {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_dropout": 0.5}
    return LoraConfig(**{**usual, "task_type": "CAUSAL_LM", **settings})


def inputs(rollout) -> list[torch.Tensor]:
    return [getattr(rollout, name) for name in INPUTS]


def weights(parameters) -> list[torch.Tensor]:
    return [p.detach().clone() for p in parameters]


def same(before: list[torch.Tensor], after) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(before, after, strict=True)]


def wake_adapter(model: ActorCritic) -> None:
    """Weights that make the value adapter change what the trunk computes."""
    for i, p in enumerate(adapter_parameters(model.policy, VALUE_ADAPTER)):
        with torch.no_grad():
            p.copy_(0.3 * torch.sin(i + torch.arange(p.numel(), dtype=torch.float32)).view_as(p))


@pytest.fixture
def one_trunk(make_trainer):
    """``one_trunk(**settings)``: a trainer with a policy adapter and a value adapter."""

    def make(**settings):
        return make_trainer(**{"peft_config": lora(), "critic": "adapter", "learning_rate": 0.02, **settings})

    return make


def test_an_adapter_critic_learns_by_its_adapter_and_head_and_the_policy_by_its_own(one_trunk, prompts):
    trainer = one_trunk()
    model = trainer.model
    names = {id(p): name for name, p in model.named_parameters()}
    critic, policy = model.critic_parameters(), model.policy_parameters()
    assert all(f".{VALUE_ADAPTER}." in names[id(p)] or names[id(p)].startswith("value_head") for p in critic)
    assert all(".default." in names[id(p)] for p in policy) and len(critic) == len(policy) + 2
    rollout = trainer.rollout(prompts)
    assert (rollout.values == 0).all()  # the head starts at 0
    start = weights(critic), weights(policy)
    for _ in range(2):  # LoRA's B is 0 in the first steps, and A has no gradient until it moves
        trainer.step(trainer.rollout(prompts))
    assert not any(same(start[0], model.critic_parameters())) and not any(same(start[1], model.policy_parameters()))
    base = [p for p in model.policy.parameters() if not p.requires_grad]
    assert len(base) + len(policy) + len(critic) - 2 == len(list(model.policy.parameters()))


def test_the_policy_pass_never_sees_the_value_adapter(one_trunk, wake_critic, prompts):
    """Whatever the value adapter holds, log-probs, reference and sampled tokens are those of a run without it."""
    trainer, plain = one_trunk(), one_trunk(critic="shared")
    for model in (trainer.model, plain.model):
        wake_critic(model)
    trainer.model.load_state_dict({**trainer.model.state_dict(), **plain.model.state_dict()})
    wake_adapter(trainer.model)
    rollout, expected = trainer.rollout(prompts), plain.rollout(prompts)
    assert torch.equal(rollout.response_ids, expected.response_ids)
    torch.testing.assert_close(rollout.logprobs, expected.logprobs)
    torch.testing.assert_close(rollout.ref_logprobs, expected.ref_logprobs)
    assert not torch.allclose(rollout.values, expected.values, atol=1e-3)
    with torch.no_grad():
        again = trainer.model(*inputs(rollout))
    torch.testing.assert_close(again.logprobs, rollout.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(again.values, rollout.values, atol=1e-5, rtol=0)
    assert trainer.model.policy.active_adapter == "default"


def test_values_are_those_of_the_base_with_the_value_adapter(one_trunk, wake_critic, prompts):
    trainer = one_trunk()
    wake_critic(trainer.model)
    wake_adapter(trainer.model)
    rollout = trainer.rollout(prompts)
    policy = trainer.model.policy
    policy.set_adapter(VALUE_ADAPTER)
    for row, n in enumerate(rollout.lengths.tolist()):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        ids = torch.cat([prompt, rollout.response_ids[row, : n - 1]])[None]
        with torch.no_grad():
            states = policy.get_base_model().transformer(ids).last_hidden_state[0, len(prompt) - 1 :]
            expected = trainer.model.value_head(states).squeeze(-1)
        torch.testing.assert_close(rollout.values[row, :n], expected, atol=1e-5, rtol=1e-5)


def test_gradients_of_policy_and_value_go_to_their_own_adapters(one_trunk, wake_critic, prompts):
    trainer = one_trunk()
    wake_critic(trainer.model)
    wake_adapter(trainer.model)
    rollout = trainer.rollout(prompts)  # the reference was read: PEFT leaves only one adapter trainable after that
    for name, part in (("logprobs", "policy"), ("values", "critic")):
        trainer.optimizer.zero_grad()
        getattr(trainer.model(*inputs(rollout)), name).sum().backward()
        moved = {id(p) for p in trainer.model.trainable_parameters() if p.grad is not None and (p.grad != 0).any()}
        own = {id(p) for p in getattr(trainer.model, f"{part}_parameters")()}
        assert moved and moved <= own


@pytest.mark.slow
def test_the_adapter_critic_learns_what_prompts_are_worth(one_trunk, prompts, learning_seed):
    def by_prompt(prompts, completions, **_):
        return [2.0 if " " in prompt else -2.0 for prompt in prompts]

    settings = {"vf_coef": 1.0, "clip_range_vf": None, "num_epochs": 8, "learning_rate": 0.01, "total_episodes": 64}
    trainer = one_trunk(reward_funcs=by_prompt, lr_scheduler_type="linear", seed=learning_seed, **settings)
    metrics = [trainer.step(trainer.rollout(prompts)) for _ in range(8)]
    # A single rollout may fall back and recover; over 10 seeds the lowest of these medians was 0.85.
    explained, loss = (median(m[f"value/{name}"] for m in metrics[-4:]) for name in ("explained_variance", "loss"))
    assert explained > 0.8 and loss < 0.2 * metrics[0]["value/loss"]


def test_the_adapter_critic_is_saved_and_starts_another_run(one_trunk, make_model, prompts):
    trainer = one_trunk()
    for _ in range(2):
        trainer.step(trainer.rollout(prompts))
    folder = trainer.save_model()
    assert (folder / "value" / "adapter_model.safetensors").is_file()
    assert (folder / "value_head.safetensors").is_file() and (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "default").exists()
    again = one_trunk(value_head_from=str(folder))
    own = trainer.model.critic_parameters(), again.model.critic_parameters()
    assert all(torch.equal(a, b) for a, b in zip(*own, strict=True))
    with pytest.raises(ValueError, match=r"no adapter for this model and configuration: \d+ of its weights differ"):
        one_trunk(value_head_from=str(folder), peft_config=lora(r=2))


def test_a_run_with_two_adapters_resumes_exactly(one_trunk):
    settings = {"total_episodes": 32, "save_every": 2, "value_learning_rate": 0.01, "critic_warmup_rollouts": 1}
    whole = one_trunk(**settings)
    whole.train()
    cut = one_trunk(**settings, callbacks=[lambda trainer, metrics: trainer.iteration == 3])
    cut.train()
    resumed = one_trunk(**settings, output_dir=cut.args.output_dir)
    resumed.train(resume_from_checkpoint=cut.run.path / "checkpoint-2")
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    lines = [(Path(t.args.output_dir) / "metrics.jsonl").read_text() for t in (whole, resumed)]
    assert lines[0] == lines[1]


def test_the_reference_is_the_same_after_a_resume_with_adapters(one_trunk, prompts):
    trainer = one_trunk(total_episodes=32, save_every=2)
    rollout = trainer.rollout(prompts)
    before = trainer.reference.logprobs(Sequences(*inputs(rollout)), temperature=1.0)
    trainer.rollouts_made = 0
    trainer.train()
    resumed = one_trunk(total_episodes=48, save_every=2)
    resumed.train(resume_from_checkpoint=trainer.run.path / "checkpoint-4")
    assert torch.equal(resumed.reference.logprobs(Sequences(*inputs(rollout)), temperature=1.0), before)


def test_dropout_of_both_adapters_is_off(one_trunk, wake_critic, prompts):
    trainer = one_trunk()
    wake_critic(trainer.model)
    wake_adapter(trainer.model)
    rollout = trainer.rollout(prompts)
    one, two = trainer.model(*inputs(rollout)), trainer.model(*inputs(rollout))
    assert torch.equal(one.logprobs, two.logprobs) and torch.equal(one.values, two.values)


def test_use_adapter_keeps_the_flags_and_the_active_adapter(one_trunk):
    policy = one_trunk().model.policy
    flags = [p.requires_grad for p in policy.parameters()]
    with use_adapter(policy, VALUE_ADAPTER):
        assert [p.requires_grad for p in policy.parameters()] == flags
        assert policy.get_base_model().transformer.h[0].attn.c_attn.active_adapters == [VALUE_ADAPTER]
    assert policy.get_base_model().transformer.h[0].attn.c_attn.active_adapters == ["default"]
    assert [p.requires_grad for p in policy.parameters()] == flags
