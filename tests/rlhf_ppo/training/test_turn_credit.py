"""Turn-level credit: one action per turn, by hand, and the same as token-level credit where turns are tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import Experience
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.training.advantages import to_tokens, to_turns
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.rewards import shape_rewards

# Row 0: a turn of two tokens, a reply of one, a turn of one. Row 1: one turn of two tokens.
MASK = torch.tensor([[True, True, False, True], [True, True, False, False]])
TURNS = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]])
REWARDS = torch.tensor([[1.0, 2.0, float("nan"), 4.0], [5.0, 6.0, float("inf"), 0.0]])
VALUES = torch.tensor([[0.5, 9.0, float("nan"), 1.5], [2.0, 9.0, 0.0, 0.0]])


def written(mask=MASK, turns=TURNS, values=VALUES) -> Rollout:
    """Rewards come as a KL of nothing and a score; per-token ones are put in as the reference's log-probs."""
    return Rollout(
        prompts=["a", "b"],
        columns={},
        prompt_ids=torch.ones(2, 1, dtype=torch.long),
        prompt_mask=torch.ones(2, 1, dtype=torch.bool),
        response_ids=torch.zeros(2, 4, dtype=torch.long),
        mask=mask,
        finished=torch.tensor([True, True]),
        entropy=torch.zeros(2, 4),
        logprobs=torch.zeros(2, 4),
        values=values,
        completions=["", ""],
        ref_logprobs=torch.where(mask, REWARDS, 0),  # kl_coef 1: reward = -(0 - ref)
        scores=torch.zeros(2),
        scored=torch.tensor([True, True]),
        environment=torch.tensor([[False, False, True, False], [False] * 4]),
        turns=turns,
        context_full=torch.tensor([False, False]),
    )


@pytest.fixture
def args(make_trainer):
    def make(**settings):
        both = {
            "respond": lambda messages: None,
            "max_turns": 2,
            "normalize_advantages": False,
            "normalize_values": False,
            "kl_coef": 1.0,
        }
        return make_trainer(**{**both, "turn_credit": "turn", **settings}).args

    return make


def test_turns_by_hand():
    rewards, values, taken = to_turns(REWARDS, VALUES, TURNS, MASK)
    assert rewards.tolist() == [[3.0, 4.0], [11.0, 0.0]]
    # The critic before the first token of each turn; what it says further in, or at a reply, is not asked for.
    assert values.tolist() == [[0.5, 1.5], [2.0, 0.0]]
    assert taken.tolist() == [[True, True], [True, False]]
    # A conversation that is left out took no turn.
    nobody = torch.zeros_like(MASK)
    assert not to_turns(REWARDS, VALUES, TURNS, nobody)[2].any()
    assert to_tokens(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), TURNS, MASK).tolist() == [[1, 1, 0, 2], [3, 3, 0, 0]]


def estimated(rollout: Rollout, args: RLHFConfig) -> Experience:
    return estimate(rollout, shape_rewards(rollout, args, 1.0), args).experience


def test_advantages_and_returns_by_hand(args):
    """gamma_turn 0.5, lambda 0.8.

    Row 0: delta_1 = 4 - 1.5 = 2.5; delta_0 = 3 + 0.5 * 1.5 - 0.5 = 3.25; A_1 = 2.5; A_0 = 3.25 + 0.4 * 2.5 = 4.25.
    Returns A + V: 4.75 and 4. Row 1: A = 11 - 2 = 9, return 11. Every token of a turn has the turn's.
    """
    old = estimated(written(), args(gamma_turn=0.5, gae_lambda=0.8))
    torch.testing.assert_close(old.advantages, torch.tensor([[4.25, 4.25, 0, 2.5], [9, 9, 0, 0]]))
    torch.testing.assert_close(old.returns, torch.tensor([[4.75, 4.75, 0, 4.0], [11, 11, 0, 0]]))


def test_turns_of_one_token_are_token_credit(args):
    """Then both count the same actions, and gamma_turn is gamma."""
    mask = torch.tensor([[True, False, True, True], [True, False, False, False]])
    rollout = written(mask, torch.tensor([[0, 0, 1, 2], [0, 0, 0, 0]]), torch.where(mask, VALUES.nan_to_num(3.0), 0))
    rollout = dataclasses.replace(rollout, ref_logprobs=torch.where(mask, REWARDS.nan_to_num(7.0), 0))
    by_turn = estimated(rollout, args(gamma_turn=0.9, gae_lambda=0.7))
    by_token = estimated(rollout, args(turn_credit="token", gamma=0.9, gae_lambda=0.7))
    torch.testing.assert_close(by_turn.advantages, by_token.advantages)
    torch.testing.assert_close(by_turn.returns, by_token.returns)


def test_an_unscored_conversation_has_no_turn(args):
    rollout = dataclasses.replace(written(), scored=torch.tensor([True, False]))
    old = estimated(rollout, args())
    assert not old.mask[1].any() and (old.advantages[1] == 0).all() and (old.returns[1] == 0).all()


@pytest.mark.parametrize("objective", ["clip", "reinforce"])
def test_a_whole_update_by_turns(make_trainer, prompts, objective):
    trainer = make_trainer(
        respond=lambda messages: " and", max_turns=3, turn_credit="turn", gamma_turn=0.9, objective=objective
    )
    rollout = trainer.rollout(prompts)
    old = estimate(rollout, shape_rewards(rollout, trainer.args, 0.05), trainer.args).experience
    for row in range(len(prompts)):
        for turn in range(3):
            spread = old.advantages[row][rollout.mask[row] & (rollout.turns[row] == turn)]
            assert (spread == spread[0]).all()
    assert trainer.step(rollout)["policy/first_minibatch_max_abs_log_ratio"] < 1e-5
