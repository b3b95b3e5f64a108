"""Activations: computing layers again, or keeping what they save elsewhere, changes memory and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from rlhf_ppo.models.acceleration.activation_memory import checkpoint_layers, offload_activations
from rlhf_ppo.models.adapters.lora import VALUE_ADAPTER, adapter_parameters
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.rewards import shape_rewards


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_dropout=0.5, task_type="CAUSAL_LM", init_lora_weights=False)


def gradients(trainer, rollout) -> dict[str, torch.Tensor]:
    old = estimate(rollout, shape_rewards(rollout, trainer.args, trainer.kl_coef), trainer.args).experience
    trainer.fixed.minibatch_gradient(trainer.model, rollout, old, list(range(8)), trainer.args)
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def saved_bytes(trainer, rollout) -> int:
    """Bytes that one forward pass keeps for the backward pass, weights left out."""
    storages: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = trainer.model(*rollout.sequences(list(range(8))))
        total = sum(storages.values())
        del out
    return total


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])  # OPT's layers call dropout as a function
@pytest.mark.parametrize("critic", ["shared", "separate", "adapter"])
def test_checkpointed_layers_give_the_same_gradients(make_trainer, make_model, wake_critic, prompts, kind, critic):
    """Also where sequences are packed, and where another adapter than the policy's was in force."""
    extra = {
        "shared": dict,
        "separate": lambda: {"value_model": make_model(kind, seed=1)},
        "adapter": lambda: {"critic": "adapter", "peft_config": lora()},
    }[critic]
    found = []
    for on in (False, True):
        trainer = make_trainer(model=make_model(kind), gradient_checkpointing=on, vf_coef=0.5, **extra())
        wake_critic(trainer.model)
        found.append(gradients(trainer, trainer.rollout(prompts)))
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys() and len(plain) > 4
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5)
    if critic == "adapter":
        assert any(f".{VALUE_ADAPTER}." in name and (g != 0).any() for name, g in checkpointed.items())


def test_checkpointed_layers_keep_less(make_trainer, make_model, prompts):
    """Two layers of GPT-2: what is left are their inputs, the norms outside and the head."""
    plain, checkpointed = (make_trainer(gradient_checkpointing=on) for on in (False, True))
    rollout = plain.rollout(prompts)
    assert saved_bytes(checkpointed, rollout) < 0.4 * saved_bytes(plain, rollout)


def test_checkpointing_changes_no_rollout_and_no_run(make_trainer, prompts):
    """Decoding keeps its cache; the whole run is the same up to rounding."""
    trainers = [make_trainer(gradient_checkpointing=on) for on in (False, True)]
    rollouts = [trainer.rollout(prompts) for trainer in trainers]
    assert torch.equal(rollouts[0].response_ids, rollouts[1].response_ids)
    assert torch.equal(rollouts[0].logprobs, rollouts[1].logprobs)
    metrics = [trainer.step(rollout) for trainer, rollout in zip(trainers, rollouts, strict=True)]
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-4, abs=1e-6)


def test_a_copy_of_a_checkpointed_model_computes_with_its_own_weights(make_model):
    model = make_model().eval()
    checkpoint_layers(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.transformer.h[0].parameters():
            p.zero_()
    ids = torch.tensor([[3, 4, 5]])
    assert not torch.allclose(twin(ids).logits, model(ids).logits)


def test_a_model_without_layers_of_transformers_is_refused():
    with pytest.raises(ValueError, match="gradient_checkpointing: the model has no layers"):
        checkpoint_layers(nn.Linear(2, 2))


def test_offloading_is_refused_without_a_gpu(make_trainer):
    with pytest.raises(ValueError, match=r"offload_activations=True moves activations from a GPU .* device is 'cpu'"):
        make_trainer(offload_activations=True)


def test_offloading_moves_what_is_computed_and_no_weight():
    """On a CPU the move is a copy, so the gradients are the plain ones; the weights are not even copied."""
    layer, x = nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
    with offload_activations(on=True):
        kept = layer(x).relu()
    saved = kept.grad_fn.next_functions[0][0]  # the linear layer's own node
    kept.sum().backward()
    moved = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(x).relu().sum().backward()
    assert torch.equal(moved, layer.weight.grad) and saved is not None
    packed: list[torch.Tensor] = []
    hooks = offload_activations(on=True)
    pack = hooks.pack_hook
    hooks.pack_hook = lambda t: packed.append(pack(t)) or packed[-1]
    with hooks:
        layer(x)
    weights = [p for p in packed if isinstance(p, torch.Tensor)]
    assert len(weights) == 1 and weights[0].data_ptr() == layer.weight.data_ptr() and len(packed) == 2


def test_offloading_off_is_nothing(make_trainer, prompts):
    with offload_activations(on=False) as nothing:
        assert nothing is None


def test_the_value_adapter_is_the_one_that_is_recomputed(make_trainer, wake_critic, prompts):
    """The backward pass runs when the policy's adapter is in force again."""
    trainer = make_trainer(critic="adapter", peft_config=lora(), gradient_checkpointing=True)
    wake_critic(trainer.model)
    rollout = trainer.rollout(prompts)
    trainer.model(*rollout.sequences(list(range(8)))).values.sum().backward()
    value = adapter_parameters(trainer.model.policy, VALUE_ADAPTER)
    assert all(p.grad is not None and (p.grad != 0).any() for p in value)
    assert all(p.grad is None for p in trainer.model.policy_parameters())
    assert trainer.model.policy.active_adapter == "default"
