"""An update's minibatches: every decision once per epoch."""

from __future__ import annotations

import torch

from classic.networks.actor_critic import Decisions
from classic.update import shuffled_minibatches
from rlhf_ppo.core import Experience


def test_an_epoch_is_every_decision_once_with_its_own_values():
    number = torch.arange(11, dtype=torch.float32)
    old = Experience(-number, number, number, number + 1, torch.ones(11, dtype=torch.bool))
    generator = torch.Generator().manual_seed(0)
    decisions = Decisions(old.values[:, None] * 10, old.values.long())
    parts = list(shuffled_minibatches(decisions, old, 3, generator))
    assert [len(taken) for taken, _ in parts] == [4, 4, 3]
    seen = torch.cat([part.values for _, part in parts])
    assert seen.tolist() != list(range(11)) and sorted(seen.tolist()) == list(range(11))
    for taken, part in parts:
        assert torch.equal(taken.observations[:, 0], part.values * 10)
        assert torch.equal(taken.actions, part.values.long())
        assert torch.equal(part.logprobs, -part.values) and torch.equal(part.returns, part.values + 1)
    again = list(shuffled_minibatches(decisions, old, 3, generator))
    assert not torch.equal(torch.cat([part.values for _, part in again]), seen)
