"""Proves ppo_loss's switches: ratio level, KL and positive examples as loss terms, weights; limits, masks, splits."""

import dataclasses
import math

import pytest
import torch
from helpers import f64
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_ppo.core import (
    Experience,
    PolicyOutput,
    PPOConfig,
    aggregate_loss,
    k2_loss,
    loss_denominator,
    ppo_diagnostics,
    ppo_loss,
)

seeds = st.integers(0, 10_000)
AGGREGATIONS = ["token_mean", "sequence_mean", "sequence_sum"]
POOLED = ["clip", "adaptive_clip", "dual_clip", "cispo", "dis"]
SWITCHES = [
    {"ratio_level": "sequence"},
    {"ratio_level": "turn"},
    {"ratio_level": "sequence", "objective": "cispo"},
    {"kl_loss_coef": 0.7},
    {"kl_loss_coef": 0.7, "kl_loss": "exact"},
    {"positive_loss_coef": 0.7},
    {"objective": "dis", "clip_range": 0.5},
]
switched = pytest.mark.parametrize("settings", SWITCHES, ids=lambda s: "-".join(map(str, s.values())))


def batch(seed=0, rows=4, steps=5, dtype=torch.float64, device="cpu"):
    """Everything that a switch may read, ragged; new and old differ by a few tenths of a nat."""
    g = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(rows, steps, generator=g, dtype=torch.float64).to(device, dtype)

    old = draw() - 2
    new = PolicyOutput((old + 0.3 * draw()).requires_grad_(), kl=draw().abs().requires_grad_())
    return new, Experience(
        old,
        None,
        draw(),
        None,
        (torch.rand(rows, steps, generator=g) > 0.3).to(device),
        weights=draw().abs(),
        ref_logprobs=old + 0.5 * draw(),
        turns=torch.randint(3, (rows, steps), generator=g).to(device),
        sampled_logprobs=old + 0.1 * draw(),
        positive=(torch.rand(rows, 1, generator=g) > 0.4).expand(rows, steps).to(device),
    )


def gradient(loss, new):
    leaves = (new.logprobs, new.kl)
    return torch.autograd.grad(loss.total, leaves, allow_unused=True, materialize_grads=True)


class TestRatioLevel:
    def test_gspo_by_hand(self):
        # Mean log-ratios .3 and -.1: ratios e^.3 = 1.35 (A 2: clipped to 1.2, no gradient) and e^-.1 (A -1, in range).
        log_ratios = f64([[0.5, 0.1], [-0.3, 0.1]]).requires_grad_()
        old = Experience(
            torch.zeros(2, 2, dtype=torch.float64), None, f64([[2, 2], [-1, -1]]), None, torch.ones(2, 2) > 0
        )
        loss = ppo_loss(
            PolicyOutput(log_ratios), old, PPOConfig(ratio_level="sequence", loss_aggregation="sequence_mean")
        )
        low = math.exp(-0.1)
        assert_close(loss.total.item(), (-1.2 * 2 + low) / 2)
        # Each of the second row's tokens has 1/2 of the row, the row 1/2 of the loss: r * 1/4.
        assert_close(torch.autograd.grad(loss.total, log_ratios)[0], f64([[0, 0], [low / 4, low / 4]]))

    @given(seeds, st.sampled_from([0.05, 0.2]))
    def test_with_one_advantage_a_response_it_is_gspo(self, seed, eps):
        """Against the paper's objective, differentiated through the mean log-ratio itself."""
        new, old = batch(seed)
        per_response = old.advantages[:, :1]
        old = dataclasses.replace(old, advantages=per_response.expand(4, 5).contiguous(), weights=None)
        config = PPOConfig(ratio_level="sequence", loss_aggregation="sequence_mean", clip_range=eps)
        loss = ppo_loss(new, old, config)
        lengths = old.mask.sum(dim=1, keepdim=True)
        log_ratio = ((new.logprobs - old.logprobs) * old.mask).sum(dim=1, keepdim=True) / lengths.clamp(min=1)
        ratio, real = log_ratio.exp(), lengths > 0
        objective = torch.minimum(ratio * per_response, ratio.clamp(1 - eps, 1 + eps) * per_response)[real].mean()
        assert_close(loss.total, -objective)
        expected = torch.autograd.grad(-objective, new.logprobs)[0]
        assert_close(gradient(loss, new)[0], expected)

    @pytest.mark.parametrize("objective", POOLED)
    @pytest.mark.parametrize("level", ["sequence", "turn"])
    def test_pools_of_one_action_are_the_token_level(self, objective, level):
        new, old = batch(1)
        new = PolicyOutput(new.logprobs[:, :1])
        old = dataclasses.replace(old, turns=torch.zeros_like(old.turns))[:, :1]
        plain, pooled = (
            ppo_loss(new, old, PPOConfig(objective=objective, ratio_level=x)).total for x in ("token", level)
        )
        assert_close(pooled, plain)
        by_plain, by_pooled = (torch.autograd.grad(x, new.logprobs)[0] for x in (plain, pooled))
        assert_close(by_pooled, by_plain)

    def test_cispo_weights_each_action_by_the_pooled_ratio(self):
        # Mean log-ratio .1 and .4, the second capped at 1.2. loss = -w A log pi, slope -w A.
        logprobs = f64([[-1.0, -2], [-1, -2]]).requires_grad_()
        old = Experience(f64([[-1.3, -1.9], [-1.5, -2.3]]), None, f64([[1, -2], [1, 3]]), None, torch.ones(2, 2) > 0)
        loss = ppo_loss(PolicyOutput(logprobs), old, PPOConfig(objective="cispo", ratio_level="sequence"))
        low = math.exp(0.1)
        assert_close(torch.autograd.grad(loss.total, logprobs)[0], f64([[-low, 2 * low], [-1.2, -3.6]]) / 4)
        assert_close(loss.total.item(), (low * (1 - 4) + 1.2 * (1 + 6)) / 4)

    def test_diagnostics_by_hand(self):
        """Ratios, clipping and range are the pool's; KL and the largest log-ratio stay each action's own."""
        log_ratios = f64([[0.5, 0.1, 9], [-0.9, 0.3, -0.3], [0.0, 0.2, 9]])
        mask = torch.tensor([[True, True, False], [True, True, True], [True, True, False]])
        old = Experience(
            torch.zeros(3, 3, dtype=torch.float64), None, f64([[2, -2, 2], [-1, 1, -1], [1, 1, 1]]), None, mask
        )
        got = ppo_diagnostics(PolicyOutput(log_ratios), old, PPOConfig(ratio_level="sequence"))
        # Pools: .3 (above 1.2; its A > 0 is killed), -.3 (r .74 below .8; its two A < 0 are killed), .1 (in range).
        assert_close(got["ratio_mean"].item(), (2 * math.exp(0.3) + 3 * math.exp(-0.3) + 2 * math.exp(0.1)) / 7)
        assert_close(got["clip_fraction"].item(), 3 / 7)
        assert_close(got["out_of_range_fraction"].item(), 5 / 7)
        own = [0.5, 0.1, -0.9, 0.3, -0.3, 0.0, 0.2]
        assert_close(got["approx_kl"].item(), sum(math.exp(x) - 1 - x for x in own) / 7)
        assert_close(got["max_abs_log_ratio"].item(), 0.9)
        # The clip's own gradient agrees with what is counted.
        new = PolicyOutput(log_ratios.clone().requires_grad_())
        slope = torch.autograd.grad(ppo_loss(new, old, PPOConfig(ratio_level="sequence")).total, new.logprobs)[0]
        assert int((slope[mask] == 0).sum()) == 3

    def test_cispo_counts_the_capped_weights(self):
        old = Experience(*[torch.zeros(4, dtype=torch.float64), None, f64([1, -1, 1, -1]), None, torch.ones(4) > 0])
        got = ppo_diagnostics(PolicyOutput(f64([1.3, 1.5, 0.2, 1.1]).log()), old, PPOConfig(objective="cispo"))
        assert (got["clip_fraction"], got["out_of_range_fraction"]) == (0.5, 0.75)

    @pytest.mark.parametrize("objective", ["penalty", "a2c", "reinforce"])
    @pytest.mark.parametrize("level", ["turn", "sequence"])
    def test_refused_where_no_ratio_is_bounded(self, objective, level):
        with pytest.raises(ValueError, match=f"ratio_level='{level}'.*objective='{objective}'"):
            PPOConfig(objective=objective, ratio_level=level)

    def test_turns_must_be_there(self):
        new, old = batch()
        with pytest.raises(ValueError, match="ratio_level='turn' needs turns"):
            ppo_loss(new, dataclasses.replace(old, turns=None), PPOConfig(ratio_level="turn"))


class TestKLLoss:
    @given(seeds, st.booleans())
    def test_k2_has_the_exact_kls_gradient_in_expectation(self, seed, moved):
        """Every action of an enumerable vocabulary, weighed by the probability with which the old policy drew it."""
        g = torch.Generator().manual_seed(seed)
        logits, shift, ref = (torch.randn(6, generator=g, dtype=torch.float64) for _ in range(3))
        log_q = ref.log_softmax(0)
        logits.requires_grad_()
        log_p = logits.log_softmax(0)
        log_old = (logits + shift).log_softmax(0).detach() if moved else log_p.detach()
        config = PPOConfig(kl_loss_coef=2.0)
        weights = 6 * log_old.exp()  # the mean over six actions is the expectation
        old = Experience(
            log_old, None, torch.zeros_like(log_old), None, torch.ones(6) > 0, weights=weights, ref_logprobs=log_q
        )
        loss = ppo_loss(PolicyOutput(log_p), old, config)
        exact = (log_p.exp() * (log_p - log_q)).sum()
        got, expected = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss.total, 2 * exact))
        assert_close(got, expected)

    def test_k2_by_hand(self):
        # Ratios 1 and e^.5; k2 = .5 * .4^2 = .08 and .5 * .2^2 = .02; slopes r * (log pi - log ref) = .4 and -.2 e^.5.
        logprobs = f64([-1.0, -2.0]).requires_grad_()
        old = Experience(f64([-1.0, -2.5]), None, f64([0, 0]), None, torch.ones(2) > 0, ref_logprobs=f64([-1.4, -1.8]))
        loss = ppo_loss(PolicyOutput(logprobs), old, PPOConfig(kl_loss_coef=0.5))
        r = math.exp(0.5)
        assert_close(loss.kl.item(), (0.08 + 0.02 * r) / 2)
        assert_close(loss.total, 0.5 * loss.kl)
        assert_close(torch.autograd.grad(loss.total, logprobs)[0], 0.5 * f64([0.4, -0.2 * r]) / 2)

    def test_exact_is_the_policys_own_kl(self):
        new, old = batch(3)
        loss = ppo_loss(new, old, PPOConfig(kl_loss_coef=0.5, kl_loss="exact"))
        assert_close(loss.kl, aggregate_loss(new.kl, old.mask))  # a fact about the policy: no importance weights
        assert_close(loss.total, loss.policy + 0.5 * loss.kl)
        assert_close(gradient(loss, new)[1], 0.5 * old.mask.double() / old.mask.sum())

    def test_weight_0_is_no_kl_loss(self):
        new, old = batch(4)
        plain = ppo_loss(new, old, PPOConfig())
        assert plain.kl == 0
        bare = dataclasses.replace(old, ref_logprobs=None)
        assert torch.equal(ppo_loss(PolicyOutput(new.logprobs), bare, PPOConfig()).total, plain.total)

    def test_what_is_missing_or_contradicts_is_named(self):
        new, old = batch(5)
        with pytest.raises(ValueError, match=r"kl_loss_coef=0.1 needs old.ref_logprobs"):
            ppo_loss(new, dataclasses.replace(old, ref_logprobs=None), PPOConfig(kl_loss_coef=0.1))
        with pytest.raises(ValueError, match=r"kl_loss='exact' with kl_loss_coef=0.1 needs new.kl"):
            ppo_loss(PolicyOutput(new.logprobs), old, PPOConfig(kl_loss_coef=0.1, kl_loss="exact"))
        with pytest.raises(ValueError, match=r"kl_loss='exact'.*kl_loss_coef=0"):
            PPOConfig(kl_loss="exact")

    def test_a_100_nat_drift_is_finite(self):
        x = torch.tensor([-100.0, 0.0], requires_grad=True)
        loss = k2_loss(x, torch.tensor([0.0, -100.0]), torch.tensor([0.0, -50.0]))
        assert torch.isfinite(loss).all() and torch.isfinite(torch.autograd.grad(loss.sum(), x)[0]).all()

    def test_gradcheck_where_old_and_new_agree(self):
        # With the ratio held at 1 nothing is stopped from flowing.
        x, ref = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda x: k2_loss(x, x, ref), x)


class TestImportanceWeights:
    @pytest.mark.parametrize("objective", [*POOLED, "penalty", "a2c", "reinforce"])
    def test_they_multiply_each_actions_policy_loss_and_gradient(self, objective):
        new, old = batch(6)
        config = PPOConfig(objective=objective)
        weighted = gradient(ppo_loss(new, old, config), new)[0]
        plain = gradient(ppo_loss(new, dataclasses.replace(old, weights=None), config), new)[0]
        assert_close(weighted, plain * old.weights)
        assert not torch.allclose(weighted, plain)

    @switched
    def test_weights_of_1_are_no_weights(self, settings):
        new, old = batch(7)
        ones = dataclasses.replace(old, weights=torch.ones_like(old.weights))
        none = dataclasses.replace(old, weights=None)
        config = PPOConfig(**settings)
        assert torch.equal(ppo_loss(new, ones, config).total, ppo_loss(new, none, config).total)

    def test_they_leave_critic_and_entropy_alone(self):
        new, old = batch(8)
        x = torch.randn(4, 5, dtype=torch.float64)
        new = PolicyOutput(new.logprobs, values=x, entropy=x.abs())
        old = dataclasses.replace(old, returns=torch.zeros_like(x))
        losses = [ppo_loss(new, o, PPOConfig()) for o in (old, dataclasses.replace(old, weights=None))]
        assert torch.equal(losses[0].value, losses[1].value) and torch.equal(losses[0].entropy, losses[1].entropy)


class TestEverySwitch:
    @switched
    @pytest.mark.parametrize("mode", AGGREGATIONS)
    @pytest.mark.parametrize("size", [1, 3])
    def test_gradients_are_equal_over_every_split_into_microbatches(self, settings, mode, size):
        new, old = batch(9)
        config = PPOConfig(**settings, loss_aggregation=mode)
        whole = ppo_loss(new, old, config)
        counts = {
            "denominator": loss_denominator(old.mask, mode),
            "positive_denominator": loss_denominator(old.mask & old.positive, mode),
        }
        parts = [
            ppo_loss(PolicyOutput(new.logprobs[rows], kl=new.kl[rows]), old[rows], config, **counts)
            for rows in torch.arange(4).split(size)
        ]
        for name in ("total", "policy", "kl", "positive"):
            assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))
        split = torch.autograd.grad(
            sum(part.total for part in parts), (new.logprobs, new.kl), allow_unused=True, materialize_grads=True
        )
        for a, b in zip(split, gradient(whole, new), strict=True):
            assert_close(a, b)

    @switched
    @pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e30])
    def test_garbage_under_the_mask_changes_no_value_and_no_gradient(self, settings, garbage):
        outs = []
        for fill in (0.0, garbage):
            new, old = batch(10)
            dirty = [x.detach().masked_fill(~old.mask, fill).requires_grad_() for x in (new.logprobs, new.kl)]
            names = ("logprobs", "advantages", "weights", "ref_logprobs")
            facts = {name: getattr(old, name).masked_fill(~old.mask, fill) for name in names}
            new = PolicyOutput(dirty[0], kl=dirty[1])
            old = dataclasses.replace(old, **facts, turns=old.turns.masked_fill(~old.mask, -7))
            loss = ppo_loss(new, old, PPOConfig(**settings))
            ppo_diagnostics(new, old, PPOConfig(**settings))
            outs.append((loss.total, *gradient(loss, new)))
        for clean, dirty in zip(*outs, strict=True):
            assert torch.isfinite(dirty).all()
            assert torch.equal(clean, dirty)
        assert torch.all(outs[1][1][~old.mask] == 0) and torch.all(outs[1][2][~old.mask] == 0)

    @pytest.mark.parametrize("field", ["kl", "weights", "ref_logprobs", "turns"])
    def test_every_shape_is_checked(self, field):
        new, old = batch(11)
        if field == "kl":
            new = PolicyOutput(new.logprobs, kl=new.kl[:, :1])
        else:
            old = dataclasses.replace(old, **{field: getattr(old, field)[:, :1]})
        with pytest.raises(ValueError, match=rf"{field} \(4, 1\) and logprobs \(4, 5\)"):
            ppo_loss(new, old, PPOConfig())

    @switched
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_dtype_and_device_are_kept(self, settings, dtype, device):
        new, old = batch(12, dtype=dtype, device=device)
        loss = ppo_loss(new, old, PPOConfig(**settings))
        for part in (loss.total, loss.policy, loss.kl):
            assert part.dtype == dtype and part.device.type == device.type
        assert all(g.dtype == dtype and torch.isfinite(g).all() for g in gradient(loss, new))


class TestSampler:
    def test_dis_compares_with_the_sampler_and_the_others_with_the_old_policy(self):
        new, old = batch(3)
        old = dataclasses.replace(old, weights=None)
        swapped = dataclasses.replace(old, logprobs=old.sampled_logprobs, sampled_logprobs=None)
        dis, clip = PPOConfig(objective="dis", clip_range=0.5), PPOConfig()
        assert_close(ppo_loss(new, old, dis).total, ppo_loss(new, swapped, dis).total)
        # Without log-probs of the sampler's own, those recorded are taken for its.
        bare = dataclasses.replace(old, sampled_logprobs=None)
        assert not torch.equal(ppo_loss(new, old, dis).total, ppo_loss(new, bare, dis).total)
        assert torch.equal(ppo_loss(new, old, clip).total, ppo_loss(new, bare, clip).total)

    def test_diagnostics_count_what_is_masked_on_both_sides(self):
        # Ratios to the sampler 1.1 and 2 for A > 0, .5 and .9 for A < 0; the old policy's play no part.
        sampled, a = f64([-1.0, -1, -1, -1]), f64([1.0, 1, -1, -1])
        old = Experience(sampled - 3, None, a, None, torch.ones(4) > 0, sampled_logprobs=sampled)
        new = PolicyOutput(sampled + f64([1.1, 2.0, 0.5, 0.9]).log())
        got = ppo_diagnostics(new, old, PPOConfig(objective="dis"))
        assert_close(got["clip_fraction"].item(), 0.5)
        assert_close(got["out_of_range_fraction"].item(), 0.5)
        assert_close(got["ratio_mean"].item(), (1.1 + 2 + 0.5 + 0.9) / 4)
        # The same on the other side of each sign: dis masks it, where clipping would not.
        turned = ppo_diagnostics(new, dataclasses.replace(old, advantages=-a), PPOConfig(objective="dis"))
        assert_close(turned["clip_fraction"].item(), 0.5)


class TestPositiveExamples:
    def facts(self, positive):
        zeros = torch.zeros(2, 3, dtype=torch.float64)
        mask = torch.tensor([[True, True, True], [True, True, False]])
        return Experience(zeros, None, zeros, None, mask, positive=positive)

    def test_by_hand(self):
        # Row 0 is positive, and the mask's token of row 1 is not. -(-1 - 2 - 4.5) / 3 tokens = 2.5, slopes -1/3.
        logprobs = f64([[-1.0, -2, -4.5], [-7, -8, math.nan]]).requires_grad_()
        positive = torch.tensor([[True] * 3, [False] * 3])
        loss = ppo_loss(PolicyOutput(logprobs), self.facts(positive), PPOConfig(positive_loss_coef=0.1))
        assert_close(loss.positive.item(), 2.5)
        assert_close(loss.total.item(), 0.25)  # no advantage, so nothing else
        slopes = torch.autograd.grad(loss.total, logprobs)[0]
        assert_close(slopes, f64([[-0.1 / 3] * 3, [0, 0, 0]]))

    def test_padding_of_a_positive_response_does_not_count(self):
        logprobs = f64([[-1.0, -1, -1], [-3, -5, math.nan]]).requires_grad_()
        positive = torch.tensor([[False] * 3, [True] * 3])
        loss = ppo_loss(PolicyOutput(logprobs), self.facts(positive), PPOConfig(positive_loss_coef=1.0))
        assert_close(loss.positive.item(), 4.0)

    def test_none_positive_is_no_loss_and_no_gradient(self):
        logprobs = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        nobody = self.facts(torch.zeros(2, 3, dtype=torch.bool))
        loss = ppo_loss(PolicyOutput(logprobs), nobody, PPOConfig(positive_loss_coef=1.0))
        assert loss.positive == 0
        assert not torch.autograd.grad(loss.total, logprobs)[0].any()

    def test_it_needs_to_know_them(self):
        new, old = batch()
        with pytest.raises(ValueError, match=r"positive_loss_coef=0.5 needs old.positive, which is None"):
            ppo_loss(new, dataclasses.replace(old, positive=None), PPOConfig(positive_loss_coef=0.5))
        with pytest.raises(ValueError, match="denominator is given, positive_denominator is not"):
            ppo_loss(new, old, PPOConfig(positive_loss_coef=0.5), denominator=4)
        with pytest.raises(ValueError, match="positive must be a bool tensor"):
            floats = dataclasses.replace(old, positive=old.positive.double())
            ppo_loss(new, floats, PPOConfig(positive_loss_coef=0.5))
