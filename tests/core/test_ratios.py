"""Proves that pooled ratios are means over exactly the right actions, and that capped weights are what they say."""

import math

import pytest
import torch
from helpers import f64
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_ppo.core import importance_weights, pool_old_logprobs, truncated_importance_weights

seeds = st.integers(0, 10_000)


def drawn(seed, rows=3, steps=6):
    g = torch.Generator().manual_seed(seed)
    new, old = (torch.randn(rows, steps, generator=g, dtype=torch.float64) - 2 for _ in range(2))
    mask = torch.rand(rows, steps, generator=g) > 0.3
    return new, old, mask, torch.randint(3, (rows, steps), generator=g)


class TestPooling:
    old = f64([[-1.0, -2, -3, -4], [-1, -1, 7, 7]])
    log_ratios = f64([[0.4, 0.2, -0.3, 0.1], [0.5, -0.1, 7, 7]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    turns = torch.tensor([[0, 0, 2, 2], [0, 1, -9, -9]])  # what lies outside the mask is not read

    def pooled(self, level):
        new = self.old + self.log_ratios
        return keep(new, self.mask) - pool_old_logprobs(new, self.old, self.mask, level=level, turns=self.turns)

    def test_by_hand(self):
        assert_close(self.pooled("token"), f64([[0.4, 0.2, -0.3, 0.1], [0.5, -0.1, 0, 0]]))
        # (0.4 + 0.2 - 0.3 + 0.1) / 4 = 0.1 and (0.5 - 0.1) / 2 = 0.2
        assert_close(self.pooled("sequence"), f64([[0.1] * 4, [0.2, 0.2, 0, 0]]))
        # Turn 0: (0.4 + 0.2) / 2, turn 2: (-0.3 + 0.1) / 2; the second row's turns have one action each.
        assert_close(self.pooled("turn"), f64([[0.3, 0.3, -0.1, -0.1], [0.5, -0.1, 0, 0]]))

    @pytest.mark.parametrize("level", ["token", "turn", "sequence"])
    def test_the_gradient_is_each_actions_own(self, level):
        new = (self.old + self.log_ratios).requires_grad_()
        pooled = new - pool_old_logprobs(new, self.old, self.mask, level=level, turns=self.turns)
        upstream = torch.arange(1.0, 9.0, dtype=torch.float64).view(2, 4)
        assert_close(torch.autograd.grad(pooled, new, upstream)[0], upstream)

    @given(seeds)
    def test_turns_between_the_two_extremes(self, seed):
        new, old, mask, turns = drawn(seed)

        def level(name, turns=None):
            return pool_old_logprobs(new, old, mask, level=name, turns=turns)

        each_its_own = torch.arange(6).expand(3, 6)
        assert_close(level("turn", each_its_own), level("token"))
        assert_close(level("turn", torch.full_like(turns, 4)), level("sequence"))
        # A turn is a sequence of its own: cutting rows apart at turns gives the same.
        for turn in range(3):
            own = mask & (turns == turn)
            apart = pool_old_logprobs(new, old, own, level="sequence")
            assert_close(level("turn", turns)[own], apart[own])

    @given(seeds, st.sampled_from(["turn", "sequence"]))
    def test_garbage_padding_and_other_rows_change_nothing(self, seed, level):
        new, old, mask, turns = drawn(seed)
        expected = pool_old_logprobs(new, old, mask, level=level, turns=turns)
        dirty = [x.masked_fill(~mask, float("nan")) for x in (new, old)]
        assert torch.equal(pool_old_logprobs(*dirty, mask, level=level, turns=turns), expected)
        for row in range(3):
            one = pool_old_logprobs(new[[row]], old[[row]], mask[[row]], level=level, turns=turns[[row]])
            assert_close(one, expected[[row]])

    def test_empty_rows_and_no_steps(self):
        nothing = torch.zeros(2, 3, dtype=torch.bool)
        x, turns = torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.long)
        for level in ("token", "turn", "sequence"):
            assert torch.equal(pool_old_logprobs(x, x, nothing, level=level, turns=turns), torch.zeros(2, 3))
            assert pool_old_logprobs(x[:, :0], x[:, :0], nothing[:, :0], level=level, turns=turns[:, :0]).numel() == 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_small_dtypes_pool_in_float32(self, dtype, device):
        new, old, mask, _ = drawn(1)
        new, old, mask = new.to(device, dtype), old.to(device, dtype), mask.to(device)
        pooled = pool_old_logprobs(new, old, mask, level="sequence")
        assert pooled.dtype == torch.float32
        assert torch.equal(pooled, pool_old_logprobs(new.float(), old.float(), mask, level="sequence"))

    def test_errors(self):
        x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
        with pytest.raises(ValueError, match="unknown ratio level 'row'; known: token, turn, sequence"):
            pool_old_logprobs(x, x, mask, level="row")
        with pytest.raises(ValueError, match=r"ratio_level='sequence' needs rows.*\(3,\)"):
            pool_old_logprobs(x[0], x[0], mask[0], level="sequence")
        with pytest.raises(ValueError, match=r"ratio_level='turn' needs turns"):
            pool_old_logprobs(x, x, mask, level="turn")
        for wrong in (-1, 3):
            with pytest.raises(ValueError, match=rf"turns must lie in \[0, 3\), got .*{wrong}"):
                pool_old_logprobs(x, x, mask, level="turn", turns=torch.tensor([[0, 0, wrong]] * 2))
        with pytest.raises(ValueError, match=r"turns \(2, 1\) and logprobs \(2, 3\)"):
            pool_old_logprobs(x, x, mask, level="turn", turns=torch.zeros(2, 1, dtype=torch.long))
        with pytest.raises(ValueError, match="bool"):
            pool_old_logprobs(x, x, mask.float(), level="sequence")


class TestImportanceWeights:
    def test_by_hand(self):
        # exp(log 2) = 2, exp(log .5) = .5, exp(log 5) = 5 beyond the cap, exp(0) = 1
        gap = f64([2.0, 0.5, 5.0, 1.0]).log()
        assert_close(truncated_importance_weights(gap - 3, torch.full_like(gap, -3), cap=3.0), f64([2.0, 0.5, 3.0, 1]))

    def test_an_endless_cap_is_plain_importance_sampling(self):
        """On an enumerable vocabulary: the weighted mean over the sampler's draws is the trainer's mean."""
        sampler, trainer = (torch.randn(7, dtype=torch.float64).log_softmax(0) for _ in range(2))
        f = torch.randn(7, dtype=torch.float64)
        weights = truncated_importance_weights(trainer, sampler, cap=math.inf)
        assert_close((sampler.exp() * weights * f).sum(), (trainer.exp() * f).sum())

    def test_a_gap_of_100_nats_is_finite(self):
        weights = truncated_importance_weights(torch.tensor([0.0, -100.0]), torch.tensor([-100.0, 0.0]), cap=2.0)
        assert weights[0] == 2 and 0 < weights[1] < 1e-8

    @pytest.mark.parametrize(
        ("level", "mode", "expected"),
        [
            # Ratios 2, .5, 5 and 3, .1 (and one outside the mask); products 5 and .3; the cap is 4.
            ("token", "truncate", [[2.0, 0.5, 4.0], [3.0, 0.1, 0.0]]),
            ("token", "mask", [[2.0, 0.5, 0.0], [3.0, 0.1, 0.0]]),
            ("sequence", "truncate", [[4.0, 4.0, 4.0], [0.3, 0.3, 0.0]]),
            ("sequence", "mask", [[0.0, 0.0, 0.0], [0.3, 0.3, 0.0]]),
        ],
    )
    def test_levels_and_modes_by_hand(self, level, mode, expected):
        ratios = f64([[2.0, 0.5, 5.0], [3.0, 0.1, math.nan]])
        mask = torch.tensor([[True, True, True], [True, True, False]])
        found = importance_weights(ratios.log() - 1, -torch.ones_like(ratios), mask, cap=4.0, level=level, mode=mode)
        assert_close(found, f64(expected))

    def test_an_endless_cap_gives_whole_responses_their_true_mean(self):
        """Two steps of a two-letter alphabet, where the second depends on the first: the weight is the product."""
        sampler, trainer = (torch.randn(3, 2, dtype=torch.float64).log_softmax(-1) for _ in range(2))
        words = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])

        def logprobs(table):
            return torch.stack([table[0, words[:, 0]], table[1 + words[:, 0], words[:, 1]]], dim=1)

        ours, theirs, f = logprobs(trainer), logprobs(sampler), torch.randn(4, dtype=torch.float64)
        weights = importance_weights(ours, theirs, torch.ones(4, 2, dtype=torch.bool), cap=math.inf, level="sequence")
        assert_close((theirs.sum(1).exp() * weights[:, 0] * f).sum(), (ours.sum(1).exp() * f).sum())
        assert torch.equal(weights[:, 0], weights[:, 1])

    def test_errors(self):
        x, mask = torch.zeros(2), torch.ones(2, dtype=torch.bool)
        with pytest.raises(ValueError, match="unknown level of importance weights 'turn'; known: token, sequence"):
            importance_weights(x, x, mask, cap=2.0, level="turn")
        with pytest.raises(ValueError, match="unknown mode of importance weights 'clip'; known: truncate, mask"):
            importance_weights(x, x, mask, cap=2.0, mode="clip")
        with pytest.raises(ValueError, match=r"level='sequence' needs rows"):
            importance_weights(x, x, mask, cap=2.0, level="sequence")
        with pytest.raises(ValueError, match="bool"):
            importance_weights(x, x, x, cap=2.0)
        with pytest.raises(ValueError, match=r"cap must be 1 or more, got 0.5"):
            truncated_importance_weights(torch.zeros(2), torch.zeros(2), cap=0.5)
        with pytest.raises(ValueError, match=r"sampled_logprobs \(2, 1\) and logprobs \(2,\)"):
            truncated_importance_weights(torch.zeros(2), torch.zeros(2, 1), cap=2.0)


def keep(x, mask):
    return x.masked_fill(~mask, 0.0)
