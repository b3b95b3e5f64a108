"""An update's metrics: averages over all minibatches, and over those with an optimizer step."""

from __future__ import annotations

import pytest
import torch

from classic.report import UpdateRecord
from rlhf_ppo.core import Experience, PolicyOutput, PPOConfig, ppo_diagnostics, ppo_loss


def experience(size: int) -> Experience:
    number = torch.arange(size, dtype=torch.float32)
    return Experience(-number, number, number - size / 2, number + 1, torch.ones(size, dtype=torch.bool))


def test_numbers_are_averages_over_decisions_whatever_the_minibatches():
    old, config = experience(10), PPOConfig(clip_range_vf=2.0)
    draw = torch.Generator().manual_seed(0)
    moved, values = 0.3 * torch.randn(10, generator=draw), old.returns + torch.randn(10, generator=draw)
    new = PolicyOutput((old.logprobs + moved).requires_grad_(), values, torch.rand(10, generator=draw))
    record, expected = UpdateRecord(), {"policy/loss": 0.0, "value/loss": 0.0}
    for rows, share, norm in ((slice(0, 7), 0.7, 5.0), (slice(7, 10), 0.3, 10.0)):
        part = PolicyOutput(new.logprobs[rows], values[rows], new.entropy[rows])
        record.add(part, old[rows])
        record.stepped(norm)
        loss = ppo_loss(part, old[rows], config)
        expected["policy/loss"] += share * loss.policy.item()
        expected["value/loss"] += share * loss.value.item()
    metrics = record.metrics(config)
    for name, value in ppo_diagnostics(new, old, config).items():
        assert metrics[f"policy/{name}"] == pytest.approx(float(value))
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["optim/grad_norm"] == pytest.approx(6.5)  # 7 decisions at 5 and 3 at 10
    first = (new.logprobs - old.logprobs)[:7].abs().max().item()
    assert metrics["policy/first_minibatch_max_abs_log_ratio"] == pytest.approx(first)


def test_a_minibatch_that_stopped_the_update_counts_for_ratios_but_not_for_losses():
    old = experience(6)
    record, stepped = UpdateRecord(), UpdateRecord()
    for rows, factor in ((slice(0, 3), 1.01), (slice(3, 6), 1.5)):
        new = PolicyOutput(old.logprobs[rows] * factor, old.values[rows])
        record.add(new, old[rows])
        if factor < 1.5:
            stepped.add(new, old[rows])
            record.stepped(1.0)
            stepped.stepped(1.0)
    both, alone = record.metrics(PPOConfig()), stepped.metrics(PPOConfig())
    assert both["policy/loss"] == alone["policy/loss"] and both["value/loss"] == alone["value/loss"]
    assert both["policy/approx_kl"] > alone["policy/approx_kl"]


def test_an_update_without_a_step_has_no_losses():
    old = experience(4)
    record = UpdateRecord()
    record.add(PolicyOutput(old.logprobs), old)
    metrics = record.metrics(PPOConfig())
    assert "policy/loss" not in metrics and "policy/entropy" not in metrics
    assert metrics["policy/approx_kl"] == 0


@pytest.mark.parametrize("bad", [[0], [1], [2], [0, 1], [1, 2]])
def test_non_finite_minibatches_are_in_no_average(bad):
    old = experience(9)
    parts = [slice(0, 3), slice(3, 6), slice(6, 9)]
    record, sound = UpdateRecord(), UpdateRecord()
    for i, rows in enumerate(parts):
        record.add(PolicyOutput(old.logprobs[rows] * (float("nan") if i in bad else 1.01)), old[rows])
        if i in bad:
            record.drop()
        else:
            sound.add(PolicyOutput(old.logprobs[rows] * 1.01), old[rows])
    assert record.metrics(PPOConfig()) == sound.metrics(PPOConfig())
