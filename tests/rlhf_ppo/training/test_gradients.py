"""Gradients by rows, clipping inside the fused step: the same step as the ordinary one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rlhf_ppo.training.gradients import accumulate_gradients, clear_gradients, clip_and_step

VOCABULARY, WIDTH = 11, 4


class Toy(nn.Module):
    """Token and position embeddings, a layer, an output layer that may share the token embedding's weights."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH, padding_idx=1), nn.Embedding(6, WIDTH)
        self.middle, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.frozen, self.unused = nn.Embedding(VOCABULARY, WIDTH).requires_grad_(False), nn.Linear(WIDTH, WIDTH)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states = self.tokens(ids) + self.places(torch.arange(ids.shape[1])) + self.frozen(ids)
        return self.head(torch.tanh(self.middle(states))).log_softmax(-1)


def toy(tied: bool) -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Toy(tied)


def microbatches(steps: int) -> list[list[torch.Tensor]]:
    """Three of unequal size a step, ids repeated within and between them, the padding id among them."""
    generator = torch.Generator().manual_seed(1)
    return [[torch.randint(8, size, generator=generator) for size in ((3, 6), (1, 2), (2, 4))] for _ in range(steps)]


def loss(model: Toy, ids: torch.Tensor) -> torch.Tensor:
    return -model(ids).gather(-1, ids[..., None]).sum()


def sparse_flags(model: nn.Module) -> list[bool]:
    return [module.sparse for module in model.modules() if isinstance(module, nn.Embedding)]


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_the_dense_ones(tied):
    lean, plain = toy(tied), toy(tied)
    for step in microbatches(2):
        for ids in step:
            with accumulate_gradients(lean):
                assert sparse_flags(lean) == [True, True, False]
                loss(lean, ids).backward()
            loss(plain, ids).backward()
            assert not any(sparse_flags(lean))
            for (name, a), b in zip(lean.named_parameters(), plain.parameters(), strict=True):
                assert (a.grad is None) == (b.grad is None), name
                if b.grad is not None:
                    assert a.grad.layout == torch.strided, name
                    torch.testing.assert_close(a.grad, b.grad)
        clear_gradients(lean)
        plain.zero_grad()
        assert all(p.grad is None or not p.grad.any() for p in lean.parameters())
    # Kept where no output layer writes, so that the next one need not be allocated.
    assert (lean.tokens.weight.grad is None) == tied and lean.places.weight.grad is not None


def test_an_error_restores_the_embeddings():
    model = toy(False)
    with pytest.raises(RuntimeError, match="in between"), accumulate_gradients(model):
        loss(model, torch.tensor([[1, 2]])).backward()
        raise RuntimeError("in between")
    assert not any(sparse_flags(model))
    assert all(p.grad is None or p.grad.layout == torch.strided for p in model.parameters())


def test_an_embedding_that_its_owner_made_sparse_stays_so():
    model = toy(False)
    model.places.sparse = True
    with accumulate_gradients(model):
        loss(model, torch.tensor([[1, 2]])).backward()
    assert model.places.sparse and not model.tokens.sparse


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_steps_are_those_of_clip_grad_norm_and_adamw(tied, max_norm):
    """With a small bound and one that clips nothing; moments and learning rate go on over several steps."""
    lean, plain = toy(tied), toy(tied)
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    fused = torch.optim.AdamW([p for p in lean.parameters() if p.requires_grad], fused=True, **settings)
    usual = torch.optim.AdamW(
        [p for p in plain.parameters() if p.requires_grad], fused=False, foreach=False, **settings
    )
    for step in microbatches(4):
        for ids in step:
            with accumulate_gradients(lean):
                loss(lean, ids).backward()
            loss(plain, ids).backward()
        norm, finite = clip_and_step(fused, fused.param_groups[0]["params"], max_norm)
        expected = nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
        usual.step()
        assert finite and expected > 0.5
        torch.testing.assert_close(norm, expected)
        clear_gradients(lean)
        plain.zero_grad()
        for (name, a), b in zip(lean.named_parameters(), plain.named_parameters(), strict=True):
            # torch divides by norm + 1e-6; what the step does to that is below its own rounding.
            torch.testing.assert_close(a, b[1], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_changes_nothing(bad):
    model = toy(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)

    def step(poison: float | None) -> torch.Tensor:
        clear_gradients(model)
        with accumulate_gradients(model):
            loss(model, torch.tensor([[1, 2, 3]])).backward()
        if poison is not None:
            model.middle.weight.grad[0, 0] = poison
        return clip_and_step(optimizer, list(model.parameters()), 0.5)[1]

    def state() -> list[torch.Tensor]:
        moments = [x.clone() for facts in optimizer.state.values() for x in facts.values()]
        return [*(p.detach().clone() for p in model.parameters()), *moments]

    assert step(None)
    before = state()
    assert not step(bad)
    after = state()
    assert len(after) == len(before) and all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    # And the next good one counts again.
    assert step(None)
    steps = [int(facts["step"]) for facts in optimizer.state.values()]
    assert set(steps) == {2}
