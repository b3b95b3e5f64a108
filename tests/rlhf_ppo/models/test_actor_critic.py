"""The critic: starts at 0, sees no future, learns, is saved; its kinds, its learning rate and its warm-up."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from rlhf_ppo import RLHFConfig
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.adapters.lora import lora_config
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.rewards import shape_rewards


def weights(parameters) -> list[torch.Tensor]:
    return [p.detach().clone() for p in parameters]


def same(before: list[torch.Tensor], after) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(before, after, strict=True)]


def test_the_first_values_are_0(make_trainer, make_model, prompts):
    for trainer in (make_trainer(), make_trainer(value_model=make_model(seed=1))):
        rollout = trainer.rollout(prompts)
        assert rollout.values is not None and (rollout.values == 0).all()
        metrics = estimate(rollout, shape_rewards(rollout, trainer.args, trainer.kl_coef), trainer.args).metrics
        assert metrics["value/explained_variance"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("t", [0, 2, 4])
def test_changing_a_token_moves_only_later_values(make_model, wake_critic, separate, t):
    """V_t is the value of the state before token t, so it may depend on tokens 0 to t-1 alone."""
    trunk = make_model(seed=1).base_model if separate else None
    model = ActorCritic(make_model(), value_trunk=trunk)
    wake_critic(model)
    prompt, tokens = torch.tensor([[5, 6]]), torch.tensor([[7, 8, 9, 10, 11]])
    other = tokens.clone()
    other[0, t] = 20
    masks = torch.ones_like(prompt).bool(), torch.ones_like(tokens).bool()
    with torch.no_grad():
        before = model(prompt, masks[0], tokens, masks[1]).values
        after = model(prompt, masks[0], other, masks[1]).values
    changed = (before - after).abs()[0] > 1e-4
    assert changed.tolist() == [k > t for k in range(5)]


def by_prompt(prompts: list[str], completions: list[str], **columns) -> list[float]:
    """2 for prompts with a space, else -2: the critic can know it before the response begins."""
    return [2.0 if " " in prompt else -2.0 for prompt in prompts]


@pytest.mark.parametrize("separate", [False, True])
def test_the_critic_learns_what_prompts_are_worth(make_trainer, make_model, prompts, separate, learning_seed):
    trainer = make_trainer(
        reward_funcs=by_prompt,
        value_model=make_model(seed=1) if separate else None,
        vf_coef=1.0,
        clip_range_vf=None,
        learning_rate=0.01,
        num_epochs=8,
        lr_scheduler_type="constant",
        seed=learning_seed,
    )
    metrics = [trainer.step(trainer.rollout(prompts)) for _ in range(6)]
    assert metrics[0]["value/explained_variance"] == pytest.approx(0, abs=1e-6)
    assert metrics[-1]["value/explained_variance"] > 0.8
    assert metrics[-1]["value/loss"] < 0.2 * metrics[0]["value/loss"]


def test_a_separate_critic_learns_by_its_own_trunk_and_leaves_the_policy_alone(make_trainer, make_model, prompts):
    trainer = make_trainer(value_model=make_model(seed=1))
    rollout = trainer.rollout(prompts)
    trainer.step(rollout)
    start = make_model(seed=1).base_model
    moved = zip(trainer.model.value_trunk.parameters(), start.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)
    trainer.optimizer.zero_grad()
    out = trainer.model(rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.mask)
    out.values.sum().backward()
    assert all(p.grad is None for p in trainer.model.policy.parameters())


def test_values_of_a_separate_critic_equal_a_row_by_row_reading(make_trainer, make_model, wake_critic, prompts):
    trainer = make_trainer(value_model=make_model("llama", seed=1))
    wake_critic(trainer.model)
    rollout = trainer.rollout(prompts)
    for row, n in enumerate(rollout.lengths.tolist()):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        ids = torch.cat([prompt, rollout.response_ids[row, : n - 1]])[None]
        with torch.no_grad():
            hidden = trainer.model.value_trunk(ids).last_hidden_state[0, len(prompt) - 1 :]
            expected = trainer.model.value_head(hidden).squeeze(-1)
        torch.testing.assert_close(rollout.values[row, :n], expected, atol=1e-5, rtol=1e-5)


def test_the_value_head_is_saved_with_the_model_and_restored(make_trainer, prompts):
    trainer = make_trainer(learning_rate=0.01)
    rollout = trainer.rollout(prompts)
    trainer.step(rollout)
    folder = trainer.save_model()
    saved = load_file(folder / "value_head.safetensors")
    assert torch.equal(saved["weight"], trainer.model.value_head.weight) and (saved["weight"] != 0).any()
    fresh = make_trainer(model=str(folder))
    fresh.model.value_head.load_state_dict(saved)
    inputs = (rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.mask)
    with torch.no_grad():
        torch.testing.assert_close(fresh.model(*inputs).values, trainer.model(*inputs).values, rtol=0, atol=0)


def test_a_separate_critic_is_saved_in_a_folder_of_its_own(make_trainer, make_model, prompts):
    trainer = make_trainer(value_model=make_model(seed=1), learning_rate=0.01)
    trainer.step(trainer.rollout(prompts))
    folder = trainer.save_model()
    critic = AutoModel.from_pretrained(folder / "critic")
    for a, b in zip(critic.parameters(), trainer.model.value_trunk.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (folder / "value_head.safetensors").is_file()


def test_a_critic_from_a_folder(make_trainer, make_model, prompts, tmp_path):
    make_model(seed=1).save_pretrained(tmp_path / "critic")
    trainer = make_trainer(value_model=str(tmp_path / "critic"))
    assert trainer.step(trainer.rollout(prompts))["value/loss"] > 0


# Contradictions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"critic": "adapter"}, "critic='adapter' is a second adapter .* needs peft_config"),
        ({"critic": "separate"}, "critic='separate' needs a value_model"),
        (
            {"critic": "adapter", "peft_config": lora_config(4), "value": True},
            "critic='adapter' uses .* value_model",
        ),
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
    [
        {"critic": "shared"},
        {"value_head_from": "x"},
        {"value_learning_rate": 1e-3},
        {"critic_warmup_rollouts": 1},
        {"normalize_values": False},
    ],
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
        "adapter": {"critic": "adapter", "peft_config": lora_config(4)},
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
        "rlhf_ppo.training.trainer.methods.estimate",
        lambda rollout, rewards, args: seen.append(args) or estimate(rollout, rewards, args),
    )
    settings = {"gae_lambda": 0.95, "gae_lambda_value": 0.5, "clip_range_vf": 0.2}
    trainer = make_trainer(critic_warmup_rollouts=1, **settings, kl_target=1.0, objective="adaptive_clip")
    trainer.step(trainer.rollout(prompts))
    assert (trainer.kl_coef, trainer.objective.clip_range) == (trainer.args.kl_coef, trainer.args.clip_range)
    trainer.step(trainer.rollout(prompts))
    assert trainer.kl_coef != trainer.args.kl_coef and trainer.objective.clip_range != trainer.args.clip_range
    used = [(a.gae_lambda, a.gae_lambda_value, a.clip_range_vf) for a in seen]
    assert used == [(1.0, None, None), (0.95, 0.5, 0.2)]
