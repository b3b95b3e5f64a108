"""One update: how often it steps, what its gradient is, what it reports, and when it stops."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from rlhf_ppo.core import Experience, ppo_loss
from rlhf_ppo.runtime.errors import NonFiniteGradientError
from rlhf_ppo.trainer import PPOTrainer
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.rewards import shape_rewards


def gradients(trainer: PPOTrainer) -> list[torch.Tensor]:
    return [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]


def count_steps(trainer: PPOTrainer) -> list[float]:
    """A list that grows by the norm of the gradient that each optimizer step used: the step itself clips it."""
    norms: list[float] = []

    def after_step(optimizer, args, kwargs) -> None:
        norms.append(float(torch.cat([g.flatten() for g in gradients(trainer)]).norm()))

    trainer.optimizer.register_step_post_hook(after_step)
    return norms


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (3, 2), (2, 8)])
def test_optimizer_steps_are_epochs_times_minibatches(make_trainer, prompts, epochs, minibatches):
    trainer = make_trainer(num_epochs=epochs, num_minibatches=minibatches, microbatch_tokens=1)
    steps = count_steps(trainer)
    metrics = trainer.step(trainer.rollout(prompts))
    assert len(steps) == epochs * minibatches == metrics["progress/optimizer_steps"]
    assert metrics["optim/epochs"] == epochs
    assert metrics["optim/skipped_steps"] == 0
    trainer.step(trainer.rollout(prompts))
    assert len(steps) == 2 * epochs * minibatches == trainer.optimizer_steps == trainer.args.num_optimizer_steps


def test_every_response_is_trained_on_once_per_epoch(make_trainer, prompts):
    trainer = make_trainer(num_epochs=3, num_minibatches=4, learning_rate=0.0)
    rollout = trainer.rollout(prompts)
    seen: list[tuple[int, ...]] = []
    trainer.model.register_forward_pre_hook(
        lambda module, inputs: seen.extend(
            tuple(ids[keep].tolist()) for ids, keep in zip(inputs[0], inputs[1], strict=True)
        )
    )
    trainer.step(rollout)
    rows = [tuple(ids[keep].tolist()) for ids, keep in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    epochs = [seen[i : i + 8] for i in range(0, 24, 8)]
    assert len(seen) == 24 and all(sorted(epoch) == sorted(rows) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])
@pytest.mark.parametrize("microbatch", [1, 3, 5])
def test_the_gradient_is_the_same_however_the_minibatch_is_split(
    make_trainer, wake_critic, prompts, aggregation, microbatch
):
    """Responses of different lengths: a mean of microbatch means would weigh their tokens differently."""
    found = []
    for size in (None, microbatch):
        trainer = make_trainer(microbatch_tokens=size, loss_aggregation=aggregation, ent_coef=0.1, vf_coef=0.5)
        wake_critic(trainer.model)
        rollout = trainer.rollout(prompts)
        assert rollout.lengths.unique().numel() > 2
        old = estimate(rollout, shape_rewards(rollout, trainer.args, trainer.kl_coef), trainer.args).experience
        actions, losses = trainer.fixed.minibatch_gradient(trainer.model, rollout, old, list(range(8)), trainer.args)
        found.append((gradients(trainer), losses, actions.compute()))
    for whole, parts in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)  # float32 sums in another order
    for name, loss in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], loss, atol=1e-6, rtol=1e-5)
    assert found[1][2] == pytest.approx(found[0][2], abs=1e-6)


def test_the_gradient_is_clipped_before_each_step(make_trainer, prompts):
    trainer = make_trainer(max_grad_norm=0.01)
    norms = count_steps(trainer)
    metrics = trainer.step(trainer.rollout(prompts))
    assert metrics["optim/grad_norm"] > 0.02  # measured before clipping, so clipping had work to do
    assert norms and max(norms) <= 0.01 * (1 + 1e-4)  # float32


def test_metrics_equal_a_direct_computation_over_real_tokens(make_trainer, wake_critic, prompts):
    """Clip fraction, KL, ratio and entropy against float64 on unpadded rows, one at a time."""
    trainer = make_trainer(
        num_epochs=1,
        num_minibatches=1,
        microbatch_tokens=3,
        clip_range=0.05,
        max_initial_log_ratio=9.0,
        temperature=0.9,
    )
    wake_critic(trainer.model)
    rollout = trainer.rollout(prompts)
    old = estimate(rollout, shape_rewards(rollout, trainer.args, trainer.kl_coef), trainer.args).experience
    entropies = []
    with torch.no_grad():
        for row in range(8):
            prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
            response = rollout.response_ids[row][rollout.mask[row]]
            logits = trainer.model.policy(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
            log_p = (logits.double() / 0.9).log_softmax(-1)
            entropies += (-(log_p.exp() * log_p).sum(-1)).tolist()
        for p in trainer.model.policy.parameters():
            p.add_(0.02 * torch.sin(torch.arange(p.numel(), dtype=torch.float32)).view_as(p))
    log_ratios, advantages = [], []
    with torch.no_grad():
        for row in range(8):
            prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
            response = rollout.response_ids[row][rollout.mask[row]]
            logits = trainer.model.policy(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
            log_p = (logits.double() / 0.9).log_softmax(-1)
            new = log_p.gather(1, response[:, None]).squeeze(1)
            log_ratios += (new - rollout.logprobs[row, : len(response)]).tolist()
            advantages += old.advantages[row, : len(response)].tolist()
    n = len(log_ratios)
    assert n == int(rollout.mask.sum()) < rollout.mask.numel()
    ratios = [math.exp(x) for x in log_ratios]
    clipped = [(a > 0 and r > 1.05) or (a < 0 and r < 0.95) for r, a in zip(ratios, advantages, strict=True)]
    outside = [not 0.95 <= r <= 1.05 for r in ratios]
    metrics = trainer.step(rollout)
    assert 0 < sum(clipped) < sum(outside) < n
    assert metrics["policy/clip_fraction"] == pytest.approx(sum(clipped) / n)
    assert metrics["policy/out_of_range_fraction"] == pytest.approx(sum(outside) / n)
    # Float32 log-probs differ from the float64 ones by about 1e-6.
    assert metrics["policy/entropy"] == pytest.approx(sum(entropies) / n, abs=1e-5)  # of the policy that sampled
    assert metrics["policy/ratio_mean"] == pytest.approx(sum(ratios) / n, abs=1e-5)
    approx_kl = sum(math.exp(x) - 1 - x for x in log_ratios) / n
    assert metrics["policy/approx_kl"] == pytest.approx(approx_kl, abs=1e-5)
    assert metrics["policy/max_abs_log_ratio"] == pytest.approx(max(map(abs, log_ratios)), abs=1e-5)


def test_advantages_are_whitened_over_the_whole_rollout(make_trainer, prompts):
    trainer = make_trainer(num_minibatches=4, microbatch_tokens=1)
    rollout = trainer.rollout(prompts)
    seen: list[Experience] = []
    gradient = trainer.fixed.gradient

    def watched(model, rollout, old, microbatches, *rest, **settings):
        seen.append(old[[row for rows in microbatches for row in rows]])
        return gradient(model, rollout, old, microbatches, *rest, **settings)

    trainer.fixed = dataclasses.replace(trainer.fixed, gradient=watched)
    trainer.step(rollout)
    epoch = torch.cat([part.advantages[part.mask] for part in seen[:4]])
    assert epoch.mean() == pytest.approx(0, abs=1e-6)
    assert epoch.std(correction=0) == pytest.approx(1, abs=1e-4)
    # A minibatch by itself is not whitened: 8 responses of different scores in fours do not each have mean 0.
    assert max(abs(float(part.advantages[part.mask].mean())) for part in seen[:4]) > 0.01
    raw = make_trainer(normalize_advantages=False)
    rollout = raw.rollout(prompts)
    estimates = estimate(rollout, shape_rewards(rollout, raw.args, raw.kl_coef), raw.args)
    unwhitened = estimates.experience.advantages[rollout.mask]
    assert unwhitened.std(correction=0) == pytest.approx(estimates.metrics["advantage/std"], rel=1e-5)


def test_the_end_of_text_action_is_learned_with_pad_equal_to_eos(make_trainer, tokenizer, make_model, prompts):
    """Fault 4: the log-prob of stopping has a policy gradient, so a model can learn to stop."""
    tokenizer.pad_token = tokenizer.eos_token
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[0] *= 0
        model.lm_head.weight[0] += 0.3
    trainer = make_trainer(model=model, stop_token_ids=None, vf_coef=0.0, max_new_tokens=16)
    assert trainer.stop_token_ids == (0,)
    rollout = trainer.rollout(prompts)
    ends = rollout.mask & (rollout.response_ids == 0)
    assert ends.any() and torch.equal(ends.any(dim=1), rollout.finished)
    old = estimate(rollout, shape_rewards(rollout, trainer.args, trainer.kl_coef), trainer.args).experience
    assert old.mask[ends].all() and (old.advantages[ends] != 0).any()
    new = trainer.model(rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.mask)
    new.logprobs.retain_grad()
    ppo_loss(new, old, trainer.args).total.backward()
    assert new.logprobs.grad is not None
    assert (new.logprobs.grad[ends][old.advantages[ends] != 0] != 0).all()
    assert (new.logprobs.grad[~rollout.mask] == 0).all()


def test_an_unscored_response_trains_nothing(make_trainer, prompts):
    """None for one response of eight: the gradient equals that of the other seven without it."""

    def without_third(prompts, completions, **_):
        return [None if prompt == "a" else float(len(prompt)) for prompt in prompts]

    trainer = make_trainer(reward_funcs=without_third, ent_coef=0.1)
    rollout = trainer.rollout(prompts)
    assert rollout.scored.tolist() == [True, True, False, True, True, True, True, True]
    all_eight = estimate(rollout, shape_rewards(rollout, trainer.args, trainer.kl_coef), trainer.args)
    trainer.fixed.minibatch_gradient(trainer.model, rollout, all_eight.experience, list(range(8)), trainer.args)
    masked = gradients(trainer)
    trainer.optimizer.zero_grad()

    keep = torch.tensor([0, 1, 3, 4, 5, 6, 7])
    tensors = {name: x[keep] for name, x in vars(rollout).items() if isinstance(x, torch.Tensor)}
    rest = dataclasses.replace(rollout, prompts=[p for p in prompts if p != "a"], score_parts={}, **tensors)
    seven = estimate(rest, shape_rewards(rest, trainer.args, trainer.kl_coef), trainer.args)
    assert vars(seven.value_scale) == pytest.approx(vars(all_eight.value_scale))
    trainer.fixed.minibatch_gradient(trainer.model, rest, seven.experience, list(range(7)), trainer.args)
    for a, b in zip(masked, gradients(trainer), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)  # float32 sums in another order
    metrics = all_eight.metrics
    assert metrics["score/unscored_fraction"] == pytest.approx(1 / 8)
    # Lengths of the other seven prompts: 9 + 7 + 11 + 8 + 4 + 2 + 10 = 51.
    assert metrics["score/mean"] == pytest.approx(51 / 7)


def test_target_kl_stops_the_epochs(make_trainer, prompts):
    settings = {"num_epochs": 6, "num_minibatches": 1, "learning_rate": 0.01}
    free = make_trainer(**settings)
    assert free.step(free.rollout(prompts))["optim/epochs"] == 6
    held = make_trainer(**settings, target_kl=1e-4)
    steps = count_steps(held)
    metrics = held.step(held.rollout(prompts))
    # Epoch 1 starts at KL 0 and steps; epoch 2 finds the KL of that step beyond 1.5e-4 and stops before another.
    assert metrics["optim/epochs"] == 2
    assert len(steps) == metrics["progress/optimizer_steps"] == 1


def test_a_non_finite_gradient_is_skipped_and_counted(make_trainer, prompts):
    """Fault 18: the optimizer never sees it; when no step is left the run stops."""
    trainer = make_trainer(num_epochs=1, num_minibatches=4)
    rollout = trainer.rollout(prompts)
    weights = [[p.detach().clone() for p in trainer.model.parameters()]]
    trainer.optimizer.register_step_post_hook(
        lambda *_: weights.append([p.detach().clone() for p in trainer.model.parameters()])
    )
    gradient, calls = trainer.fixed.gradient, iter(range(100))

    def poisoned(*inputs, **settings):
        result = gradient(*inputs, **settings)
        if next(calls) == 1:
            trainer.model.trainable_parameters()[0].grad.fill_(float("nan"))
        return result

    trainer.fixed = dataclasses.replace(trainer.fixed, gradient=poisoned)
    metrics = trainer.step(rollout)
    assert metrics["optim/skipped_steps"] == 1
    moved = [any(not torch.equal(x, y) for x, y in zip(a, b, strict=True)) for a, b in pairwise(weights)]
    assert moved == [True, False, True, True]
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {3}
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert all(math.isfinite(value) for value in metrics.values())

    hopeless = make_trainer(
        num_epochs=1, max_skipped_steps=2, reward_funcs=lambda p, c, **_: [1e30 * i for i in range(len(p))]
    )
    before = [p.detach().clone() for p in hopeless.model.parameters()]
    with pytest.raises(NonFiniteGradientError, match="extreme rewards"):
        hopeless.step(hopeless.rollout(prompts))
    assert all(torch.equal(a, b) for a, b in zip(before, hopeless.model.parameters(), strict=True))


def test_a_rollout_without_scores_is_refused(make_trainer, prompts):
    trainer = make_trainer()
    bare = dataclasses.replace(trainer.rollout(prompts), scores=None)
    with pytest.raises(ValueError, match=r"trainer\.rollout"):
        trainer.step(bare)
