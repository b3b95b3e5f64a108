"""Black box and replay: a non-finite minibatch, recomputed offline to the same numbers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ppo.cli import main
from rlhf_ppo.models.adapters.lora import lora_config
from rlhf_ppo.pipeline.replay import ReplayArgs, replay
from rlhf_ppo.trainer import PPOTrainer
from rlhf_ppo.training.checkpoints.black_box import MAX_BLACK_BOXES, read_black_box, write_black_box
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.gradients import clear_gradients
from rlhf_ppo.training.rewards import shape_rewards
from rlhf_ppo.training.stability import Step


def one_extreme(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [1e38 if prompt == "blue" else 0.5 for prompt in prompts]


def healthy_box(trainer: PPOTrainer, prompts: list[str], rows: list[int]) -> Path:
    """Write the black box of a finite step, with its numbers."""
    rollout = trainer.rollout(prompts)
    estimates = estimate(rollout, shape_rewards(rollout, trainer.args, trainer.kl_coef), trainer.args)
    args = trainer.state.effective_settings(trainer.args)
    _, losses = trainer.fixed.minibatch_gradient(trainer.model, rollout, estimates.experience, rows, args)
    gradients = [p.grad for p in trainer.model.trainable_parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    clear_gradients(trainer.model)
    step = Step(1, rows, {**losses, "grad_norm": norm})
    folder = write_black_box(trainer.state, trainer.fixed, rollout, estimates, step)
    assert folder is not None
    return folder


def test_a_reward_beyond_float32_is_kept_and_replayed_to_the_same_nan(make_trainer, prompts, capsys):
    """1e38 is a number, its square is not: whitening would leave the whole rollout advantages of 0."""
    trainer = make_trainer(reward_funcs=one_extreme)
    metrics = trainer.step(trainer.rollout(prompts))
    assert metrics["optim/skipped_steps"] == 4
    folder = trainer.run.path / "blackbox-1"
    assert sorted(file.name for file in folder.iterdir()) == [
        "experience.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "rollout.safetensors",
        "state.json",
        "trainable.safetensors",
    ]
    result = replay(ReplayArgs(folder=str(folder)))
    assert result.box.step == 1 and not result.finite and result.same
    assert math.isnan(result.numbers["grad_norm"])
    # Infinite, or undefined where the sum of squares overflows first.
    assert {f"advantage/std = {std} of the rollout" for std in ("inf", "nan")} & set(result.findings)
    if any(5 in group for group in result.box.passes):
        assert any(finding.startswith("  response 5: 'blue' -> ") for finding in result.findings)
    assert main(["replay", str(folder)]) == 1
    shown = capsys.readouterr().out
    data = trainer.fingerprints["train_dataset"]
    assert (
        f"optimizer step 1 of the update on rollout 1; training data: {data}" in shown and "as in the run: yes" in shown
    )
    assert shown.index("advantage/std = ") < shown.index("by themselves")


def test_a_nonfinite_weight_is_named_with_the_first_nonfinite_output(make_trainer, prompts):
    trainer = make_trainer()
    rollout = trainer.rollout(prompts)
    with torch.no_grad():
        trainer.model.policy.transformer.h[1].mlp.c_proj.weight[0, 0] = float("inf")
    with pytest.raises(Exception, match="are non-finite"):
        trainer.step(rollout)
    result = replay(ReplayArgs(folder=str(trainer.run.path / "blackbox-1")))
    assert result.same and result.findings[0] == "weight policy.transformer.h.1.mlp.c_proj.weight"
    assert "the output of policy.transformer.h.1.mlp.c_proj" in result.findings[1:3]
    assert "the policy's logprobs" in result.findings


def test_a_nonfinite_response_is_shown(make_trainer, prompts):
    """One NaN among the recorded advantages of one response, in a minibatch of four."""
    trainer = make_trainer()
    rollout = trainer.rollout(prompts)
    estimates = estimate(rollout, shape_rewards(rollout, trainer.args, trainer.kl_coef), trainer.args)
    advantages = estimates.experience.advantages.clone()
    advantages[5, 0] = float("nan")
    estimates = estimates._replace(experience=dataclasses.replace(estimates.experience, advantages=advantages))
    folder = write_black_box(trainer.state, trainer.fixed, rollout, estimates, Step(3, [2, 5, 0, 7], {}))
    findings = replay(ReplayArgs(folder=str(folder))).findings
    assert findings[0] == "experience.advantages in response 5"
    assert "by themselves, response 5 of the minibatch" in findings
    assert findings[-1].startswith("  response 5: 'blue' -> ")


@pytest.mark.parametrize("kind", ["shared", "separate", "none", "llama", "lora", "one trunk", "warm-up", "turns"])
def test_a_healthy_minibatch_is_finite_and_gives_the_same_numbers(make_trainer, make_model, prompts, tmp_path, kind):
    """Every kind of critic and adapter is rebuilt from the box, to the last bit of loss and gradient."""
    settings: dict[str, Any] = {"microbatch_tokens": 24, "ent_coef": 0.01, "num_epochs": 1}
    if kind == "separate":
        settings["value_model"] = make_model(seed=3)
    if kind == "none":
        settings |= {"advantage_estimator": "rloo", "num_generations": 2}
    if kind == "llama":
        settings |= {"model": make_model("llama"), "min_new_tokens": 2}
    if kind in ("lora", "one trunk"):
        make_model().save_pretrained(tmp_path / "base")
        settings |= {"model": str(tmp_path / "base"), "peft_config": lora_config(2)}
    if kind == "one trunk":
        settings |= {"critic": "adapter", "kl_loss_coef": 0.1, "kl_loss": "exact"}
    if kind == "warm-up":
        settings |= {"critic_warmup_rollouts": 3, "total_episodes": 40}
    if kind == "turns":
        settings |= {"max_turns": 2, "respond": lambda messages: "why"}
    trainer = make_trainer(**settings)
    if kind != "warm-up":  # the policy and its critic have moved from where they began
        trainer.step(trainer.rollout(prompts[:4]))
        folder = healthy_box(trainer, prompts[:4] if kind == "none" else prompts, [1, 3, 6, 0])
    else:
        from rlhf_ppo.training.optimizer import train_critic_alone

        with train_critic_alone(trainer.model):
            folder = healthy_box(trainer, prompts, [1, 3, 6, 0])
    result = replay(ReplayArgs(folder=str(folder)))
    assert result.finite and result.findings == []
    assert result.same, (result.numbers, result.box.numbers)


def test_the_command_says_finite_and_ends_with_0(make_trainer, prompts, capsys):
    folder = healthy_box(make_trainer(), prompts, [0, 1, 2, 3])
    assert main(["replay", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "finite"


def test_the_box_holds_the_weights_of_the_step_though_later_steps_move_them(make_trainer, prompts):
    trainer = make_trainer(num_epochs=1, num_minibatches=4)
    gradient, calls = trainer.fixed.gradient, iter(range(10))
    seen: list[dict[str, torch.Tensor]] = []

    def poisoned(*inputs: Any, **settings: Any) -> Any:
        result = gradient(*inputs, **settings)
        if next(calls) == 1:
            seen.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
            trainer.model.trainable_parameters()[0].grad.fill_(float("nan"))
        return result

    trainer.fixed = dataclasses.replace(trainer.fixed, gradient=poisoned)
    trainer.step(trainer.rollout(prompts))
    box = read_black_box(trainer.run.path / "blackbox-1")
    assert box.step == 2 and len(box.passes) > 0
    assert all(torch.equal(weight, seen[0][name]) for name, weight in box.weights.items())
    assert any(not torch.equal(p, seen[0][name]) for name, p in trainer.model.named_parameters())


def test_a_run_keeps_at_most_three_black_boxes(make_trainer, prompts):
    trainer = make_trainer(reward_funcs=one_extreme, num_epochs=1, max_skipped_steps=100)
    for _ in range(MAX_BLACK_BOXES + 1):
        trainer.step(trainer.rollout(prompts))
    assert sorted(f.name for f in trainer.run.path.glob("blackbox-*")) == [f"blackbox-{i}" for i in (1, 2, 3)]


def test_a_full_disk_is_a_warning_and_leaves_nothing(make_trainer, prompts, monkeypatch):
    trainer = make_trainer(reward_funcs=one_extreme)
    monkeypatch.setattr("rlhf_ppo.runtime.files.shutil.disk_usage", lambda path: type("", (), {"free": 10})())
    with pytest.warns(UserWarning, match=r"black box of rollout 1 could not be written.*free"):
        trainer.step(trainer.rollout(prompts))
    assert not list(trainer.run.path.glob("*blackbox-*"))


def test_a_missing_or_damaged_black_box_is_one_line(make_trainer, prompts, tmp_path, capsys):
    assert main(["replay", str(tmp_path / "blackbox-7")]) == 2
    assert "does not exist" in capsys.readouterr().err
    folder = healthy_box(make_trainer(), prompts, [0, 1])
    data = bytearray((folder / "rollout.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "rollout.safetensors").write_bytes(data)
    assert main(["replay", str(folder)]) == 2
    assert "rollout.safetensors: its checksum does not match" in capsys.readouterr().err
    with pytest.raises(ValueError, match="checksum"):
        read_black_box(folder)


def test_an_adapters_base_can_be_named_after_it_moved(make_trainer, make_model, prompts, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    trainer = make_trainer(model=str(tmp_path / "base"), peft_config=lora_config(2))
    folder = healthy_box(trainer, prompts, [0, 1, 2])
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises((OSError, ValueError), match="base"):
        replay(ReplayArgs(folder=str(folder)))
    assert replay(ReplayArgs(folder=str(folder), model=str(tmp_path / "moved"))).same
