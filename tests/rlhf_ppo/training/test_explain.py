"""A rollout token by token: what is shown is what the update computes."""

from __future__ import annotations

import pytest
import torch

from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.rewards import shape_rewards


def test_tokens_are_explained_by_the_updates_own_numbers(make_trainer, prompts, wake_critic, tokenizer, tmp_path):
    trainer = make_trainer(gamma=0.9, learning_rate=0.1)
    wake_critic(trainer.model)
    rollout = trainer.rollout(prompts)
    old = estimate(rollout, shape_rewards(rollout, trainer.args, trainer.kl_coef), trainer.args).experience
    rows = trainer.explain(rollout).rows
    real = rollout.mask.nonzero().tolist()
    assert [(row["sequence"], row["step"]) for row in rows] == [tuple(place) for place in real]
    assert rows[0]["label"] == repr(tokenizer.decode([int(rollout.response_ids[0, 0])]))
    torch.testing.assert_close(torch.tensor([row["weight"] for row in rows]), old.advantages[rollout.mask])
    # In the reward's units, whatever the critic's are.
    torch.testing.assert_close(torch.tensor([row["value"] for row in rows]), rollout.values[rollout.mask])
    # A_t = delta_t + gamma lambda A_{t+1}; the last token of a response has delta alone.
    decay = trainer.args.gamma * trainer.args.gae_lambda
    for row, following in zip(rows, [*rows[1:], rows[0]], strict=True):
        rest = 0 if row["ended"] else decay * following["advantage"]
        assert row["advantage"] == pytest.approx(row["delta"] + rest, abs=1e-4)
        assert row["ratio"] == pytest.approx(1, abs=1e-4) and row["clipped"] == ""
    assert sum(row["ended"] == "terminated" for row in rows) == len(prompts)

    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    trainer.explain(rollout)
    assert all(torch.equal(x, before[name]) for name, x in trainer.model.state_dict().items())
    trainer.step(rollout)
    moved = trainer.explain(rollout)
    assert any(row["clipped"] for row in moved.rows) and any(not row["gradient_alive"] for row in moved.rows)
    assert moved.plot(tmp_path / "response.png", sequence=3).exists()


def test_groups_have_advantages_but_no_values(make_trainer, prompts):
    trainer = make_trainer(advantage_estimator="rloo", num_generations=2)
    rows = trainer.explain(trainer.rollout(prompts[:4])).rows
    assert all(row["value"] is None and row["delta"] is None for row in rows)
    assert any(row["advantage"] for row in rows)


def test_explaining_normalised_scores_changes_no_statistic(make_trainer, prompts):
    trainer = make_trainer(normalize_scores=True)
    rollout = trainer.rollout(prompts)
    trainer.explain(rollout)
    assert not trainer.score_statistics.moments
