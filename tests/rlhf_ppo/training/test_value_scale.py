"""A critic that does not depend on the reward's units: the same run for every scale and offset of the score."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig

from rlhf_ppo.config.arguments.commands import ReplayArgs
from rlhf_ppo.config.arguments.critic_fit import CriticFitArgs
from rlhf_ppo.core import ValueScale
from rlhf_ppo.pipeline.critic.critic_fit import fit_critic
from rlhf_ppo.pipeline.replay import replay
from rlhf_ppo.runtime.checkpoints.checkpoint import read_checkpoint
from rlhf_ppo.runtime.checkpoints.checkpoint_commit import write_checkpoint


def early_share(text: str) -> float:
    return sum("a" <= letter < "n" for letter in text) / max(len(text), 1)


def scaled(a: float, b: float) -> Any:
    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [a * early_share(text) + b for text in completions]

    return reward


def weights(trainer: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.policy.parameters()]


CASES = [(1e-3, 0.0), (1e3, 0.0), (1.0, 1e6), (1e-3, -50.0), (1e3, -1e5)]


@pytest.mark.parametrize("kind", ["shared", "separate"])
@pytest.mark.parametrize(("a", "b"), CASES)
def test_a_score_of_other_scale_and_offset_trains_the_same_policy(make_trainer, make_model, prompts, a, b, kind):
    runs = []
    for scale, offset in [(1.0, 0.0), (a, b)]:
        critic = make_model("llama", seed=1) if kind == "separate" else None
        trainer = make_trainer(
            reward_funcs=scaled(scale, offset),
            value_model=critic,
            kl_coef=0.05 * scale,
            total_episodes=24,
            learning_rate=3e-3,
            value_learning_rate=1e-2,
            clip_range_vf=0.2,
        )
        trainer.train()
        runs.append((trainer, trainer.run.read()))
    (plain, first), (other, second) = runs
    # Outputs, not weights: the gradient of a key's bias is rounding alone, which Adam makes a step of.
    ours, theirs = plain.rollout(prompts), other.rollout(prompts)
    assert torch.equal(theirs.response_ids, ours.response_ids)
    torch.testing.assert_close(theirs.logprobs, ours.logprobs, atol=1e-4, rtol=1e-4)
    for row, same in zip(first, second, strict=True):
        # What is reported about values is in the reward's own units.
        assert same["value/explained_variance"] == pytest.approx(row["value/explained_variance"], abs=1e-3)
        assert same["value/mean"] == pytest.approx(a * row["value/mean"] + b, rel=1e-4, abs=1e-4 * a)
        assert same["value/return_mean"] == pytest.approx(a * row["value/return_mean"] + b, rel=1e-4, abs=1e-4 * a)
        assert same["value/loss"] == pytest.approx(a**2 * row["value/loss"], rel=1e-3)
        assert same["value/clip_range"] == pytest.approx(a * row["value/clip_range"], rel=1e-4)
    assert first[-1]["value/explained_variance"] != 0  # the critic has moved


def test_without_normalized_values_the_offset_shows(make_trainer):
    changed = [make_trainer(reward_funcs=scaled(1.0, b), normalize_values=False, gae_lambda=0.9) for b in (0.0, 5.0)]
    for trainer in changed:
        trainer.train()
    plain, other = map(weights, changed)
    assert not all(torch.allclose(x, y, atol=1e-4) for x, y in zip(plain, other, strict=True))


def test_the_first_rollout_is_judged_against_its_own_mean(make_trainer, prompts):
    trainer = make_trainer(reward_funcs=scaled(1.0, 100.0), kl_coef=0.0)
    rollout = trainer.rollout(prompts)
    assert rollout.value_scale is None and not rollout.values.any()
    metrics = trainer.step(rollout)
    tokens = rollout.lengths.double()
    mean = float((rollout.scores * tokens).sum() / tokens.sum())  # without KL or discount every token's return
    assert trainer.model.value_scale.count == 1
    assert trainer.model.value_scale.mean == pytest.approx(mean) == pytest.approx(metrics["value/mean"])


def test_values_keep_their_meaning_while_the_scale_moves(make_trainer, prompts, wake_critic):
    trainer = make_trainer(reward_funcs=scaled(10.0, 3.0), learning_rate=0.0)
    wake_critic(trainer.model)
    trainer.model.value_scale = ValueScale(3.0, 2.0, 1)
    before = trainer.rollout(prompts)
    trainer.step(before)  # learning rate 0: the units change, the values do not
    assert trainer.model.value_scale.count == 2 and trainer.model.value_scale != ValueScale(3.0, 2.0, 2)
    part = before.sequences(range(len(prompts)))
    with torch.no_grad():
        now = trainer.model.in_reward_units(trainer.model(*part).values, part.mask)
    torch.testing.assert_close(now, before.values, atol=1e-4, rtol=1e-4)
    assert before.values.dtype == torch.float64 and before.values[before.mask].std() > 0.1


def test_equal_scores_teach_nothing(make_trainer):
    trainer = make_trainer(reward_funcs=scaled(0.0, 7.0), total_episodes=8)
    start = weights(trainer)
    with pytest.warns(UserWarning, match="constant reward"):
        trainer.train()
    # What is left is the rounding of the KL, which must not be blown up to advantages of size 1.
    assert max(float((x - y).abs().max()) for x, y in zip(start, weights(trainer), strict=True)) < 1e-2
    assert trainer.run.read()[-1]["policy/loss"] == pytest.approx(0, abs=1e-3)


def test_a_resumed_run_keeps_the_scale(make_trainer, tmp_path):
    settings = {"reward_funcs": scaled(10.0, 3.0), "total_episodes": 24}
    whole = make_trainer(**settings, save_every=1, output_dir=str(tmp_path / "a"))
    whole.train()
    scale = whole.model.value_scale
    again = make_trainer(**settings, output_dir=str(tmp_path / "b"))
    again.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")
    assert again.model.value_scale == scale and scale.count == 3
    for ours, theirs in zip(weights(whole), weights(again), strict=True):
        assert torch.equal(ours, theirs)


def test_a_saved_head_keeps_its_scale(make_trainer, prompts):
    trainer = make_trainer(reward_funcs=scaled(10.0, 3.0), learning_rate=0.01)
    trainer.step(trainer.rollout(prompts))
    folder = str(trainer.save_model())
    again = make_trainer(model=folder, value_head_from=folder)
    assert again.model.value_scale == trainer.model.value_scale
    raw = make_trainer(model=folder, value_head_from=folder, normalize_values=False)
    assert raw.model.value_scale == ValueScale()
    ours, plain = again.rollout(prompts), raw.rollout(prompts)
    torch.testing.assert_close(plain.values.double(), ours.values, atol=1e-4, rtol=1e-4)


def test_a_head_without_a_scale_predicts_in_the_reward_s_units(make_trainer, make_classifier, prompts, tmp_path):
    make_classifier().save_pretrained(tmp_path / "reward")
    trainer = make_trainer(value_head_from=str(tmp_path / "reward"))
    assert trainer.model.value_scale == ValueScale()
    before = trainer.rollout(prompts)
    trainer.step(before)
    assert trainer.model.value_scale.count == 1


def test_a_checkpoint_of_an_earlier_version_holds_a_head_in_the_reward_s_units(make_trainer, prompts, tmp_path):
    settings = {"reward_funcs": scaled(10.0, 3.0), "learning_rate": 0.01, "total_episodes": 16}
    earlier = make_trainer(**settings, normalize_values=False, save_every=1)
    earlier.train()
    saved = read_checkpoint(earlier.run.path / "checkpoint-1")
    state, known = dict(saved.state), dict(saved.settings)
    del state["value_scale"], known["normalize_values"]
    old = write_checkpoint(
        tmp_path / "old", 1, tensors=saved.tensors, state=state, settings=known, fingerprints=saved.fingerprints
    )
    trainer = make_trainer(**settings)
    trainer.load_checkpoint(old)
    head = trainer.model.value_head
    assert trainer.model.value_scale == ValueScale() and head.weight.any()
    assert torch.equal(head.weight, saved.tensors["trainable"]["value_head.weight"])
    assert torch.equal(head.bias, saved.tensors["trainable"]["value_head.bias"])
    rollout = trainer.rollout(prompts)
    part = rollout.sequences(range(len(prompts)))
    with torch.no_grad():
        torch.testing.assert_close(rollout.values, trainer.model(*part).values, atol=1e-4, rtol=1e-4)
    trainer.step(rollout)
    assert trainer.model.value_scale.count == 1 and trainer.model.value_scale.std != 1


def absurd(by: dict[str, float]) -> Any:
    return lambda prompts, completions, **_: [by["score"], *map(early_share, completions[1:])]


def test_an_absurd_score_is_skipped_leaves_a_black_box_and_spoils_no_unit(make_trainer, prompts):
    by = {"score": 1.0}
    trainer = make_trainer(reward_funcs=absurd(by), num_epochs=1, num_minibatches=1)
    trainer.step(trainer.rollout(prompts))
    before, by["score"] = trainer.model.value_scale, 1e30
    metrics = trainer.step(trainer.rollout(prompts))
    assert metrics["optim/skipped_steps"] == 1
    assert trainer.model.value_scale == before
    replayed = replay(ReplayArgs(folder=str(trainer.run.path / "blackbox-2")))
    assert replayed.same and {"advantage/std = inf of the rollout", "loss value = inf"} <= set(replayed.findings)
    by["score"] = 1.0
    metrics = trainer.step(trainer.rollout(prompts))
    assert metrics["optim/skipped_steps"] == 0 and trainer.model.value_scale.count == 2
    assert trainer.model.value_scale.std < 10


def test_an_absurd_score_that_float32_can_square_spoils_one_rollout_not_hundreds(make_trainer, prompts):
    by = {"score": 1.0}
    trainer = make_trainer(reward_funcs=absurd(by))
    trainer.step(trainer.rollout(prompts))
    before, by["score"] = trainer.model.value_scale, 1e15
    trainer.step(trainer.rollout(prompts))
    assert trainer.model.value_scale.std < 1e4 * before.std
    by["score"] = 1.0
    rollout = trainer.rollout(prompts)
    kept = trainer.explain(rollout).rows
    spread = torch.tensor([row["weight"] for row in kept]).std(correction=0)
    assert float(spread) == pytest.approx(1, abs=0.05)  # the policy still hears a difference between scores


def test_a_rejected_update_changes_no_unit(make_trainer, prompts):
    trainer = make_trainer(reward_funcs=scaled(10.0, 3.0))
    trainer.step(trainer.rollout(prompts))
    scale, start = trainer.model.value_scale, [p.detach().clone() for p in trainer.model.parameters()]
    gradient = trainer.fixed.gradient

    def poisoned(*inputs: Any, **settings: Any) -> Any:
        result = gradient(*inputs, **settings)
        trainer.model.value_head.bias.grad.fill_(math.nan)
        return result

    trainer.fixed = dataclasses.replace(trainer.fixed, gradient=poisoned)
    assert trainer.step(trainer.rollout(prompts))["optim/skipped_steps"] == 4
    assert trainer.model.value_scale == scale
    assert all(torch.equal(p, q) for p, q in zip(start, trainer.model.parameters(), strict=True))


def by_token(a: float, b: float) -> Any:
    def reward(prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> Any:
        scores = [[a * (token % 3) for token in ids] for ids in completion_ids]
        return [[*row[:-1], row[-1] + b] if row else row for row in scores]

    return reward


def of_messages(a: float, b: float) -> Any:
    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        said = ["".join(str(m["content"]) for m in c if m["role"] == "assistant") for c in completions]
        return [a * early_share(text) + b for text in said]

    return reward


def adapter() -> Any:
    return LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", lora_dropout=0.0)


KINDS: dict[str, dict[str, Any]] = {
    "adapter": {"peft_config": adapter, "critic": "adapter"},
    "by token": {"reward": by_token},
    "by turn": {"respond": lambda messages: "go on", "max_turns": 2, "turn_credit": "turn", "gae_lambda": 0.9},
    "running scores": {"normalize_scores": True},
    "warm-up": {"critic_warmup_rollouts": 1, "critic_epochs": 3, "gae_lambda": 0.9, "clip_range_vf": 0.1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_setting_brings_the_units_back(make_trainer, prompts, kind):
    settings = {name: x for name, x in KINDS[kind].items() if name not in ("reward", "peft_config")}
    runs = []
    for scale, offset in [(1.0, 0.0), (1e-3, -50.0)]:
        trainer = make_trainer(
            reward_funcs=KINDS[kind].get("reward", scaled)(scale, offset),
            peft_config=KINDS[kind]["peft_config"]() if "peft_config" in KINDS[kind] else None,
            # Scores in units of their own running spread are charged the same KL.
            kl_coef=0.05 * (1.0 if kind == "running scores" else scale),
            **{"total_episodes": 24, "learning_rate": 3e-3, "value_learning_rate": 1e-2, **settings},
        )
        trainer.train()
        runs.append((trainer.rollout(prompts), trainer.run.read()))
    (ours, first), (theirs, second) = runs
    assert torch.equal(theirs.response_ids, ours.response_ids)
    torch.testing.assert_close(theirs.logprobs, ours.logprobs, atol=1e-4, rtol=1e-4)
    for row, same in zip(first, second, strict=True):
        assert same["value/explained_variance"] == pytest.approx(row["value/explained_variance"], abs=1e-3)
    assert first[-1]["value/explained_variance"] != 0


def test_a_fitted_critic_and_a_replay_know_no_units(make_trainer, make_model, tokenizer, prompts, tmp_path):
    policy = tmp_path / "policy"
    make_model().save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    rates = {"learning_rate": 3e-3, "value_learning_rate": 1e-2}
    runs = []
    for scale, offset in [(1.0, 0.0), (1e-3, -50.0)]:
        task = {"model": str(policy), "reward_funcs": scaled(scale, offset), "kl_coef": 0.05 * scale, **rates}
        recorded = make_trainer(**task, save_rollouts=True)
        recorded.train()
        folder, critic = str(recorded.run.path), str(tmp_path / f"critic of {scale}")
        fit_critic(CriticFitArgs(rollouts=(folder,), output_dir=critic, device="cpu", precision="fp32", quiet=True))
        trainer = make_trainer(**task, replay=folder, value_head_from=critic)
        trainer.train()
        runs.append((trainer.rollout(prompts), trainer.run.read()))
    (ours, first), (theirs, second) = runs
    torch.testing.assert_close(theirs.logprobs, ours.logprobs, atol=1e-4, rtol=1e-4)
    shares = [[row["value/explained_variance"] for row in rows] for rows in (first, second)]
    assert shares[0] == pytest.approx(shares[1], abs=1e-3) and all(shares[0])
