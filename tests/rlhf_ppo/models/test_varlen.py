"""Packed sequences as on a GPU: one kernel for all gives the numbers of plain attention, or is not used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_kernels import as_on_a_gpu, torch_2_10, torch_2_11, torch_2_13
from peft import LoraConfig
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel

from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward import varlen
from rlhf_ppo.models.forward.forward_checks import check_forward
from rlhf_ppo.models.forward.packing import Packing, packed_attention
from rlhf_ppo.models.forward.varlen import causal_attention, kernel_dtype
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.rewards import shape_rewards
from rlhf_ppo.training.rollouts.collect import read_reference

CPU = torch.device("cpu")


def inputs(lengths: list[int], heads: int, key_heads: int, width: int, **kind: Any) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = [(sum(lengths), n, width) for n in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=draw).to(**kind).requires_grad_() for shape in shapes]


# The kernel


@pytest.mark.parametrize("kernel", [torch_2_10, torch_2_11, torch_2_13])
@pytest.mark.parametrize(("heads", "scale"), [((2, 2), None), ((4, 2), 0.3)])
def test_each_version_of_torch_is_called_as_it_wants(monkeypatch, kernel, heads, scale):
    """Each sequence alone, by formula: softmax(scale q k) v over the tokens so far."""
    as_on_a_gpu(monkeypatch, kernel)
    lengths = [2, 2, 5]
    q, k, v = inputs(lengths, *heads, 8)
    found = causal_attention(q, k, v, Packing(tuple(lengths), CPU).bounds, 5, scale)
    parts = zip(*(x.split(lengths) for x in (q, k, v, found)), strict=True)
    for query, key, value, got in parts:
        for t in range(len(query)):
            for head in range(heads[0]):
                of = head * heads[1] // heads[0]
                scores = (key[: t + 1, of] @ query[t, head]) * (8**-0.5 if scale is None else scale)
                torch.testing.assert_close(got[t, head], scores.softmax(dim=0) @ value[: t + 1, of])


@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_installed_torch_takes_the_call(key_heads):
    """Its own kernel's shapes, on the meta device, which computes nothing."""
    q, k, v = inputs([3, 5], 4, key_heads, 64, device="meta", dtype=torch.bfloat16)
    bounds = torch.empty(3, dtype=torch.int32, device="meta")
    found = varlen._call_kernel(q, k, v, bounds, 5, 0.3)
    assert found.shape == (8, 4, 64) and found.dtype == torch.bfloat16
    gradients = torch.autograd.grad(found, (q, k, v), torch.empty_like(found))
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]


def forgetful(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Attend as it should, with half of the gradient."""
    right = torch_2_13(*args, **kwargs)
    return (right + right.detach()) / 2


def unable(*args: Any, **kwargs: Any) -> torch.Tensor:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer")


@pytest.mark.parametrize(("kernel", "packs"), [(torch_2_13, True), (forgetful, False), (unable, False)])
def test_a_model_whose_kernel_is_wrong_is_padded(make_model, monkeypatch, kernel, packs):
    calls = as_on_a_gpu(monkeypatch, torch_2_13)
    model = ActorCritic(make_model("llama"))
    assert calls and model.runner.packs
    varlen._require_right.cache_clear()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    check_forward(model, decodes=False)
    assert model.runner.packs == packs


def test_the_kernel_is_for_16_bits_on_a_gpu(monkeypatch):
    def query(device: str, dtype: torch.dtype) -> Any:
        return SimpleNamespace(device=torch.device(device), dtype=dtype)

    assert kernel_dtype(query("cpu", torch.bfloat16)) is None
    assert kernel_dtype(query("cuda", torch.float32)) is None
    assert kernel_dtype(query("cuda", torch.bfloat16)) is torch.bfloat16
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    assert kernel_dtype(query("cuda", torch.float32)) is torch.bfloat16


def test_a_bias_on_the_scores_is_refused_by_the_kernel(monkeypatch):
    as_on_a_gpu(monkeypatch)
    q = torch.ones(1, 2, 8, 4)
    with packed_attention(GPT2Config(), Packing((3, 5), CPU)):
        attend = AttentionInterface()["rlhf_ppo_packed"]
        assert attend(None, q, q, q, None)[0].shape == (1, 8, 2, 4)
        with pytest.raises(NotImplementedError, match="takes no bias"):
            attend(None, q, q, q, None, position_bias=q)


# Minibatches


class Own(GPT2LMHeadModel):
    """A user's class, whose own forward pass is run."""


def own(model: Any) -> Any:
    model.__class__ = Own
    return model


def scaled(model: Any) -> Any:
    """Scores with a factor of their own, as Granite's."""
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.9
    return model


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)


def reply(messages: list[dict[str, str]]) -> str | None:
    turns = sum(message["role"] == "assistant" for message in messages)
    return None if len(messages[0]["content"]) % 3 == turns else " and" * turns


KINDS: dict[str, Any] = {
    "gpt2": lambda make: {"model": make("gpt2"), "ent_coef": 0.1},
    "grouped heads, own critic": lambda make: {"model": make("llama"), "value_model": make("llama", seed=1)},
    "two adapters": lambda make: {"model": make("llama"), "peft_config": lora(), "critic": "adapter"},
    "exact KL": lambda make: {"model": scaled(make("qwen2")), "kl_loss_coef": 0.5, "kl_loss": "exact"},
    "turns": lambda make: {"model": make("llama"), "respond": reply, "max_turns": 3, "max_new_tokens": 4},
    "banned tokens": lambda make: {"model": make("gpt2"), "min_new_tokens": 3},
    "recomputed": lambda make: {"model": make("llama"), "gradient_checkpointing": True, "peft_config": lora()},
    "own forward": lambda make: {"model": own(make("gpt2")), "ent_coef": 0.1},
}


def gradients(trainer: Any, rollout: Any, experience: Any, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Compute the gradient of the rows' loss, and the reference's log-probs."""
    run, model = trainer.fixed, trainer.model
    model.zero_grad()
    numbers = {"reference": read_reference(run, model, rollout).ref_logprobs}
    run.gradient(model, rollout, experience, rows, run.args, bf16=False, reference=run.reference)
    return numbers | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_one_kernel_gives_the_padded_ways_gradients(make_trainer, make_model, wake_critic, prompts, monkeypatch, kind):
    trainer = make_trainer(**KINDS[kind](make_model))
    wake_critic(trainer.model)
    runners = [trainer.model.runner, trainer.model.value_runner, trainer.reference.runner]
    runners = [runner for runner in runners if runner is not None]
    assert all(runner.packs for runner in runners)
    rollout = trainer.rollout(prompts)
    experience = estimate(rollout, shape_rewards(rollout, trainer.args, trainer.kl_coef), trainer.args).experience
    rows = [[0, 3, 5], [1, 2, 4, 6, 7]]
    with monkeypatch.context() as patch:
        calls = as_on_a_gpu(patch)
        packed = gradients(trainer, rollout, experience, rows)
        assert len(calls) > 2
        # A process without rows makes a pass whose gradient is 0.
        empty = gradients(trainer, rollout, experience, [[]])
    for runner in runners:
        runner.packs = False
    padded = gradients(trainer, rollout, experience, rows)
    assert packed.keys() == padded.keys() == empty.keys()
    largest = max(float(x.abs().max()) for name, x in padded.items() if name != "reference")
    assert largest > 0
    for name, expected in padded.items():
        # Sums over tokens in another order: float32 rounding of the largest gradient.
        near = {"atol": 2e-5, "rtol": 1e-5} if name == "reference" else {"atol": 2e-5 * max(largest, 1), "rtol": 1e-4}
        torch.testing.assert_close(packed[name], expected, **near, msg=lambda text, name=name: f"{name}: {text}")
        assert name == "reference" or not empty[name].any()


@pytest.mark.parametrize("packs", [False, True])
def test_the_output_layer_sees_response_tokens_alone(make_trainer, prompts, packs):
    trainer = make_trainer()
    runner = trainer.model.runner
    runner.packs = packs
    part = trainer.rollout(prompts).sequences([0, 1, 2])
    outputs = runner.outputs(part)
    assert outputs.states is not None and len(outputs.states) == int(part.mask.sum()) < part.mask.numel()
    # A layout that is read from the masks is the same.
    torch.testing.assert_close(outputs.states, runner.outputs(part._replace(layout=None)).states, rtol=0, atol=0)


# On a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "width"), [((12, 12), 64), ((32, 4), 64), ((8, 2), 128), ((4, 4), 80), ((2, 1), 256)]
)
def test_torchs_kernel_gives_plain_attentions_numbers(dtype, heads, width):
    lengths = [1, 7, 64, 129, 300]
    q, k, v = inputs(lengths, *heads, width, device="cuda", dtype=dtype)
    found = causal_attention(q, k, v, Packing(tuple(lengths), q.device).bounds, 300, None)
    parts = zip(*(x.float().split(lengths) for x in (q, k, v)), strict=True)
    expected = torch.cat([varlen._plain(*part) for part in parts])
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)
    upstream = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, (q, k, v), upstream.to(dtype)),
        torch.autograd.grad(expected, (q, k, v), upstream),
        strict=True,
    ):
        assert (one - other).abs().max() < 0.02 * other.abs().max()


@pytest.mark.cuda
@pytest.mark.parametrize("width", [12, 320])
def test_heads_that_torchs_kernel_does_not_take_raise_an_error(width):
    """12 is no multiple of 8, and 320 above 256: such models are padded."""
    q, k, v = inputs([3, 5], 2, 2, width, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError):
        causal_attention(q, k, v, Packing((3, 5), q.device).bounds, 5, None)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("kind", "precision", "packs"), [("gpt2", "bf16", True), ("llama", "bf16", True), ("llama", "fp32", False)]
)
def test_a_gpu_packs_in_bf16_as_it_pads(make_trainer, make_model, wake_critic, prompts, kind, precision, packs):
    trainer = make_trainer(make_model(kind), device="cuda", precision=precision, max_initial_log_ratio=10.0)
    wake_critic(trainer.model)
    runners = [trainer.model.runner, trainer.reference.runner]
    assert [runner.packs for runner in runners] == [packs] * 2
    rollout = trainer.rollout(prompts)
    part = rollout.sequences(list(range(8)))
    found = []
    for runner_packs in (packs, False):
        for runner in runners:
            runner.packs = runner_packs
        trainer.model.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16"):
            output = trainer.model(*part)
            reference = trainer.reference.logprobs(part, temperature=1.0)
        (output.logprobs.sum() + output.values.sum()).backward()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.policy_parameters() if p.grad is not None])
        found.append((output.logprobs.detach(), output.values.detach(), reference, gradient))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 0.05 * other.abs().max()
