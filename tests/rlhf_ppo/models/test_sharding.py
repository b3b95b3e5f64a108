"""Sharded models: every number is that of a model on one process, and each process holds its share alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import in_forks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from rlhf_ppo.core import PolicyOutput
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.adapters.lora import VALUE_ADAPTER, add_value_adapter
from rlhf_ppo.models.forward.runner import Sequences, position_ids
from rlhf_ppo.models.reference import Reference
from rlhf_ppo.models.sharded.sharding import (
    gathered,
    local_part,
    make_sharding,
    shard,
    total_norm,
    transformer_layers,
    whole_parameters,
    whole_tensor,
    whole_weights,
)

KINDS = [("gpt2", "shared"), ("llama", "separate"), ("gpt2", "lora"), ("llama", "adapter")]


def build(make_model: Any, kind: str, critic: str) -> ActorCritic:
    torch.manual_seed(0)
    policy, value_adapter = make_model(kind), None
    trunk = copy.deepcopy(policy.base_model) if critic == "separate" else None
    if critic in ("lora", "adapter"):
        from peft import LoraConfig, get_peft_model

        policy = get_peft_model(policy, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
        if critic == "adapter":
            add_value_adapter(policy, as_policy=True)
            value_adapter = VALUE_ADAPTER
    model = ActorCritic(policy.double(), value_trunk=trunk, value_adapter=value_adapter).double()
    assert model.value_head is not None
    nn.init.constant_(model.value_head.weight, 0.1)
    return model


def sequences() -> Sequences:
    """Four of different lengths."""
    draw = torch.Generator().manual_seed(1)
    prompt_mask, mask = torch.ones(4, 5, dtype=torch.bool), torch.ones(4, 6, dtype=torch.bool)
    prompt_mask[1, :2], mask[2, 3:] = False, False
    prompts, responses = (torch.randint(3, 30, (4, n), generator=draw) for n in (5, 6))
    return Sequences(prompts, prompt_mask, responses, mask)


def loss_of(model: ActorCritic, rows: list[int]) -> Tensor:
    output = model(*(x[rows] for x in sequences()[:4]))
    return output.logprobs.sum() + (output.values**2).sum() + 0.1 * output.entropy.sum()


def train(model: ActorCritic, microbatches: list[list[int]], *, several: bool) -> Tensor:
    """Take two optimizer steps; returns the gradient's norm at each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([local_part(p) for p in parameters], lr=1e-2, fused=True)
    norms = []
    for _ in range(2):
        for rows in microbatches:
            loss_of(model, rows).backward() if rows else (loss_of(model, [0]) * 0).backward()
        for parameter in whole_parameters(model) if several else ():
            dist.all_reduce(parameter.grad)
        norms.append(total_norm([p.grad for p in parameters if p.grad is not None]))
        for parameter in parameters:
            local_part(parameter)
        optimizer.step()
        model.zero_grad()
    return torch.stack(norms)


def decode(model: ActorCritic) -> Tensor:
    prompts, prompt_mask, responses = sequences()[:3]
    cache, positions = model.runner.new_cache(8), position_ids(prompt_mask)
    model.decode(prompts, positions, prompt_mask, cache)
    longer = torch.cat([prompt_mask, torch.ones(4, 1, dtype=torch.bool)], dim=1)
    return model.decode(responses[:, :1], positions[:, -1:] + 1, longer, cache)[0].detach()


def measure(model: ActorCritic, rank: int | None) -> dict[str, Tensor]:
    """Train and evaluate a model, on one process (None) or as one of two."""
    shares = {None: [[0, 1], [2], [3]], 0: [[0, 1], [2]], 1: [[3], []]}
    norms = train(model, shares[rank], several=rank is not None)
    with torch.no_grad():
        found = {"norms": norms, "logits": decode(model), "values": model.head_values(sequences())}
        with gathered(model):
            tokens = sequences().response_ids[sequences().mask]
            found["logprobs"], _ = model.runner.outputs(sequences()).logprobs(tokens, temperature=1.0)
    return found | {name: whole_tensor(p.detach()) for name, p in model.named_parameters()}


@pytest.mark.parametrize(("kind", "critic"), KINDS)
def test_two_processes_that_share_weights_learn_what_one_learns(make_model, kind, critic):
    one = build(make_model, kind, critic)

    def work(rank: int) -> dict[str, Tensor]:
        model = build(make_model, kind, critic)
        shard(model, make_sharding(hybrid=False, device=torch.device("cpu"), bf16=False))
        return measure(model, rank)

    both = in_forks(2, work)
    alone = measure(one, None)
    for found in both:
        assert found.keys() == alone.keys()
        for name, x in alone.items():
            torch.testing.assert_close(found[name], x, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


def sharded(make_model: Any, kind: str = "gpt2", critic: str = "shared", *, bf16: bool = False) -> ActorCritic:
    model = build(make_model, kind, critic)
    shard(model if not bf16 else model.float(), make_sharding(hybrid=False, device=torch.device("cpu"), bf16=bf16))
    return model


def test_a_process_holds_its_share_of_matrices_gradients_and_optimizer_alone(make_model):
    def work(rank: int) -> int:
        model = sharded(make_model)
        loss_of(model, [rank]).backward()
        parts = [local_part(p) for p in model.parameters()]
        storages = [x.untyped_storage() for p in parts for x in (p, p.grad) if x is not None]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    model = build(make_model, "gpt2", "shared")
    vectors = sum(p.numel() for p in model.parameters() if min(p.shape) == 1 or p.ndim == 1)
    matrices = sum(p.numel() for p in model.parameters()) - vectors
    row = 2 * 64 * 8  # the vocabulary's 30 rows and the others' 16 divide evenly; padding would be at most a row each
    for held in in_forks(2, work):
        assert held <= 16 * (vectors + matrices / 2) + row


def test_with_whole_weights_processes_need_not_decode_together(make_model):
    def work(rank: int) -> list[int]:
        model = sharded(make_model)
        with torch.no_grad(), whole_weights(model, model.policy):
            for _ in range(rank * 2):
                decode(model)
            held = sum(p.numel() for p in model.policy.parameters() if not isinstance(p, DTensor))
        after = sum(p.numel() for p in model.policy.parameters() if not isinstance(p, DTensor))
        return [held, after]

    model = build(make_model, "gpt2", "shared").policy
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert in_forks(2, work) == [[sum(p.numel() for p in model.parameters()), vectors]] * 2


def test_bfloat16_shards_give_the_gradient_that_autocast_gives(make_model):
    def gradient(model: ActorCritic, rows: list[int]) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, rows)
        loss.backward()
        return [whole_tensor(p.grad) for p in model.parameters() if p.grad is not None and p.ndim > 1]

    def work(rank: int) -> list[Tensor]:
        return gradient(sharded(make_model, "llama", bf16=True), [2 * rank, 2 * rank + 1])

    halves = [gradient(build(make_model, "llama", "shared").float(), rows) for rows in ([0, 1], [2, 3])]
    for found in in_forks(2, work):
        for x, *parts in zip(found, *halves, strict=True):
            assert x.dtype == torch.float32
            # The value head's gradient, a row, is this process's own.
            torch.testing.assert_close(x, sum(parts)) if min(x.shape) > 1 else None


def test_a_sharded_reference_reads_what_a_whole_one_reads(make_model):
    def work(rank: int) -> Tensor:
        reference = Reference(make_model("llama"), None, adapter_off=False)
        assert reference.model is not None
        shard(reference.model, make_sharding(hybrid=False, device=torch.device("cpu"), bf16=False))
        return reference.logprobs(sequences(), temperature=0.7)

    alone = Reference(make_model("llama"), None, adapter_off=False).logprobs(sequences(), temperature=0.7)
    for found in in_forks(2, work):
        torch.testing.assert_close(found, alone)


def test_gathering_twice_keeps_weights_until_the_outer_end(make_model):
    def work(rank: int) -> list[bool]:
        model = sharded(make_model)

        def is_whole() -> bool:
            assert model.runner.head is not None
            return not isinstance(model.runner.head.weight, DTensor)

        with gathered(model):
            with gathered(model):
                inner = is_whole()
            between = is_whole()
        return [inner, between, is_whole()]

    assert in_forks(2, work) == [[True, True, False]] * 2


def test_a_model_without_known_layers_is_refused():
    with pytest.raises(ValueError, match="sharding='none'"):
        transformer_layers(nn.Linear(2, 2))


def test_fsdp_finds_every_tensor_that_a_backward_pass_can_enter_by():
    """Without that torch 2.11 does not gather the output layer for its own backward pass."""
    x = torch.zeros(2, requires_grad=True)
    output = PolicyOutput(x, x + 1, None, x + 2)
    found = {id(leaf) for leaf in tree_leaves(output) if leaf is not None}
    assert found == {id(t) for t in (output.logprobs, output.values, output.kl)}
