"""Kinds of critic: an adapter of its own, a head from elsewhere, its own learning rate, a start before the policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import median

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from rlhf_ppo import RLHFConfig
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward.runner import Sequences
from rlhf_ppo.models.lora import VALUE_ADAPTER, adapter_parameters, use_adapter
from rlhf_ppo.training.experience import estimate

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


# The critic's own adapter


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


# Contradictions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"critic": "adapter"}, "critic='adapter' is a second adapter .* needs peft_config"),
        ({"critic": "separate"}, "critic='separate' needs a value_model"),
        ({"critic": "adapter", "peft_config": lora(), "value": True}, "critic='adapter' uses .* value_model is given"),
        (
            {"critic": "shared", "value": True},
            "critic='shared' uses the policy's own model, but a value_model is given",
        ),
    ],
)
def test_critics_that_contradict_the_models(make_trainer, make_model, settings, message):
    value = make_model() if settings.pop("value", False) else None
    with pytest.raises(ValueError, match=message):
        make_trainer(value_model=value, **settings)


@pytest.mark.parametrize(
    "setting",
    [{"critic": "shared"}, {"value_head_from": "x"}, {"value_learning_rate": 1e-3}, {"critic_warmup_rollouts": 1}],
)
def test_settings_of_a_critic_without_one(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name}=.* has no effect: it needs a critic, and objective='reinforce'"):
        RLHFConfig(output_dir="x", objective="reinforce", **setting)


def test_warm_ups_that_cannot_be(make_trainer):
    with pytest.raises(ValueError, match="critic_warmup_rollouts=2 leaves none of the 2 rollouts of total_episodes=16"):
        make_trainer(critic_warmup_rollouts=2)
    with pytest.raises(ValueError, match=r"critic_warmup_rollouts=1 .*vf_coef=0"):
        make_trainer(critic_warmup_rollouts=1, vf_coef=0.0)


# Heads from elsewhere


def trl_checkpoint(model, folder: Path, *, sharded: bool = False) -> torch.Tensor:
    """What AutoModelForCausalLMWithValueHead.save_pretrained leaves behind, as its state dict names it."""
    folder.mkdir()
    weight = torch.linspace(-1, 1, 16)[None]
    head = {"v_head.summary.weight": weight, "v_head.summary.bias": torch.tensor([0.5])}
    body = {name: x.contiguous().clone() for name, x in model.state_dict().items() if name != "lm_head.weight"}
    model.config.save_pretrained(folder)
    if not sharded:
        save_file({**body, **head}, folder / "model.safetensors")
        return weight
    save_file(body, folder / "model-00001-of-00002.safetensors")
    save_file(head, folder / "model-00002-of-00002.safetensors")
    shards = dict.fromkeys(body, "model-00001-of-00002.safetensors")
    shards |= dict.fromkeys(head, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return weight


@pytest.mark.parametrize("sharded", [False, True])
def test_a_value_head_from_an_old_trl_checkpoint(make_trainer, make_model, tmp_path, sharded):
    weight = trl_checkpoint(make_model(), tmp_path / "trl", sharded=sharded)
    head = make_trainer(value_head_from=str(tmp_path / "trl")).model.value_head
    assert torch.equal(head.weight, weight) and head.bias.tolist() == [0.5]


def test_fault_28_a_pickled_checkpoint_is_refused_with_the_remedy(make_trainer, make_model, tmp_path):
    make_model().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match=r"pytorch_model.bin, a pickle.*save_pretrained"):
        make_trainer(value_head_from=str(tmp_path))


def test_a_value_head_from_a_run(make_trainer, prompts):
    trainer = make_trainer(learning_rate=0.01)
    trainer.step(trainer.rollout(prompts))
    folder = trainer.save_model()
    again = make_trainer(model=str(folder), value_head_from=str(folder))
    for name, x in load_file(folder / "value_head.safetensors").items():
        assert torch.equal(x, again.model.value_head.state_dict()[name]) and (x != 0).any()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_critic_that_starts_as_the_reward_model_gives_its_score_after_each_token(
    make_trainer, make_classifier, prompts, tmp_path, kind
):
    make_classifier(kind).save_pretrained(tmp_path / "reward")
    trainer = make_trainer(value_model=str(tmp_path / "reward"), value_head_from=str(tmp_path / "reward"))
    rollout = trainer.rollout(prompts)
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    reward.config.pad_token_id = None  # one row at a time: the last token is the last one
    for row, n in enumerate(rollout.lengths.tolist()):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        for t in range(n):  # V_t values the state before token t: the reward model has read as far as that
            ids = torch.cat([prompt, rollout.response_ids[row, :t]])[None]
            with torch.no_grad():
                score = reward(ids).logits[0, 0]
            torch.testing.assert_close(rollout.values[row, t], score, atol=1e-5, rtol=1e-5)


def test_heads_that_do_not_fit(make_trainer, make_model, make_classifier, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("rlhf_ppo.training.setup.load_policy", load)
    folder = tmp_path / "wide"
    trl_checkpoint(make_model(), folder)
    save_file({"v_head.summary.weight": torch.ones(1, 24)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="fits hidden states of width 24, but the model under it is 16 wide"):
        make_trainer(value_head_from=str(folder))
    make_classifier(num_labels=2).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match=r"score.weight has shape \[2, 16\], but a value is one number"):
        make_trainer(value_head_from=str(tmp_path / "two"))
    make_model().save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="no single linear head found"):
        make_trainer(value_head_from=str(tmp_path / "none"))
    shutil.rmtree(tmp_path / "none")
    with pytest.raises(ValueError, match=r"found neither value_head.safetensors nor model.safetensors"):
        make_trainer(value_head_from=str(tmp_path / "none"))


# Learning rate and warm-up


def test_the_critic_has_a_learning_rate_of_its_own(make_trainer, make_model, prompts):
    """Policy at rate 0 stays, the critic moves; one clipping and one schedule over both."""
    trainer = make_trainer(learning_rate=0.0, value_learning_rate=0.01, value_model=make_model(seed=1))
    policy, critic = weights(trainer.model.policy_parameters()), weights(trainer.model.critic_parameters())
    metrics = trainer.step(trainer.rollout(prompts))
    assert all(same(policy, trainer.model.policy_parameters()))
    assert not all(same(critic, trainer.model.critic_parameters()))
    # Half of the run's two rollouts is done, so the linear schedule is at one half.
    assert (metrics["optim/learning_rate"], metrics["optim/value_learning_rate"]) == (0.0, pytest.approx(0.005))


@pytest.mark.parametrize("kind", ["shared", "separate", "adapter"])
def test_the_warm_up_moves_the_critic_alone(make_trainer, make_model, prompts, kind):
    extra = {
        "shared": {},
        "separate": {"value_model": make_model(seed=1)},
        "adapter": {"critic": "adapter", "peft_config": lora()},
    }[kind]
    settings = {"total_episodes": 32, "critic_warmup_rollouts": 2, "weight_decay": 0.1, "learning_rate": 0.01}
    trainer = make_trainer(**settings, **extra)
    everything = weights(trainer.model.policy.parameters())
    critic = {id(p) for p in trainer.model.critic_parameters()}
    fixed = [i for i, p in enumerate(trainer.model.policy.parameters()) if id(p) not in critic]
    head = weights(trainer.model.value_head.parameters())
    for n in (1, 2):
        metrics = trainer.step(trainer.rollout(prompts))
        assert metrics["progress/optimizer_steps"] == 4 * n and metrics["policy/ratio_mean"] == pytest.approx(1)
    now = list(trainer.model.policy.parameters())
    assert all(torch.equal(everything[i], now[i]) for i in fixed)
    assert not any(same(head, trainer.model.value_head.parameters()))
    assert metrics["optim/learning_rate"] == 0.01  # the policy's schedule has not begun
    trainer.step(trainer.rollout(prompts))
    assert any(not torch.equal(everything[i], p) for i, p in enumerate(now) if i in fixed)
    assert trainer.scheduler.get_last_lr()[0] == pytest.approx(0.005)  # one of its two rollouts is done
    assert trainer.scheduler.get_last_lr()[1] == pytest.approx(0.0025)  # three of the critic's four


def test_the_warm_up_learns_monte_carlo_returns_and_leaves_the_controllers(make_trainer, prompts, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "rlhf_ppo.trainer.estimate",
        lambda rollout, rewards, args: seen.append(args) or estimate(rollout, rewards, args),
    )
    trainer = make_trainer(critic_warmup_rollouts=1, gae_lambda_value=0.5, kl_target=1.0, objective="adaptive_clip")
    trainer.step(trainer.rollout(prompts))
    assert (trainer.kl_coef, trainer.objective.clip_range) == (trainer.args.kl_coef, trainer.args.clip_range)
    trainer.step(trainer.rollout(prompts))
    assert trainer.kl_coef != trainer.args.kl_coef and trainer.objective.clip_range != trainer.args.clip_range
    used = [(a.gae_lambda, a.gae_lambda_value, a.clip_range_vf) for a in seen]
    assert used == [(1.0, None, None), (0.95, 0.5, 0.2)]
