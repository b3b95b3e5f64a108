"""Compiled layers compute what plain ones do, by one code for all layers and lengths, and only where gradients are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch._dynamo.backends.debugging import aot_eager
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_ppo.models.acceleration import compiled_layers as module
from rlhf_ppo.models.acceleration.compiled_layers import compiled_layers
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.rewards import shape_rewards

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles


@pytest.fixture(autouse=True)
def graphs(monkeypatch) -> Iterator[list[Any]]:
    """The graphs that have been compiled; they run as they were captured."""
    found: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(module, "BACKEND", backend)
    yield found
    torch.compiler.reset()


def numbers(trainer: Any, rollout: Any, rows: list[int], *, compiled: bool) -> dict[str, torch.Tensor]:
    """Gradients of a minibatch's loss, the losses and diagnostics."""
    model = trainer.model
    old = estimate(rollout, shape_rewards(rollout, trainer.args, trainer.kl_coef), trainer.args).experience
    model.compiled = compiled
    model.zero_grad()
    step, losses = trainer.fixed.minibatch_gradient(model, rollout, old, rows, trainer.args)
    assert model.compiled == compiled
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**gradients, **losses, **{name: torch.tensor(x) for name, x in step.compute().items()}}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], *, rtol: float = 1e-4) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x, rtol=rtol, atol=max(1e-5, rtol * float(x.abs().max())), msg=name)


def assert_equal_numbers(trainer: Any, rollout: Any, *, rtol: float = 1e-4) -> None:
    for rows in ([0, 1, 2, 3], [4, 5, 6]):
        plain = numbers(trainer, rollout, rows, compiled=False)
        assert_close(numbers(trainer, rollout, rows, compiled=True), plain, rtol=rtol)


def test_other_lengths_and_more_layers_run_the_same_code(make_trainer, make_model, wake_critic, prompts, graphs):
    """Lengths differ from minibatch to minibatch; a model of three such layers compiles none of them again."""
    trainer = make_trainer()
    wake_critic(trainer.model)
    rollout = trainer.rollout(prompts)
    numbers(trainer, rollout, [0, 1, 2], compiled=True)
    count = len(graphs)
    assert count > 0
    assert_equal_numbers(trainer, rollout)
    config = GPT2Config(**{**make_model().config.to_dict(), "n_layer": 3})
    deeper = make_trainer(model=GPT2LMHeadModel(config))
    numbers(deeper, deeper.rollout(prompts), [0, 1, 2, 3, 4], compiled=True)
    assert len(graphs) == count


def test_passes_without_gradients_are_not_compiled(make_trainer, prompts, graphs):
    trainer = make_trainer()
    with compiled_layers(trainer.model, on=True):
        trainer.rollout(prompts)
    assert not graphs
    assert not any("forward" in vars(layer) for layer in module.transformer_layers(trainer.model))


def test_adapters_and_recomputed_layers(make_trainer, make_model, wake_critic, prompts):
    """The critic's own adapter, packed attention, and layers that are computed again in the backward pass."""
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    extra = {"peft_config": lora, "critic": "adapter", "gradient_checkpointing": True}
    trainer = make_trainer(model=make_model("llama"), vf_coef=0.5, **extra)
    wake_critic(trainer.model)
    assert_equal_numbers(trainer, trainer.rollout(prompts))


def test_compiled_backward_passes_in_bf16(make_trainer, wake_critic, prompts, monkeypatch):
    """Of the weights' rounded copies, whose gradients add up in float32."""
    monkeypatch.setattr(module, "BACKEND", aot_eager)
    trainer = make_trainer(precision="bf16", vf_coef=0.5)
    wake_critic(trainer.model)
    assert_equal_numbers(trainer, trainer.rollout(prompts), rtol=0.02)


def test_padded_sequences(make_trainer, make_model, wake_critic, prompts):
    """A sliding window does not pack: rows of one length and of several, and a row alone."""
    trainer = make_trainer(model=make_model("mistral"))
    wake_critic(trainer.model)
    assert not trainer.model.runner.packs
    assert_equal_numbers(trainer, trainer.rollout(prompts))


def test_code_that_fails_leaves_plain_layers_and_the_same_numbers(make_trainer, prompts, monkeypatch):
    """The failure comes after a microbatch whose gradient is there already."""
    trainer = make_trainer(microbatch_tokens=24)
    rollout = trainer.rollout(prompts)
    plain = numbers(trainer, rollout, list(range(8)), compiled=False)
    calls: list[int] = []

    def fails(layer: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("no such kernel\nand a long story")
        return type(layer).forward

    monkeypatch.setattr(module, "layer_forward", fails)
    trainer.model.compiled = True
    old = estimate(rollout, shape_rewards(rollout, trainer.args, trainer.kl_coef), trainer.args).experience
    with pytest.warns(UserWarning, match="compiled layers fail, so updates run plain ones .*: no such kernel$"):
        trainer.fixed.minibatch_gradient(trainer.model, rollout, old, list(range(8)), trainer.args)
    assert len(calls) == 4 and trainer.model.compiled is False
    for name, p in trainer.model.named_parameters():
        if name in plain:
            assert torch.equal(p.grad, plain[name])


def test_a_compiler_that_fails_is_one_warning_and_the_same_run(make_trainer, monkeypatch):
    plain = make_trainer()
    plain.train()

    def backend(*_: Any) -> Any:
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(module, "BACKEND", backend)
    trainer = make_trainer(compile="always")
    with pytest.warns(UserWarning, match="compiled layers fail, .*: RuntimeError: no such compiler$") as caught:
        trainer.train()
    assert len([w for w in caught if "compiled layers" in str(w.message)]) == 1
    for one, other in zip(plain.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_failure_of_the_plain_layers_is_raised(make_trainer, prompts, monkeypatch):
    trainer = make_trainer()
    rollout = trainer.rollout(prompts)
    monkeypatch.setattr(trainer.model, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        numbers(trainer, rollout, [0, 1], compiled=False)


def test_a_run_whose_layers_are_always_compiled(make_trainer, graphs):
    metrics = [make_trainer(compile=setting).train() for setting in ("never", "always")]
    assert graphs
    timings = ("time/", "rate/")
    same = {name: x for name, x in metrics[0].items() if not name.startswith(timings)}
    assert {name: metrics[1][name] for name in same} == pytest.approx(same, rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "precision"), [("gpt2", "bf16"), ("llama", "fp32")])
def test_real_code(make_trainer, make_model, wake_critic, prompts, monkeypatch, kind, precision):
    """By inductor, which needs a C++ compiler."""
    monkeypatch.setattr(module, "BACKEND", "inductor")
    trainer = make_trainer(model=make_model(kind), precision=precision)
    wake_critic(trainer.model)
    assert_equal_numbers(trainer, trainer.rollout(prompts), rtol=1e-4 if precision == "fp32" else 0.03)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_real_code_on_a_gpu(make_trainer, make_model, wake_critic, prompts, monkeypatch, precision):
    monkeypatch.setattr(module, "BACKEND", "inductor")
    trainer = make_trainer(model=make_model("llama"), precision=precision, device="cuda")
    wake_critic(trainer.model)
    assert_equal_numbers(trainer, trainer.rollout(prompts), rtol=1e-3 if precision == "fp32" else 0.03)
