"""From scores to advantages: where the score lands, what is subtracted, and which value is next."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import Experience
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.trainer import PPOTrainer
from rlhf_ppo.training import experience
from rlhf_ppo.training.advantages import next_decisions
from rlhf_ppo.training.rewards import shape_rewards
from rlhf_ppo.training.update import Update, adapt


def written_rollout(**changes) -> Rollout:
    """Two responses of 3 and 2 tokens, with round numbers everywhere."""
    rollout = Rollout(
        prompts=["a", "b"],
        columns={},
        prompt_ids=torch.tensor([[3], [4]]),
        prompt_mask=torch.ones(2, 1, dtype=torch.bool),
        response_ids=torch.tensor([[5, 6, 7], [8, 0, 0]]),
        mask=torch.tensor([[True, True, True], [True, True, False]]),
        finished=torch.tensor([False, True]),
        entropy=torch.ones(2, 3),
        logprobs=torch.tensor([[-1.0, -2.0, -1.0], [-1.0, -1.0, 0.0]]),
        values=torch.tensor([[0.5, 1.0, 2.0], [1.0, 0.5, 0.0]]),
        completions=["cde", "f"],
        ref_logprobs=torch.tensor([[-2.0, -1.0, -3.0], [-1.0, -2.0, 0.0]]),
        scores=torch.tensor([10.0, 4.0]),
        scored=torch.tensor([True, True]),
        score_parts={"early_letters": [10.0, 4.0]},
    )
    return dataclasses.replace(rollout, **changes)


def estimated(rollout: Rollout, args: RLHFConfig, kl_coef: float) -> tuple[Experience, dict[str, float]]:
    estimates = experience.estimate(rollout, shape_rewards(rollout, args, kl_coef), args)
    return estimates.experience, estimates.metrics


def updated(reference_kl: float) -> Update:
    """An update on two responses."""
    metrics = {"kl/reference_nats_per_response": reference_kl}
    return Update(metrics, num_responses=2, last_epoch_kl=0.0, moves_controllers=True, problem=None)


@pytest.fixture
def estimate(make_trainer):
    """Advantages and metrics of a written rollout under some settings; undiscounted, raw and in the reward's units."""

    def run(rollout: Rollout, **settings):
        base = {
            "gamma": 1.0,
            "gae_lambda": 1.0,
            "kl_coef": 0.5,
            "normalize_advantages": False,
            "normalize_values": False,
        }
        trainer: PPOTrainer = make_trainer(**{**base, **settings})
        return estimated(rollout, trainer.args, trainer.kl_coef)

    return run


def test_monte_carlo_advantages_by_hand(estimate):
    """The score sits on the last real token, the KL cost on each one.

    k1 is (1, -1, 2) and (0, 1); times -0.5: (-0.5, 0.5, -1) and (0, -0.5); the scores make the last ones 9 and 3.5.
    Sums to the end: (9, 9.5, 9) and (3.5, 3.5); minus the values: (8.5, 8.5, 7) and (2.5, 3).
    """
    old, metrics = estimate(written_rollout())
    torch.testing.assert_close(old.advantages, torch.tensor([[8.5, 8.5, 7.0], [2.5, 3.0, 0.0]]))
    torch.testing.assert_close(old.returns, torch.tensor([[9.0, 9.5, 9.0], [3.5, 3.5, 0.0]]))
    assert metrics["reward/mean_per_response"] == pytest.approx((9 + 3.5) / 2)
    # k1 summed over each response: 2 and 1 nats.
    assert metrics["kl/reference_nats_per_response"] == pytest.approx(1.5)
    assert metrics["score/mean"] == 7


def test_gae_by_hand(estimate):
    """gamma 0.5, lambda 0.5, no KL cost: delta_t = r_t + V_{t+1} / 2 - V_t, A_t = delta_t + A_{t+1} / 4.

    Row 0: deltas (0.5 - 0.5, 1 - 1, 10 - 2) = (0, 0, 8); A = (0.5, 2, 8).
    Row 1: deltas (0.25 - 1, 4 - 0.5) = (-0.75, 3.5); A = (-0.75 + 0.875, 3.5) = (0.125, 3.5).
    """
    old, _ = estimate(written_rollout(), gamma=0.5, gae_lambda=0.5, kl_coef=0.0)
    torch.testing.assert_close(old.advantages, torch.tensor([[0.5, 2.0, 8.0], [0.125, 3.5, 0.0]]))


@pytest.mark.parametrize(
    ("estimator", "cost"),
    # log-ratios of row 0 are (1, -1, 2), of row 1 (0, 1). k2 is half their squares: 3 and 0.5.
    # k3 is exp(-x) - 1 + x: (e^-1, e - 2, e^-2 + 1) sums to 2.2215, and (0, e^-1) to 0.3679.
    [("k1", (2.0, 1.0)), ("k2", (3.0, 0.5)), ("k3", (2.22150, 0.36788))],
)
def test_the_kl_estimator_of_the_rewards_is_a_setting(estimate, estimator, cost):
    _, metrics = estimate(written_rollout(), kl_estimator=estimator, kl_coef=1.0)
    assert metrics["reward/mean_per_response"] == pytest.approx((10 - cost[0] + 4 - cost[1]) / 2, abs=1e-4)
    # What is logged stays k1.
    assert metrics["kl/reference_nats_per_response"] == pytest.approx(1.5)


def test_zeros_are_numbers_and_not_missing(estimate):
    old, metrics = estimate(written_rollout(scores=torch.zeros(2)), kl_coef=0.0)
    # No score and no cost: what is left of the advantages is minus the values.
    torch.testing.assert_close(old.advantages, torch.tensor([[-0.5, -1.0, -2.0], [-1.0, -0.5, 0.0]]))
    assert metrics["kl/coef"] == 0 and metrics["score/mean"] == 0
    assert metrics["score/unscored_fraction"] == 0


def test_a_score_of_zero_is_scored(make_trainer, prompts):
    trainer = make_trainer(reward_funcs=lambda p, c, **_: [0.0, *[1.0] * 7])
    rollout = trainer.rollout(prompts)
    assert rollout.scored.all()
    assert rollout.scores.tolist() == [0.0, *[1.0] * 7]


def test_the_missing_eos_penalty_lowers_only_responses_that_ran_into_the_limit(estimate):
    with_penalty, metrics = estimate(written_rollout(), missing_eos_penalty=3.0, kl_coef=0.0)
    without, _ = estimate(written_rollout(), kl_coef=0.0)
    difference = without.advantages - with_penalty.advantages
    # Row 0 did not finish: Monte Carlo carries the 3 to each of its tokens. Row 1 did.
    torch.testing.assert_close(difference, torch.tensor([[3.0, 3.0, 3.0], [0.0, 0.0, 0.0]]))
    assert metrics["score/mean"] == 7  # the raw scores


def test_fault_5_the_penalty_follows_the_stop_tokens_in_use(make_trainer, prompts):
    """The stop tokens are all letters but a and b, so end of text (id 0), a and b are tokens like any other."""
    trainer = make_trainer(
        stop_token_ids=tuple(range(5, 30)),
        max_new_tokens=2,
        kl_coef=0.0,
        gae_lambda=1.0,
        normalize_advantages=False,
        normalize_values=False,  # a fresh critic would predict the mean return, which the penalty lowers
    )
    rollout = trainer.rollout(prompts)
    last = rollout.response_ids.gather(1, rollout.lengths[:, None] - 1).squeeze(1)
    assert torch.equal(rollout.finished, last >= 5)
    # One that ran into the limit although id 0 is in it, and one that was stopped without it.
    rollout = dataclasses.replace(
        rollout,
        response_ids=torch.tensor([[3, 0], [4, 6]] * 4),
        mask=torch.ones(8, 2, dtype=torch.bool),
        finished=torch.tensor([False, True] * 4),
        logprobs=torch.zeros(8, 2),
        values=torch.zeros(8, 2),
        ref_logprobs=torch.zeros(8, 2),
    )
    plain, _ = estimated(rollout, trainer.args, trainer.kl_coef)
    with_penalty = dataclasses.replace(trainer.args, missing_eos_penalty=5.0)
    penalised, _ = estimated(rollout, with_penalty, trainer.kl_coef)
    assert (plain.advantages - penalised.advantages).tolist() == [[5.0, 5.0], [0.0, 0.0]] * 4


def test_a_penalty_without_any_stop_token_is_refused(make_trainer, make_model, tokenizer):
    model = make_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"missing_eos_penalty=1\.0 needs a stop token.*set stop_token_ids"):
        make_trainer(model=model, missing_eos_penalty=1.0, stop_token_ids=None)


def test_next_decisions_skips_masked_steps_and_closes_at_the_last():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, float("nan"), 7.0, float("nan")], [1.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    following, terminated = next_decisions(values, mask)
    assert terminated.int().tolist() == [[0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert following[0].tolist() == [2, 3, 4, 0]
    # Step 0 of row 1 is followed by step 2; the tool token between them is not a state of the policy.
    assert following[1, 0] == 7 and following[1, 2] == 0
    assert (following[2] == 0).all()


def test_several_rewards_are_weighted_and_logged_apart(make_trainer, prompts):
    def one(prompts, completions, **_):
        return [1.0] * len(prompts)

    def length(prompts, completions, **_):
        return [len(prompt) for prompt in prompts]

    trainer = make_trainer(reward_funcs=[one, length, length], reward_weights=(10.0, 0.5, -1.0))
    rollout = trainer.rollout(prompts)
    # 10 * 1 + (0.5 - 1) * len(prompt)
    assert rollout.scores.tolist() == [10 - 0.5 * len(prompt) for prompt in prompts]
    metrics = trainer.step(rollout)
    mean_length = sum(map(len, prompts)) / 8
    assert metrics["score/part/one"] == 1
    assert metrics["score/part/length"] == metrics["score/part/length_3"] == pytest.approx(mean_length)
    with pytest.raises(ValueError, match="2 weights for 1 reward"):
        make_trainer(reward_weights=(1.0, 1.0))
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        make_trainer(reward_funcs=[])


def test_an_unscored_part_leaves_the_response_out(make_trainer, prompts):
    trainer = make_trainer(
        reward_funcs=[lambda p, c, **_: [1.0, None, *range(6)], lambda p, c, **_: [None, 2.0, *range(6)]]
    )
    assert trainer.rollout(prompts).scored.tolist() == [False, False, *[True] * 6]


def test_the_kl_coefficient_adapts_to_nats_per_response(estimate, make_trainer, prompts):
    """Target 1 nat a response, 1.5 seen: the error is clipped to 0.2, and 2 responses of 20 make it 0.02."""
    trainer = make_trainer(kl_coef=0.5, kl_target=1.0, kl_horizon=20.0, learning_rate=0.0, max_initial_log_ratio=99.0)
    adapt(trainer.state, trainer.args, updated(reference_kl=1.5))
    assert trainer.kl_coef == pytest.approx(0.5 * 1.02)
    _, metrics = estimated(written_rollout(), trainer.args, trainer.kl_coef)
    assert metrics["kl/coef"] == pytest.approx(0.51)
    # One real step with the reference at 0 nats: the error is -0.2, and 8 responses of 20 make it -0.08.
    trainer.step(trainer.rollout(prompts))
    assert trainer.kl_coef == pytest.approx(0.51 * 0.92)
    fixed = make_trainer(kl_coef=0.5)
    adapt(fixed.state, fixed.args, updated(reference_kl=100.0))
    assert fixed.kl_coef == 0.5


def test_the_controller_is_fed_the_sum_over_a_response(make_trainer, prompts):
    """Per token the KL of this pair is far below the target, per response above it: the coefficient must rise."""
    trainer = make_trainer(kl_target=2.0, kl_horizon=8.0, learning_rate=0.0, num_minibatches=1, num_epochs=1)
    rollout = trainer.rollout(prompts)
    ref = torch.where(rollout.mask, rollout.logprobs - 1.0, 0.0)  # 1 nat a token
    rollout = dataclasses.replace(rollout, ref_logprobs=ref)
    lengths = rollout.lengths.float().mean()
    assert lengths > 2.5
    metrics = trainer.step(rollout)
    assert metrics["kl/reference_nats_per_response"] == pytest.approx(float(lengths))
    assert trainer.kl_coef == pytest.approx(0.05 * 1.2)
