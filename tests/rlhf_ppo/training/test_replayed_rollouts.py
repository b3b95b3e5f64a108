"""Replay: the first update is the recorded run's own; later ones say how far they are; other rollouts are refused."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast

from rlhf_ppo.core import ValueScale
from rlhf_ppo.training.recorded import replayed_rollouts
from rlhf_ppo.training.recorded.recorded_rollouts import open_recording

RECORDED = {"total_episodes": 24, "save_rollouts": True}
OFF_POLICY = ("replay/kl_nats_per_response", "replay/effective_fraction")


def letters(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def forbidden(prompts, completions, **columns):
    raise AssertionError("scores come from the record")


forbidden.__name__ = "early_letters"


@pytest.fixture
def recorded(make_trainer):
    """A run of three rollouts that recorded them."""
    trainer = make_trainer(**RECORDED)
    trainer.train()
    return trainer


@pytest.fixture
def untrained(make_trainer):
    """Three recorded rollouts, in less time."""
    trainer = make_trainer(total_episodes=24)
    trainer.record()
    return trainer


def replay(make_trainer, run, **more):
    """Replay a run's rollouts with its settings; neither samples nor scores."""
    settings = {"total_episodes": 24, "reward_funcs": forbidden, "replay": str(run.run.path), **more}
    trainer = make_trainer(**settings)
    trainer.fixed = dataclasses.replace(trainer.fixed, sample=None)  # calling it would fail
    return trainer


VARIANTS = {
    "plain": {},
    "temperature-and-clip": {"temperature": 0.7, "score_clip": 0.5, "kl_estimator": "k3", "gamma": 0.9},
    "rloo": {"advantage_estimator": "rloo", "num_generations": 2},
    "adapters": {"peft_config": lambda: LoraConfig(r=2, target_modules=["c_attn"]), "critic": "adapter"},
    "reward-units": {"normalize_values": False},
    "min-new-tokens": {"min_new_tokens": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_update_is_the_recorded_runs_to_the_bit(make_trainer, variant):
    make = lambda: {name: x() if callable(x) else x for name, x in VARIANTS[variant].items()}  # noqa: E731
    run = make_trainer(**RECORDED, **make())
    run.train()
    again = replay(make_trainer, run, **make())
    again.train()
    first, *later = again.run.read()
    distance = {name: first.pop(name) for name in OFF_POLICY}
    assert first == run.run.read()[0]
    assert distance["replay/kl_nats_per_response"] == pytest.approx(0, abs=1e-4)
    assert distance["replay/effective_fraction"] == pytest.approx(1, abs=1e-4)
    # With the same settings the policy moves as it did: the same rollout was sampled after the same update.
    assert len(later) == 2 and later[0]["score/mean"] == run.run.read()[1]["score/mean"]
    assert all(line["replay/effective_fraction"] <= 1 for line in later)


def test_a_critic_that_starts_awake_is_exact_too(make_trainer, recorded, wake_critic, tmp_path):
    """Its values while decoding differ from those of a whole pass in the last bits."""
    wake_critic(recorded.model)
    head = str(recorded.save_model(tmp_path / "head"))
    run = make_trainer(**RECORDED, value_head_from=head)
    run.train()
    again = replay(make_trainer, run, value_head_from=head)
    again.train()
    assert {name: x for name, x in again.run.read()[0].items() if name not in OFF_POLICY} == run.run.read()[0]
    values = open_recording(run.run.path).read(0).values
    assert values is not None and values.abs().max() > 0.1
    # With another critic the values are its own, and the rest is the record's.
    other = replay(make_trainer, run)
    other.train()
    line = other.run.read()[0]
    assert line["value/mean"] != run.run.read()[0]["value/mean"]
    assert line["score/mean"] == run.run.read()[0]["score/mean"]


def test_other_settings_leave_the_record_behind_and_say_how_far(make_trainer, recorded):
    """Old log-probs stay the recorded ones, and the tripwire lets the first ratio of later updates be far from 1."""
    fast = replay(make_trainer, recorded, learning_rate=3e-2, kl_coef=0.0)
    fast.train()
    lines = fast.run.read()
    theirs = recorded.run.read()
    assert lines[0]["policy/first_minibatch_max_abs_log_ratio"] < 1e-5
    assert lines[1]["policy/first_minibatch_max_abs_log_ratio"] > 0.1
    assert lines[2]["replay/kl_nats_per_response"] > 0.1 and lines[2]["replay/effective_fraction"] < 0.9
    # What was sampled and scored is the record's in every update.
    for name in ("score/mean", "kl/reference_nats_per_response", "response/length_tokens", "policy/entropy"):
        assert [line[name] for line in lines] == [line[name] for line in theirs], name
    assert [line["progress/episodes"] for line in lines] == [8, 16, 24]


def test_values_are_in_the_units_of_the_critic_now(make_trainer, recorded):
    """Not in those of the recorded run's critic, which has seen other returns."""
    trainer = replay(make_trainer, recorded)
    trainer.state.iteration = 1
    trainer.model.value_scale = ValueScale(5.0, 2.0, 1)
    assert trainer.fixed.recording is not None
    rollout, _ = replayed_rollouts.replay_rollout(trainer.state, trainer.fixed, trainer.fixed.recording)
    assert rollout.value_scale == ValueScale(5.0, 2.0, 1) and rollout.values is not None
    assert torch.equal(rollout.values, torch.where(rollout.mask, 5.0, 0.0).double())  # a fresh head says the mean


def test_the_distance_is_that_of_the_distributions(make_trainer, recorded):
    """By hand from log-probs: KL by its definition, and the effective share of the responses' weights."""
    rollout = open_recording(recorded.run.path).read(0)
    shift = torch.linspace(-1, 1, 8)[:, None] * rollout.mask / rollout.lengths[:, None]
    found = replayed_rollouts._distance(rollout, rollout.logprobs + shift)
    weights = [math.exp(x) for x in torch.linspace(-1, 1, 8).tolist()]
    assert found["replay/kl_nats_per_response"] == pytest.approx(0, abs=1e-5)
    expected = sum(weights) ** 2 / (8 * sum(w * w for w in weights))
    assert found["replay/effective_fraction"] == pytest.approx(expected, rel=1e-5)


def test_another_reference_is_read_again(make_trainer, make_model, recorded):
    """The first rollout's KL is then that to the other reference."""
    other = make_model(seed=3)
    run = replay(make_trainer, recorded, ref_model=other)
    run.train()
    assert run.run.read()[0]["kl/reference_nats_per_response"] > 1
    assert recorded.run.read()[0]["kl/reference_nats_per_response"] == pytest.approx(0, abs=1e-5)


def test_a_replay_resumes(make_trainer, recorded):
    whole = replay(make_trainer, recorded)
    whole.train()
    part = replay(make_trainer, recorded, save_every=1, callbacks=[lambda trainer, _: trainer.iteration == 2])
    part.train()
    resumed = replay(make_trainer, recorded, save_every=1, output_dir=str(part.run.path))
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.run.read() == whole.run.read()


def test_a_replay_needs_no_prompts_and_says_what_it_is(make_trainer, untrained, capsys):
    trainer = replay(make_trainer, untrained, quiet=False, total_episodes=8)
    trainer.train_prompts = None
    trainer.train()
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("replay"))
    assert (
        f"{untrained.run.path}/rollouts. The first update is the recorded run's own; later ones are off-policy" in line
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"total_episodes": 32}, r"are 3 of 8 responses, and total_episodes=32 asks for 4: lower total_episodes to 24"),
        ({"temperature": 0.5}, r"were sampled with temperature=1\.0, this run has temperature=0\.5: set it so"),
        ({"max_new_tokens": 4}, r"were sampled with max_new_tokens=6, this run has max_new_tokens=4"),
        ({"stop_token_ids": None}, r"with stop_token_ids=\[0, 12.*\], this run has stop_token_ids=None"),
        ({"rollout_batch_size": 4}, r"with rollout_batch_size=8, this run has rollout_batch_size=4"),
        ({"num_generations": 2}, r"with num_generations=1, this run has num_generations=2"),
        ({"recompute_logprobs": True}, r"with recompute_logprobs=False, this run has recompute_logprobs=True"),
        (
            {"reward_funcs": letters},
            r"were scored by early_letters \(weight 1\), and this run's rewards are letters \(weight 1\): name",
        ),
        (
            {"reward_weights": (10.0,)},
            r"and this run's rewards are early_letters \(weight 10\): name the same",
        ),
        ({"save_rollouts": True}, r"replay=.*save_rollouts=True would record them again: drop one of them"),
        ({"on_nonfinite": "rollback", "save_every": 1}, r"on_nonfinite='rollback' goes on with other responses, and"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_rollouts_that_this_run_could_not_have_sampled_are_refused(make_trainer, untrained, more, said):
    with pytest.raises(ValueError, match=said):
        replay(make_trainer, untrained, **more)


def test_rollouts_of_another_model_tokenizer_or_place_are_refused(make_trainer, make_model, untrained, tokenizer):
    with pytest.raises(ValueError, match=r"by another model \(object: gpt2, 2 layers.*than this run's \(llama, 2 lay"):
        replay(make_trainer, untrained, model=make_model("llama"))
    with pytest.raises(ValueError, match=r"by another policy \(object\) than .*first responses differ by .* nats\."):
        replay(make_trainer, untrained, model=make_model(seed=1))
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    other = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(content)), eos_token=tokenizer.eos_token
    )
    with pytest.raises(ValueError, match=r"sampled with another tokenizer \(30 tokens, .*than this run's \(30 tokens"):
        replay(make_trainer, untrained, processing_class=other)
    with pytest.raises(ValueError, match=r"is in output_dir=.*: name another output_dir"):
        replay(make_trainer, untrained, output_dir=str(untrained.run.path))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: record some by train --save-rollouts"):
        make_trainer(replay="nowhere")
    file = next((untrained.run.path / "rollouts").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"rollouts are damaged: rollout-000001\.safetensors has \d+ bytes"):
        replay(make_trainer, untrained)
