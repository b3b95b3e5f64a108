"""The bf16 working copy: rounded once per optimizer step, and what is read of it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from rlhf_ppo.generation.decoding import sample_responses
from rlhf_ppo.generation.engines import StaticEngine
from rlhf_ppo.generation.rollout import SamplingParams
from rlhf_ppo.models.acceleration.working_copy import computing, hold_in_bf16
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward.runner import Sequences
from rlhf_ppo.training.gradients import accumulate_gradients


@pytest.fixture
def sequences():
    ids = torch.randint(2, 20, (3, 9), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids, dtype=torch.bool)
    return Sequences(ids[:, :4], real[:, :4], ids[:, 4:], real[:, 4:])


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def backward(model, sequences, *, bf16=True):
    with computing(model, bf16=bf16), accumulate_gradients(model):
        output = model(*sequences, entropy=False)
        (output.logprobs.sum() + output.values.sum()).backward()
    return output


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_inside_weights_are_rounded_and_outside_they_are_the_float32_ones(make_model, kind):
    model = ActorCritic(make_model(kind))
    before = weights(model)
    with computing(model, bf16=True):
        inside = weights(model)
    for name, weight in before.items():
        exact = "norm" in name or "ln_" in name or name.startswith("value_head")
        assert inside[name].dtype == (torch.float32 if exact else torch.bfloat16), name
        assert torch.equal(inside[name], weight if exact else weight.bfloat16()), name
    after = weights(model)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_not_in_bf16_nothing_changes(make_model):
    model = ActorCritic(make_model("gpt2"))
    given = list(model.parameters())
    with computing(model, bf16=False):
        assert all(a is b for a, b in zip(given, model.parameters(), strict=True))
        assert not torch.is_autocast_enabled("cpu")


def rounded(monkeypatch):
    """Count the weights that are rounded."""
    counts: list[int] = []
    copy_ = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: (counts.append(len(of)), copy_(to, of)))
    return counts


def test_weights_are_rounded_once_per_optimizer_step(make_trainer, prompts, monkeypatch):
    trainer = make_trainer(precision="bf16", num_epochs=2, num_minibatches=2, microbatch_tokens=16)
    counts, decodes = rounded(monkeypatch), []
    monkeypatch.setattr(
        trainer.model.runner,
        "decode_step",
        (lambda f: lambda *a, **k: (decodes.append(1), f(*a, **k))[1])(trainer.model.runner.decode_step),
    )
    rollout = trainer.rollout(prompts)
    assert len(decodes) > 1 and len(counts) == 1, "decode steps read one copy"
    counts.clear()
    trainer.step(rollout)
    # The first minibatch reads the rollout's copy; each of four optimizer steps is followed by one rounding at most.
    assert len(counts) == 3


def test_gradients_add_up_in_float32(make_model, sequences):
    """A sum of 256 equal gradients in bfloat16 would stop growing."""
    model = ActorCritic(make_model("gpt2"))
    backward(model, sequences)
    once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for _ in range(15):
        backward(model, sequences)
    for name, parameter in model.named_parameters():
        if name in once:
            assert parameter.grad.dtype == torch.float32, name
            torch.testing.assert_close(parameter.grad, 16 * once[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_gradient_is_that_of_weights_rounded_in_every_pass(make_model, sequences, kind):
    """Against autocast over float32 weights, whose norms return float32 and are rounded by each layer that reads."""
    model = ActorCritic(make_model(kind))
    nn.init.normal_(model.value_head.weight, std=0.1)
    exact, plain = copy.deepcopy(model), copy.deepcopy(model)
    output, right = backward(model, sequences), backward(exact, sequences, bf16=False)
    with torch.autocast("cpu", dtype=torch.bfloat16), accumulate_gradients(plain):
        other = plain(*sequences, entropy=False)
        (other.logprobs.sum() + other.values.sum()).backward()
    assert output.logprobs.dtype == output.values.dtype == torch.float32
    gap, usual = ((x.logprobs - right.logprobs).abs().mean() for x in (output, other))
    assert 0 < gap < 2 * usual
    ours, theirs = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, exact))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.999


def test_tied_weights_have_one_copy_and_one_gradient(make_model, sequences):
    model = ActorCritic(make_model("gpt2"))
    embedding, head = model.policy.get_input_embeddings(), model.policy.get_output_embeddings()
    assert embedding.weight is head.weight
    with computing(model, bf16=True):
        assert embedding.weight is head.weight
    backward(model, sequences)
    in_bf16 = head.weight.grad
    model.zero_grad()
    backward(model, sequences, bf16=False)
    assert torch.cosine_similarity(in_bf16.flatten(), head.weight.grad.flatten(), dim=0) > 0.99


def test_frozen_weights_stay_frozen_inside(make_model, sequences):
    model = ActorCritic(make_model("gpt2"))
    model.policy.requires_grad_(False)
    backward(model, sequences)
    assert all(p.grad is None for p in model.policy.parameters())
    assert model.value_head.weight.grad is not None


def test_an_exception_inside_gives_the_float32_weights_back(make_model):
    model = ActorCritic(make_model("gpt2"))
    with pytest.raises(RuntimeError, match="inside"), computing(model, bf16=True):
        raise RuntimeError("inside")
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_frozen_reference_is_held_in_bf16_and_equals_the_policy(make_trainer, prompts):
    trainer = make_trainer(precision="bf16")
    reference = trainer.reference.model
    linear = [m.weight for m in reference.modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    assert {w.dtype for w in linear} == {torch.bfloat16}
    assert make_trainer(precision="fp32").reference.model.get_input_embeddings().weight.dtype == torch.float32
    rollout = trainer.rollout(prompts)
    again = trainer.fixed.reference.logprobs(rollout.sequences(range(len(prompts))), temperature=1.0)
    with torch.no_grad(), computing(trainer.model, bf16=True):
        now = trainer.model(*rollout.sequences(range(len(prompts))), entropy=False).logprobs
    torch.testing.assert_close(again, now, rtol=0, atol=0)


def test_under_an_adapter_the_base_is_held_in_bf16_and_the_adapter_in_float32(make_trainer, make_model, tmp_path):
    make_model("gpt2").save_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trainer = make_trainer(model=str(tmp_path / "base"), precision="bf16", peft_config=config)
    names = {n: p.dtype for n, p in trainer.model.named_parameters()}
    assert {d for n, d in names.items() if "lora_" in n} == {torch.float32}
    assert {d for n, d in names.items() if "base_layer.weight" in n} == {torch.bfloat16}
    metrics = trainer.train()
    assert metrics["kl/reference_nats_per_response"] == pytest.approx(0, abs=1)
    trainer.save_model(tmp_path / "adapter")
    trainer.save_model(tmp_path / "merged", merge_adapter=True)


def test_a_classifiers_score_keeps_its_precision():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=0)
    model = GPT2ForSequenceClassification(config).eval().requires_grad_(False)
    ids = torch.arange(1, 9)[None]
    hold_in_bf16(model)
    assert model.score.weight.dtype == torch.float32
    with torch.no_grad(), computing(model, bf16=True):
        score = model(ids).logits
    assert score.dtype == torch.float32
    assert not torch.equal(score, score.bfloat16().float())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_compiled_decode_step_reads_the_weights_of_now_without_compiling_again(make_model, kind):
    model = ActorCritic(make_model(kind))
    ids = torch.arange(2, 14).view(2, 6)
    mask = torch.ones_like(ids, dtype=torch.bool)
    params, engine = SamplingParams(max_new_tokens=4), StaticEngine(compile_step=True, backend="eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        with computing(model, bf16=True):
            compiled, plain = (
                sample(model, ids, mask, params, generator=torch.Generator().manual_seed(0))
                for sample in (engine, sample_responses)
            )
        assert torch.equal(compiled.response_ids, plain.response_ids)
        torch.testing.assert_close(compiled.logprobs, plain.logprobs, rtol=0, atol=1e-3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
    assert engine.compile_step and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_that_is_held_in_bf16_can_be_called_by_itself(make_model, kind):
    """As callbacks do; a deep copy in float32, which saving makes, computes in float32."""
    exact = make_model(kind).eval().requires_grad_(False)
    held, ids = copy.deepcopy(exact), torch.arange(1, 9)[None]
    hold_in_bf16(held)
    right, found = exact(ids).logits, held(input_ids=ids).logits
    assert 0 < (found - right).abs().max() < 0.1 * right.abs().max()
    assert held.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 11)
    with computing(held, bf16=True):
        assert torch.equal(held(ids).logits, found)
    again = copy.deepcopy(held).float()
    assert again.forward.__self__ is again
    torch.testing.assert_close(again(ids).logits, right, rtol=0, atol=0.1 * float(right.abs().max()))
    assert not torch.is_autocast_enabled("cpu") and again(ids).logits.dtype == torch.float32


def test_gradients_reach_an_adapter_on_a_held_base_that_is_called_by_itself(make_model):
    policy = get_peft_model(make_model("llama").eval(), LoraConfig(task_type="CAUSAL_LM", r=2))
    hold_in_bf16(policy)
    ids = torch.arange(1, 9)[None]
    policy(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in policy.named_parameters() if "lora_" in name)


def test_a_backward_pass_after_leaving_keeps_its_gradient(make_model, sequences):
    model = ActorCritic(make_model("gpt2"))
    inside = copy.deepcopy(model)
    backward(inside, sequences)
    with computing(model, bf16=True):
        output = model(*sequences, entropy=False)
    (output.logprobs.sum() + output.values.sum()).backward()
    with computing(model, bf16=True):
        pass
    name = "policy.transformer.h.0.mlp.c_fc.weight"
    ours, right = (dict(m.named_parameters())[name].grad for m in (model, inside))
    torch.testing.assert_close(ours, right, rtol=0.05, atol=1e-3)


def test_what_changed_through_data_is_rounded_before_a_run_checks_its_models(make_trainer, make_model, prompts):
    model = make_model("gpt2")
    make_trainer(model=model, precision="bf16").rollout(prompts)
    for parameter in model.parameters():
        parameter.data.mul_(1.3)
    model.resize_token_embeddings(model.config.vocab_size)
    make_trainer(model=model, precision="bf16")  # compares the policy with its copy, the reference


def test_resized_embeddings_get_a_new_copy(make_model):
    model = make_model("gpt2")
    with computing(model, bf16=True):
        pass
    model.resize_token_embeddings(64)
    with computing(model, bf16=True):
        assert model.get_input_embeddings().weight.shape[0] == 64


def test_a_subclass_of_a_classifier_scores_in_float32_and_a_reward_model_goes_back():
    class Scores(GPT2ForSequenceClassification):
        pass

    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=0)
    model = Scores(config).eval().requires_grad_(False)
    with torch.no_grad(), computing(model, bf16=True):
        assert model(torch.arange(1, 9)[None]).logits.dtype == torch.float32


def test_norms_that_are_the_residual_stream_are_not_rounded():
    config = OpenAIGPTConfig(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    model = OpenAIGPTLMHeadModel(config).eval()
    with torch.no_grad(), computing(model, bf16=True):
        states = model.transformer(torch.arange(1, 9)[None]).last_hidden_state
    assert states.dtype == torch.float32 and not torch.equal(states, states.bfloat16().float())
