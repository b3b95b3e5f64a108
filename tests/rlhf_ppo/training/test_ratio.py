"""Before the first optimizer step the ratio is 1: sampling and training see the same distribution."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from rlhf_ppo.runtime.errors import RatioTripwireError


def lora(dropout: float = 0.5) -> LoraConfig:
    # Weights that do not start at 0 (init_lora_weights=False), so that the adapter and its dropout matter.
    return LoraConfig(
        r=4,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        lora_dropout=dropout,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("minibatches", "microbatch"), [(1, None), (2, None), (4, 1), (2, 3), (8, 5)])
def test_with_learning_rate_0_every_ratio_stays_1(make_trainer, prompts, minibatches, microbatch, temperature):
    trainer = make_trainer(
        learning_rate=0.0, num_minibatches=minibatches, microbatch_tokens=microbatch, temperature=temperature
    )
    rollout = trainer.rollout(prompts)
    assert rollout.lengths.unique().numel() > 1  # padded rows are among them
    metrics = trainer.step(rollout)
    assert metrics["policy/max_abs_log_ratio"] < 1e-5
    assert metrics["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/clip_fraction"] == metrics["policy/out_of_range_fraction"] == 0


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox", "opt"])
def test_other_architectures_too(make_trainer, make_model, prompts, kind):
    trainer = make_trainer(model=make_model(kind), learning_rate=0.0, microbatch_tokens=3, temperature=0.7)
    assert trainer.step(trainer.rollout(prompts))["policy/max_abs_log_ratio"] < 1e-5


def test_dropout_is_off_the_adapters_too(make_trainer, prompts):
    """GPT-2 brings dropout 0.1, the adapter 0.5: two evaluations of one batch are identical, and the ratio is 1."""
    trainer = make_trainer(peft_config=lora(), learning_rate=0.0)
    rollout = trainer.rollout(prompts)
    inputs = (rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.mask)
    with torch.no_grad():
        first, second = trainer.model(*inputs), trainer.model(*inputs)
    assert torch.equal(first.logprobs, second.logprobs)
    assert trainer.step(rollout)["policy/max_abs_log_ratio"] < 1e-5


def test_a_model_in_train_mode_is_put_into_evaluation_mode(make_trainer, make_model, prompts):
    trainer = make_trainer(model=make_model().train(), value_model=make_model(seed=1).train(), learning_rate=0.0)
    assert not any(module.training for module in trainer.model.modules())
    assert trainer.step(trainer.rollout(prompts))["policy/max_abs_log_ratio"] < 1e-5


def test_the_temperature_divides_the_logits_of_policy_and_reference_alike(make_trainer, prompts):
    trainer = make_trainer(temperature=0.7)
    rollout = trainer.rollout(prompts)
    row = int(rollout.lengths.argmax())
    prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
    response = rollout.response_ids[row][rollout.mask[row]]
    with torch.no_grad():
        logits = trainer.model.policy(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
    expected = (logits / 0.7).log_softmax(-1).gather(1, response[:, None]).squeeze(1)
    torch.testing.assert_close(rollout.logprobs[row, : len(response)], expected, atol=1e-5, rtol=1e-5)
    # The reference is the untrained policy, so any difference would be a temperature of its own.
    torch.testing.assert_close(rollout.ref_logprobs, rollout.logprobs, atol=1e-5, rtol=1e-5)


def test_tripwire_stops_when_weights_changed_between_rollout_and_step(make_trainer, prompts):
    trainer = make_trainer()
    rollout = trainer.rollout(prompts)
    with torch.no_grad():
        trainer.model.policy.lm_head.weight.mul_(1.5)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(RatioTripwireError, match="weights changed between rollout") as error:
        trainer.step(rollout)
    assert "max_initial_log_ratio=0.1" in str(error.value)
    # Stopped before the optimizer: nothing moved, no gradient is left behind.
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_tripwire_stops_when_dropout_is_on(make_trainer, prompts):
    trainer = make_trainer(peft_config=lora())
    rollout = trainer.rollout(prompts)
    trainer.model.train()
    with pytest.raises(RatioTripwireError, match="dropout"):
        trainer.step(rollout)


def test_tripwire_stops_when_the_sampler_used_another_temperature(make_trainer, prompts):
    rollout = make_trainer(temperature=0.7).rollout(prompts)
    with pytest.raises(RatioTripwireError):
        make_trainer(temperature=1.0).step(rollout)


def test_tripwire_bound_is_a_setting_and_its_measure_a_metric(make_trainer, prompts):
    trainer = make_trainer(max_initial_log_ratio=1e6)
    rollout = trainer.rollout(prompts)
    assert trainer.step(rollout)["policy/first_minibatch_max_abs_log_ratio"] < 1e-5
    # The weights moved, so the same rollout again starts elsewhere; the wide bound lets it pass and logs it.
    assert trainer.step(rollout)["policy/first_minibatch_max_abs_log_ratio"] > 1e-4


def test_a_train_run_that_trips_saves_the_model_first(make_trainer):
    trainer = make_trainer(callbacks=[lambda trainer, metrics: trainer.model.train() and None])
    with pytest.raises(RatioTripwireError):
        trainer.train()
    assert (trainer.run.path / "model.safetensors").is_file()
    assert (trainer.run.path / "value_head.safetensors").is_file()


def test_recompute_logprobs_takes_the_full_forward_and_logs_the_gap(make_trainer, prompts):
    plain, again = make_trainer(), make_trainer(recompute_logprobs=True)
    decoded, recomputed = plain.rollout(prompts), again.rollout(prompts)
    assert torch.equal(decoded.response_ids, recomputed.response_ids)
    gap = (decoded.logprobs - recomputed.logprobs).abs().max()
    assert recomputed.decode_gap == pytest.approx(float(gap))
    metrics = again.step(recomputed)
    assert metrics["policy/decode_gap_max_nats"] == recomputed.decode_gap < 1e-5
    assert "policy/decode_gap_max_nats" not in plain.step(decoded)


def test_recompute_logprobs_rescues_a_decoder_that_disagrees(make_trainer, make_model, prompts, monkeypatch):
    """A cached decoding that is wrong trips the wire; the recomputed log-probs are the training forward's own."""

    def make(recompute: bool):
        trainer = make_trainer(recompute_logprobs=recompute, temperature=1.0)
        decode = trainer.model.decode
        monkeypatch.setattr(
            trainer.model, "decode", lambda *inputs: (lambda out: (out[0] * 1.2, *out[1:]))(decode(*inputs))
        )
        return trainer

    wrong = make(recompute=False)
    with pytest.raises(RatioTripwireError, match="recompute_logprobs"):
        wrong.step(wrong.rollout(prompts))
    rescued = make(recompute=True)
    metrics = rescued.step(rescued.rollout(prompts))
    assert metrics["policy/first_minibatch_max_abs_log_ratio"] < 1e-5
    assert metrics["policy/decode_gap_max_nats"] > 0.01
