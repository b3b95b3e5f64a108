"""A whole run: it learns, it repeats exactly, it reports, and its pieces by hand give the same."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from rlhf_ppo.core import compute_gae, kl_penalized_rewards
from rlhf_ppo.models.forward.runner import Sequences
from rlhf_ppo.rewards.validation import RewardError
from rlhf_ppo.trainer import PPOTrainer, load_checkpoint
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.rewards import shape_rewards


def weights(trainer: PPOTrainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_toy_task_is_learned(make_trainer, learning_seed):
    """Letters before n start at about half of all; 40 updates of 32 responses push them far above."""
    settings = {"learning_rate": 5e-3, "num_epochs": 4, "num_minibatches": 4, "kl_coef": 0.01}
    trainer = make_trainer(total_episodes=1280, rollout_batch_size=32, seed=learning_seed, **settings)
    trainer.train()
    rows = trainer.run.read()
    scores = [row["score/mean"] for row in rows]
    assert len(scores) == 40
    assert scores[0] < 0.6
    assert sum(scores[-5:]) / 5 > 0.85
    # The critic learned with it, and the KL to the reference shows how far the policy went.
    # The first values are the mean of the scores' sums to the end; the targets mix the two, as lambda says.
    assert rows[0]["value/mean"] == pytest.approx(rows[0]["value/return_mean"], abs=0.02)
    assert rows[0]["value/return_mean"] > 0.2
    assert all(abs(row["value/mean"] - row["value/return_mean"]) < 0.2 for row in rows[-10:])
    assert rows[0]["kl/reference_nats_per_response"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["kl/reference_nats_per_response"] > 0.5


def test_one_seed_one_result_and_another_seed_another(make_trainer, prompts):
    rows = [{"prompt": prompt} for prompt in prompts]
    settings = {"total_episodes": 24, "eval_every": 2, "microbatch_tokens": 3}
    first, again, other = (make_trainer(eval_dataset=rows[:3], seed=seed, **settings) for seed in (1, 1, 2))
    results = [trainer.train() for trainer in (first, again, other)]
    assert results[0] == results[1]
    for name in ("metrics.jsonl", "samples.jsonl", "eval_samples.jsonl"):
        assert (first.run.path / name).read_bytes() == (again.run.path / name).read_bytes()
        assert (first.run.path / name).read_bytes() != (other.run.path / name).read_bytes()
    assert same(weights(first), weights(again))
    assert not same(weights(first), weights(other))


def test_global_randomness_in_between_changes_nothing(make_trainer):
    """Draws come from generators of their own, so a reward that uses torch's global one does not disturb the run."""

    def noisy(prompts, completions, **_):
        torch.rand(int(torch.randint(1, 9, ())))
        return [float(len(text)) for text in completions]

    def calm(prompts, completions, **_):
        return [float(len(text)) for text in completions]

    runs = [make_trainer(reward_funcs=reward) for reward in (noisy, calm)]
    for run in runs:
        run.train()
    assert same(weights(runs[0]), weights(runs[1]))


def test_a_rollout_by_hand_needs_a_value_of_each_column_for_each_prompt(make_trainer):
    with pytest.raises(ValueError, match="column 'answer' has 1 values for 2 prompts"):
        make_trainer().rollout(["a", "b"], answer=[1])


def test_rollout_and_step_by_hand_equal_train(make_trainer):
    automatic, by_hand = make_trainer(), make_trainer()
    automatic.train()
    logged = []
    for number in range(2):
        batch = by_hand.train_prompts.batch(number, 8)
        logged.append(by_hand.step(by_hand.rollout(batch.prompts, **batch.columns)))
    assert same(weights(automatic), weights(by_hand))
    assert automatic.run.read() == logged


def test_advantages_of_a_rollout_follow_from_its_public_fields(make_trainer, wake_critic, prompts):
    """The trainer adds nothing of its own between the rollout's record and the core's functions."""
    trainer = make_trainer(normalize_advantages=False, kl_coef=0.3, gamma=0.9, gae_lambda=0.8)
    wake_critic(trainer.model)
    r = trainer.rollout(prompts)
    estimates = estimate(r, shape_rewards(r, trainer.args, trainer.kl_coef), trainer.args)
    old, scale = estimates.experience, estimates.value_scale
    rewards = kl_penalized_rewards(r.scores, r.logprobs - r.ref_logprobs, r.mask, 0.3)
    for row, n in enumerate(r.lengths.tolist()):
        v = r.values[row : row + 1, :n]
        end = torch.arange(n)[None] == n - 1
        following = torch.cat([v[:, 1:], torch.zeros(1, 1)], dim=1)
        advantages, returns = compute_gae(
            rewards[row : row + 1, :n], v, following, end, torch.zeros_like(end), gamma=0.9, gae_lambda=0.8
        )
        torch.testing.assert_close(old.advantages[row, :n], advantages[0].float())
        torch.testing.assert_close(old.returns[row, :n], scale.normalize(returns[0]).float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(old.values[row, :n], scale.normalize(v[0].double()).float())


def test_total_episodes_round_up_and_say_so(make_trainer, capsys):
    trainer = make_trainer(total_episodes=17, quiet=False)
    trainer.train()
    assert trainer.episodes == 24 and trainer.iteration == 3
    assert "total_episodes=17 rounds up to 24: whole rollouts of 8" in capsys.readouterr().err


def test_quiet_says_nothing(make_trainer, capfd):
    trainer = make_trainer(total_episodes=17)
    capfd.readouterr()
    batch = trainer.train_prompts.batch(0, 8)
    trainer.step(trainer.rollout(batch.prompts))
    assert capfd.readouterr() == ("", "")


def test_evaluate_is_deterministic_and_its_last_batch_may_be_short(make_trainer):
    rows = [{"prompt": f"prompt {letter}"} for letter in "abcdefghijk"]  # 11 = 8 + 3
    sizes: list[int] = []

    def reward(prompts, completions, **_):
        sizes.append(len(prompts))
        return [float(len(text)) for text in completions]

    trainer = make_trainer(eval_dataset=rows, reward_funcs=reward)
    before = weights(trainer)
    first = trainer.evaluate()
    assert sizes == [8, 3]
    assert set(first) >= {
        "eval/score_mean",
        "eval/score_std",
        "eval/kl_nats_per_response",
        "eval/length_tokens",
        "eval/eos_fraction",
    }
    assert all(math.isfinite(value) for value in first.values())
    assert first["eval/kl_nats_per_response"] == pytest.approx(0, abs=1e-4)
    assert trainer.evaluate() == first
    assert same(before, weights(trainer))


def test_evaluating_does_not_change_training(make_trainer, prompts):
    plain, watched = make_trainer(), make_trainer(eval_dataset=[{"prompt": p} for p in prompts[:3]], eval_every=1)
    plain.train()
    result = watched.train()
    assert same(weights(plain), weights(watched))
    evaluations = [row for row in watched.run.read() if "eval/score_mean" in row]
    # Before training, after update 1, and at the end.
    assert [row["progress/iteration"] for row in evaluations] == [0, 1, 2]
    assert result["eval/score_mean"] == evaluations[-1]["eval/score_mean"]
    assert len(watched.run.read("eval_samples.jsonl")) == 9


def test_the_run_folder_holds_what_its_settings_promise(make_trainer, pictures):
    trainer = make_trainer(samples_per_rollout=3, seed=5)
    result = trainer.train()
    folder = Path(trainer.args.output_dir)
    assert json.loads((folder / "run.json").read_text())["seed"] == 5
    rows = trainer.run.read()
    assert rows[-1] == {key: value for key, value in result.items() if key in rows[-1]}
    assert [row["progress/episodes"] for row in rows] == [8, 16]
    samples = trainer.run.read("samples.jsonl")
    assert len(samples) == 6
    assert set(samples[0]) >= {"iteration", "prompt", "completion", "score", "kl_nats", "tokens", "finished"}
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_callbacks_are_called_after_each_update_and_true_stops_the_run(make_trainer):
    seen: list[tuple[int, float]] = []

    def watch(trainer, metrics):
        seen.append((trainer.iteration, metrics["progress/episodes"]))

    trainer = make_trainer(total_episodes=80, callbacks=[lambda t, m: t.iteration == 3, watch])
    trainer.train()
    assert seen == [(1, 8), (2, 16), (3, 24)]  # the second callback hears of the last update too
    assert (trainer.run.path / "model.safetensors").is_file()
    # Only True itself stops: a callback that returns a number or a string does not end the run by accident.
    runs_on = make_trainer(callbacks=[lambda t, m: 1, lambda t, m: "yes"])
    runs_on.train()
    assert runs_on.iteration == 2


def test_a_constant_rate_has_its_warm_up_too(make_trainer, prompts):
    trainer = make_trainer(learning_rate=8e-3, warmup_steps=8, lr_scheduler_type="constant")
    # Two epochs of two minibatches: half of the warm-up.
    assert trainer.step(trainer.rollout(prompts))["optim/learning_rate"] == pytest.approx(4e-3)


def test_the_learning_rate_follows_its_schedule(make_trainer, prompts):
    """16 episodes: 2 rollouts x 2 epochs x 2 minibatches = 8 steps; linear to 0, 2 of them warm-up."""
    trainer = make_trainer(learning_rate=0.8, warmup_steps=2, lr_scheduler_type="linear")
    rates: list[float] = []
    trainer.optimizer.register_step_pre_hook(lambda opt, args, kwargs: rates.append(opt.param_groups[0]["lr"]))
    for p in trainer.model.parameters():
        p.register_hook(torch.zeros_like)  # nothing moves, so a rate of 0.8 does no harm
    for _ in range(2):
        metrics = trainer.step(trainer.rollout(prompts))
    assert rates == pytest.approx([0.0, 0.4, 0.8, 0.8 * 5 / 6, 0.8 * 4 / 6, 0.8 * 3 / 6, 0.8 * 2 / 6, 0.8 / 6])
    assert metrics["optim/learning_rate"] == pytest.approx(0)


def test_the_reference_says_the_same_before_and_after_training(make_trainer, prompts):
    trainer = make_trainer(learning_rate=0.01)
    rollout = trainer.rollout(prompts)
    inputs = (rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.mask)
    before = trainer.reference.logprobs(Sequences(*inputs), temperature=1.0)
    trainer.train()
    torch.testing.assert_close(trainer.reference.logprobs(Sequences(*inputs), temperature=1.0), before, rtol=0, atol=0)
    with torch.no_grad():
        assert not torch.allclose(trainer.model(*inputs).logprobs, before)
    assert not trainer.reference.model.training


def test_another_reference_is_where_the_kl_starts(make_trainer, make_model, prompts):
    trainer = make_trainer(ref_model=make_model(seed=9))
    assert trainer.step(trainer.rollout(prompts))["kl/reference_nats_per_response"] > 0.1


def test_a_finished_run_is_not_set_aside_by_training_again(make_trainer):
    trainer = make_trainer()
    trainer.train()
    with pytest.raises(ValueError, match="all 2 rollouts of this run are done"):
        trainer.train()
    assert not (trainer.run.path / "previous-1").exists()


def test_an_evaluation_batch_without_scores_is_fine_but_not_a_whole_evaluation(make_trainer, prompts):
    """Nine prompts in batches of eight; only the ninth's response cannot be scored."""

    def reward(prompts, completions, **columns):
        return [None if prompt == "lonely" else float(i) for i, prompt in enumerate(prompts)]

    rows = [{"prompt": prompt} for prompt in [*prompts, "lonely"]]
    assert make_trainer(reward_funcs=reward, eval_dataset=rows).evaluate()["eval/score_mean"] == 3.5  # mean of 0..7
    with pytest.raises(RewardError, match="none of the responses to the evaluation prompts"):
        make_trainer(reward_funcs=reward, eval_dataset=rows[-1:]).evaluate()


def test_an_update_that_stops_before_its_first_step_says_so(make_trainer, prompts):
    """With the tripwire out of the way, weights that moved after the rollout exceed target_kl at once."""
    trainer = make_trainer(target_kl=1e-6, max_initial_log_ratio=100.0)
    rollout = trainer.rollout(prompts)
    with torch.no_grad():
        for parameter in trainer.model.policy.parameters():
            parameter.mul_(1.5)
    metrics = trainer.step(rollout)
    assert (metrics["progress/optimizer_steps"], metrics["optim/epochs"], metrics["optim/skipped_steps"]) == (0, 1, 0)


def test_num_threads_holds_during_the_run_and_no_longer(make_trainer):
    before = torch.get_num_threads()
    seen: list[int] = []

    def reward(prompts, completions, **columns):
        seen.append(torch.get_num_threads())
        return [float(i) for i in range(len(completions))]

    make_trainer(reward_funcs=reward, num_threads=before + 1, reward_timeout_s=None, total_episodes=8).train()
    assert set(seen) == {before + 1} and torch.get_num_threads() == before


def test_what_a_callback_sets_on_the_trainer_counts_from_the_next_iteration_on(make_trainer):
    """Optimizer, settings and objective; the settings that callbacks set are also those of the checkpoint."""

    def change(trainer, metrics):
        trainer.args = dataclasses.replace(trainer.args, missing_eos_penalty=5.0)
        trainer.objective = dataclasses.replace(trainer.objective, clip_range=0.05, ent_coef=0.5)
        trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
        trainer.kl_coef = 0.25
        head, scale = trainer.model.value_head, trainer.model.value_scale
        seen.append([p.detach().clone() for p in trainer.model.policy.parameters()])
        # The head follows the returns' scale; what it predicts in the reward's units stays.
        heads.append((scale.std * head.weight.detach(), scale.denormalize(head.bias.detach())))

    seen: list[list[torch.Tensor]] = []
    heads: list[tuple[torch.Tensor, torch.Tensor]] = []
    trainer = make_trainer(callbacks=[change], total_episodes=24, score_clip=1.0, stop_token_ids=(0,))
    trainer.train()
    assert same(seen[0], seen[2])  # the new optimizer moves nothing
    torch.testing.assert_close(heads[0], heads[2])
    rows = trainer.run.read()
    assert rows[1]["kl/coef"] == 0.25
    assert trainer.args.missing_eos_penalty == 5.0
    assert (trainer.objective.clip_range, trainer.state.clip_range, trainer.args.clip_range) == (0.05, 0.05, 0.2)
    assert trainer.objective.ent_coef == trainer.args.ent_coef == 0.5
    assert rows[1]["score/shaped_mean"] < rows[0]["score/shaped_mean"] - 1


def test_a_rollout_that_train_does_not_call_is_named(make_trainer):
    trainer = make_trainer()
    trainer.rollout = None
    with pytest.warns(UserWarning, match=r"train\(\) does not call rollout\(\)"):
        trainer.train()


def test_a_checkpoint_is_loaded_by_the_function_that_did_it_before(make_trainer):
    trainer = make_trainer(save_every=1)
    trainer.train()
    again = make_trainer(save_every=1)
    load_checkpoint(again, trainer.run.path / "checkpoint-1")
    assert again.iteration == 1
