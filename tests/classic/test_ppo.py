"""The loop: what it learns, how many steps it takes, what the metrics mean, and one seed gives one result."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import classic
from classic.fast.analytic_gradients import AnalyticGradients
from classic.update import shuffled_minibatches
from rlhf_ppo.core.config import OBJECTIVES
from rlhf_ppo.runtime.logs.run_directory import RunDirectory
from rlhf_ppo.runtime.machine.threads import torch_threads


def log_of(folder):
    return RunDirectory(folder).read()


@pytest.fixture
def minibatches(monkeypatch):
    """Every minibatch that is learned from, as (decisions, old)."""
    seen, shuffled = [], shuffled_minibatches

    def watched(*args):
        for taken, part in shuffled(*args):
            seen.append((taken, part))
            yield taken, part

    monkeypatch.setattr("classic.update.shuffled_minibatches", watched)
    return seen


@pytest.mark.parametrize("mode", ["next_step", "same_step"])
def test_infinite_chain_with_a_time_limit_is_worth_one_over_one_minus_gamma(mode, small):
    """Reward 1 for ever, cut every 8 steps: V = 1 / (1 - 0.98) = 50. Merged flags would give about 4.4."""
    args = small(
        autoreset_mode=mode,
        gamma=0.98,
        learning_rate=3e-2,
        num_epochs=8,
        num_minibatches=1,
        max_grad_norm=100.0,
        normalize_values=False,  # else the critic would start from the answer
    )
    agent = classic.PPO("tests/Chain-v0", args).learn(5_000)
    value = agent.network.values(torch.ones(1, 1)).item()
    assert value == pytest.approx(50, abs=1)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_learns_to_match(objective, small, learning_seed):
    """A random policy earns 2.5 of 5."""
    args = small(
        objective=objective,
        target_kl=0.02 if objective in ("penalty", "adaptive_clip") else None,
        num_epochs=1 if objective in ("a2c", "reinforce") else 2,
        gamma=0.5,
        learning_rate=1e-2,
        seed=learning_seed,
    )
    agent = classic.PPO("tests/Match-v0", args)
    before = agent.evaluate(episodes=50, deterministic=False)["mean_return"]
    agent.learn(3_000)
    after = agent.evaluate(episodes=50, deterministic=False)["mean_return"]
    assert before < 3.2
    assert after > 4.3


def test_a_policy_learns_from_pixels(small, learning_seed):
    """A random policy earns 2.5 of 5."""
    agent = classic.PPO("tests/Side-v0", small(num_steps=32, learning_rate=5e-4, seed=learning_seed)).learn(400)
    assert agent.evaluate(episodes=10)["mean_return"] > 4.5


def test_continuous_actions_learn_to_aim(small, learning_seed):
    """A policy at 0 with standard deviation 1 earns about -4; the best action is 0.5."""
    agent = classic.PPO("tests/Aim-v0", small(gamma=0.5, learning_rate=2e-2, seed=learning_seed)).learn(5_000)
    action, state = agent.predict([0.0])
    assert action.shape == (1,) and state is None
    assert action[0] == pytest.approx(0.5, abs=0.1)
    assert agent.evaluate(episodes=4)["mean_return"] > -0.1


def test_cartpole_gets_better_within_seconds(learning_seed):
    """A random policy balances for about 22 steps."""
    agent = classic.PPO("CartPole-v1", classic.PPOArgs(seed=learning_seed, quiet=True)).learn(12_000)
    assert agent.evaluate(episodes=20)["mean_return"] > 150


def test_optimizer_steps_are_epochs_times_minibatches(small, tmp_path, monkeypatch):
    agent = classic.PPO("tests/Match-v0", small(num_epochs=3, num_minibatches=5, output_dir=str(tmp_path)))
    count, step = 0, agent.optimizer.step

    def counted():
        nonlocal count
        count += 1
        return step()

    monkeypatch.setattr(agent.optimizer, "step", counted)
    agent.learn(150)
    rows = log_of(tmp_path)
    assert count == len(rows) * 3 * 5 == rows[-1]["progress/optimizer_steps"]


def test_reset_steps_count_neither_as_steps_nor_in_the_loss(small, tmp_path, minibatches):
    """Clock plays 4 decisions and 1 reset: of 20 columns 16 are decisions."""
    agent = classic.PPO("tests/Clock-v0", small(num_envs=1, num_steps=20, num_minibatches=1, output_dir=str(tmp_path)))
    agent.learn(1)
    assert agent.counters["env_steps"] == 16
    assert [len(taken) for taken, _ in minibatches] == [16, 16]
    assert log_of(tmp_path)[0]["progress/env_steps"] == 16


@pytest.mark.parametrize(("mode", "num_steps"), [("next_step", 20), ("same_step", 16)])
def test_the_loop_lets_nothing_leak_from_one_episode_into_another(mode, num_steps, small, minibatches):
    """With a critic that says 0, lambda 1 makes each return the discounted sum to the end of its own episode.

    Clock's rewards are 0.5 * t + episode; episodes terminate and are truncated by turns.
    """
    settings = {"num_envs": 1, "num_steps": num_steps, "num_minibatches": 1, "num_epochs": 1, "autoreset_mode": mode}
    settings["normalize_values"] = False
    agent = classic.PPO("tests/Clock-v0", small(gamma=0.9, gae_lambda=1.0, learning_rate=0.0, **settings))
    for parameter in agent.network.critic.parameters():
        parameter.data.zero_()
    agent.learn(1)
    expected = []
    for episode in range(4):
        rewards = [0.5 * t + episode for t in (1, 2, 3, 4)]
        expected += [sum(0.9**k * r for k, r in enumerate(rewards[t:])) for t in range(4)]
    ((_, old),) = minibatches
    assert sorted(old.returns.tolist()) == pytest.approx(sorted(expected))


def test_gradients_are_clipped(small, monkeypatch):
    agent = classic.PPO("tests/Match-v0", small(max_grad_norm=0.01))
    norms, step = [], agent.optimizer.step

    def measured():
        gradients = [p.grad for p in agent.network.parameters() if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return step()

    monkeypatch.setattr(agent.optimizer, "step", measured)
    agent.learn(200)
    assert norms and max(norms) <= 0.01 * (1 + 1e-5)
    assert max(norms) > 0.005


def test_learning_rate_0_keeps_the_ratio_at_1(small, tmp_path):
    args = small(learning_rate=0.0, num_minibatches=7, normalize_values=False, output_dir=str(tmp_path))
    agent = classic.PPO("tests/Match-v0", args)
    before = {name: x.clone() for name, x in agent.network.state_dict().items()}
    agent.learn(200)
    for row in log_of(tmp_path):
        assert row["policy/max_abs_log_ratio"] < 1e-5
    assert all(torch.equal(x, before[name]) for name, x in agent.network.state_dict().items())


@pytest.mark.parametrize(("schedule", "last"), [("linear", 0.1), ("constant", 1.0)])
def test_the_learning_rate_schedule_runs_over_the_steps_asked_for(schedule, last, small, tmp_path):
    """SAME_STEP: 64 steps a rollout, 640 steps are 10 rollouts; the last begins after nine tenths."""
    args = small(lr_schedule=schedule, autoreset_mode="same_step", output_dir=str(tmp_path))
    agent = classic.PPO("tests/Match-v0", args).learn(640)
    rates = [row["optim/learning_rate"] / 3e-3 for row in log_of(tmp_path)]
    assert len(rates) == 10
    assert rates[0] == pytest.approx(1) and rates[-1] == pytest.approx(last)
    assert agent.optimizer.lr == pytest.approx(3e-3 * last)


def test_clip_range_and_entropy_bonus_follow_their_schedules(small, tmp_path, monkeypatch):
    """10 rollouts: the k-th begins after (k - 1) tenths."""
    args = small(
        clip_range_schedule="linear",
        ent_coef_schedule="linear",
        clip_range_high=0.4,
        ent_coef=0.01,
        autoreset_mode="same_step",
        output_dir=str(tmp_path),
    )
    agent = classic.PPO("tests/Match-v0", args)
    seen, backward = [], AnalyticGradients.backward

    def watched(self, new, old, config):
        seen.append(config)
        return backward(self, new, old, config)

    monkeypatch.setattr(AnalyticGradients, "backward", watched)
    agent.learn(640)
    assert [row["policy/clip_range"] for row in log_of(tmp_path)] == pytest.approx(
        [0.2 * k / 10 for k in range(10, 0, -1)]
    )
    assert seen[-1].clip_range_high == pytest.approx(0.04) and seen[-1].ent_coef == pytest.approx(0.001)


def test_recomputed_advantages_follow_the_critic_from_pass_to_pass(small, minibatches):
    """Returns move with the critic between two passes over one rollout; recorded log-probs do not."""
    for recompute in (False, True):
        agent = classic.PPO("tests/Clock-v0", small(recompute_advantages=recompute, num_minibatches=1, num_epochs=3))
        minibatches.clear()
        agent.learn(1)
        seen = [old for _, old in minibatches]
        sums = [float(old.returns.double().sum()) for old in seen]
        assert (max(sums) - min(sums) > 0.01) is recompute
        assert {round(float(old.logprobs.double().sum()), 3) for old in seen} == {
            round(float(seen[0].logprobs.double().sum()), 3)
        }


def test_target_kl_ends_the_update(small, tmp_path):
    free, held = tmp_path / "free", tmp_path / "held"
    settings = {"learning_rate": 3e-2, "num_epochs": 10}
    classic.PPO("tests/Match-v0", small(output_dir=str(free), **settings)).learn(500)
    classic.PPO("tests/Match-v0", small(output_dir=str(held), target_kl=0.005, **settings)).learn(500)
    assert all(row["optim/epochs"] == 10 for row in log_of(free))
    assert min(row["optim/epochs"] for row in log_of(held)) < 10
    assert max(row["policy/approx_kl"] for row in log_of(held)) < max(row["policy/approx_kl"] for row in log_of(free))


def test_adaptive_coefficients_move_once_per_update(small, tmp_path):
    """Either rule halves, doubles or keeps; learning rate 0 means a KL of 0, so beta halves and epsilon doubles."""
    for objective, key, start, expected in (
        ("penalty", "policy/penalty_beta", 1.0, [1.0, 0.5, 0.25]),
        ("adaptive_clip", "policy/clip_range", 0.1, [0.1, 0.2, 0.4]),
    ):
        folder = tmp_path / objective
        setting = {"penalty_beta": start} if objective == "penalty" else {"clip_range": start}
        args = small(objective=objective, target_kl=0.01, learning_rate=0.0, output_dir=str(folder), **setting)
        classic.PPO("tests/Match-v0", args).learn(160)
        assert [row[key] for row in log_of(folder)] == pytest.approx(expected)


def test_reinforce_learns_from_returns_and_its_critic_learns_too(small, minibatches):
    """Advantages are Monte Carlo returns: Clock's are all positive, a baseline would leave both signs."""
    raw = {"normalize_advantages": False, "normalize_values": False}
    agent = classic.PPO("tests/Clock-v0", small(objective="reinforce", num_epochs=1, **raw))
    before = agent.network.critic[0].weight.detach().clone()
    agent.learn(60)
    assert minibatches
    for _, old in minibatches:
        assert torch.equal(old.advantages, old.returns)
        assert (old.advantages > 0).all()
    assert not torch.equal(before, agent.network.critic[0].weight)


@pytest.mark.parametrize("env_id", ["tests/Match-v0", "tests/Aim-v0"])
def test_one_seed_gives_one_result_and_another_seed_another(env_id, small, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(3)  # the global generator must not matter
        agent = classic.PPO(env_id, small(seed=seed, output_dir=str(tmp_path / name)))
        agent.learn(300).evaluate(episodes=3)
    texts = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]


def test_evaluating_and_predicting_in_between_does_not_change_training(small, tmp_path):
    for name in ("plain", "watched"):
        agent = classic.PPO("tests/Match-v0", small(lr_schedule="constant", output_dir=str(tmp_path / name)))
        agent.learn(120)
        if name == "watched":
            agent.evaluate(episodes=3, deterministic=False)
            agent.predict([1.0], deterministic=False)
        agent.learn(120)
    assert (tmp_path / "plain/metrics.jsonl").read_bytes() == (tmp_path / "watched/metrics.jsonl").read_bytes()


def test_metrics_are_finite_and_the_curve_is_drawn(small, tmp_path, pictures):
    agent = classic.PPO("tests/Match-v0", small(output_dir=str(tmp_path)))
    agent.learn(500)
    rows = log_of(tmp_path)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert not any("second" in key or "time" in key for row in rows for key in row)
    # Before any learning two actions are nearly equally likely.
    assert rows[0]["policy/entropy"] == pytest.approx(math.log(2), abs=1e-2)
    assert rows[-1]["episode/length_mean"] == 5
    assert 0 <= rows[-1]["episode/return_mean"] <= 5
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_curve_that_cannot_be_drawn_ends_no_run(small, tmp_path, pictures):
    (tmp_path / "curve.png").mkdir()
    agent = classic.PPO("tests/Match-v0", small(output_dir=str(tmp_path)))
    with pytest.warns(UserWarning, match="curve.png could not be drawn"):
        agent.learn(500)
    assert (tmp_path / "report.html").is_file()


def test_non_finite_gradients_are_skipped_and_stop_the_run(small):
    agent = classic.PPO("tests/Match-v0", small(num_epochs=10))
    agent.network.critic[-1].weight.data.fill_(float("nan"))
    policy = [x.clone() for x in agent.network.policy.parameters()]
    with pytest.raises(classic.NonFiniteGradientError, match="'tests/Match-v0', iteration 1: 10 consecutive gradients"):
        agent.learn(500)
    assert all(torch.equal(x, y) for x, y in zip(policy, agent.network.policy.parameters(), strict=True))


@pytest.mark.parametrize("objective", ["clip", "a2c"])
def test_a_loss_that_overflows_while_its_gradient_does_not_is_skipped(objective, small, tmp_path, monkeypatch):
    """Returns of 1e20 are within float32, and so is V - R times a small weight; its square is not."""
    args = small(objective=objective, vf_coef=1e-6, output_dir=str(tmp_path), num_epochs=1)
    agent = classic.PPO("tests/Match-v0", args)
    shuffled = shuffled_minibatches

    def overflowing(*args):
        for i, (taken, part) in enumerate(shuffled(*args)):
            yield taken, dataclasses.replace(part, returns=part.returns + (1e20 if i == 1 else 0.0))

    monkeypatch.setattr("classic.update.shuffled_minibatches", overflowing)
    agent.learn(1)
    assert [row["optim/skipped_steps"] for row in log_of(tmp_path)] == [1]
    assert agent.optimizer.steps == 1


def test_a_nan_number_of_steps_is_refused(small):
    with pytest.raises(ValueError, match="total_timesteps must be a whole number, 1 or more, got nan"):
        classic.PPO("tests/Match-v0", small()).learn(float("nan"))


def test_thread_count_is_scoped():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_initial_weights_do_not_depend_on_the_threads_of_the_process():
    weights = []
    for threads in (1, 2):
        with torch_threads(threads):
            agent = classic.PPO("CartPole-v1", classic.PPOArgs(seed=3))
            weights.append([x.clone() for x in agent.network.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(*weights, strict=True))


def test_learning_runs_on_one_thread_by_default(small):
    seen = []
    agent = classic.PPO("tests/Match-v0", small())
    torch.set_num_threads(2)
    try:
        agent.learn(1, callbacks=[lambda agent, metrics: seen.append(torch.get_num_threads())])
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.slow
def test_cartpole_is_solved_on_five_of_five_seeds():
    returns = []
    for seed in range(5):
        agent = classic.PPO("CartPole-v1", classic.PPOArgs(seed=seed, quiet=True)).learn()
        returns.append(agent.evaluate(episodes=20)["mean_return"])
    assert min(returns) >= 475, returns
