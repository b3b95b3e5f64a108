"""Proves the exact KL against torch's own, by its gradient, and that chunks keep it from ever holding all logits."""

import math

import pytest
import torch
from helpers import f64
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_ppo.core import kl_from_logits, linear_kl

seeds = st.integers(0, 10_000)


def layers(seed=0, rows=5, features=3, ref_features=4, vocabulary=7, dtype=torch.float64, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "hidden": (rows, features),
        "weight": (vocabulary, features),
        "bias": (vocabulary,),
        "ref_hidden": (rows, ref_features),
        "ref_weight": (vocabulary, ref_features),
        "ref_bias": (vocabulary,),
    }
    return {
        name: torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype) for name, shape in shapes.items()
    }


def plain(x, temperature=1.0):
    """The same from whole logits, by torch's own kl_div."""
    log_p = (linear(x["hidden"], x["weight"], x["bias"]) / temperature).log_softmax(-1)
    log_q = (linear(x["ref_hidden"], x["ref_weight"], x["ref_bias"]) / temperature).log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


@pytest.mark.usefixtures("block_words")
class TestLinear:
    @given(seeds, st.sampled_from([1, 2, 5, None]), st.sampled_from([0.5, 1.0, 2.0]))
    def test_equals_torchs_own_in_value_and_gradient_for_every_chunk_size(self, seed, chunk_size, temperature):
        x = layers(seed)
        leaves = [x[name].requires_grad_() for name in ("hidden", "weight", "bias")]
        kl = linear_kl(**x, temperature=temperature, chunk_size=chunk_size)
        expected = plain(x, temperature)
        assert_close(kl, expected)
        upstream = torch.arange(1.0, 6.0, dtype=torch.float64)
        for a, b in zip(
            torch.autograd.grad(kl, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
        ):
            assert_close(a, b)

    @pytest.mark.parametrize("chunk_size", [2, 5])
    def test_gradcheck(self, chunk_size):
        x = layers()
        leaves = tuple(x[name].requires_grad_() for name in ("hidden", "weight", "bias"))

        def kl(hidden, weight, bias):
            return linear_kl(
                hidden, weight, x["ref_hidden"], x["ref_weight"], bias=bias, temperature=0.8, chunk_size=chunk_size
            )

        assert torch.autograd.gradcheck(kl, leaves)

    @pytest.mark.parametrize("chunk_size", [2, 5])
    @pytest.mark.parametrize("ref_bans", [True, False])
    def test_banned_tokens_add_nothing(self, chunk_size, ref_bans):
        """Tokens 2 to 4: in blocks of two words, one block is banned as a whole and one in part."""
        x = layers()
        ban = f64([0, 0, -math.inf, -math.inf, -math.inf, 0, 0])
        x["bias"] = x["bias"] + ban
        if ref_bans:
            x["ref_bias"] = x["ref_bias"] + ban
        leaves = [x[name].requires_grad_() for name in ("hidden", "weight", "bias")]
        kl = linear_kl(**x, temperature=0.7, chunk_size=chunk_size)
        logits = linear(x["hidden"], x["weight"], x["bias"])
        expected = kl_from_logits(logits, linear(x["ref_hidden"], x["ref_weight"], x["ref_bias"]), temperature=0.7)
        assert_close(kl, expected)
        pairs = zip(torch.autograd.grad(kl.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True)
        for got, wanted in pairs:
            assert torch.isfinite(got).all()
            assert_close(got, wanted)

    @pytest.mark.parametrize("chunk_size", [2, 5])
    def test_a_second_backward_pass_gives_the_same(self, chunk_size):
        x = layers()
        x["weight"].requires_grad_()
        kl = linear_kl(**x, chunk_size=chunk_size).sum()
        first, second = (torch.autograd.grad(kl, x["weight"], retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)

    @pytest.mark.parametrize("chunk_size", [2, 5])
    def test_logits_of_one_size_far_from_the_others(self, chunk_size):
        """float32 keeps the KL of two like distributions though one's logits lie 1000 above the other's."""
        x = layers(dtype=torch.float32)
        x |= {"ref_hidden": x["hidden"] * 1.01, "ref_weight": x["weight"], "ref_bias": x["bias"] + 1000}
        wide = plain({name: value.double() for name, value in x.items()})
        # A bias of 1000 is itself kept to 6e-5 in float32.
        assert_close(linear_kl(**x, chunk_size=chunk_size).double(), wide, rtol=0, atol=1e-4)

    def test_the_reference_gets_no_gradient(self):
        x = {name: value.requires_grad_() for name, value in layers().items()}
        linear_kl(**x).sum().backward()
        assert all((x[name].grad is None) == name.startswith("ref_") for name in x)

    def test_without_biases(self):
        x = layers()
        zero = dict.fromkeys(("bias", "ref_bias"), torch.zeros(7, dtype=torch.float64))
        without = {name: value for name, value in x.items() if "bias" not in name}
        assert_close(linear_kl(**without), linear_kl(**x | zero))

    def test_no_rows(self):
        assert linear_kl(**layers(rows=0)).shape == (0,)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_dtype_and_device_are_kept(self, dtype, device):
        x = layers(dtype=dtype, device=device)
        for chunk_size in (2, None):
            kl = linear_kl(**x, chunk_size=chunk_size)
            assert kl.dtype == dtype and kl.device.type == device.type
            # 0.05: logits of a few units keep 8 bits in bfloat16.
            wide = plain({name: value.double() for name, value in x.items()})
            assert_close(kl.double(), wide, rtol=0.05, atol=0.05)

    def test_errors(self):
        x = layers()
        with pytest.raises(ValueError, match=r"hidden \(5, 3\) must be \[N, O\] and weight \(7, 2\)"):
            linear_kl(**x | {"weight": x["weight"][:, :2]})
        with pytest.raises(ValueError, match=r"ref_hidden \(5, 3\) must be \[N, O\] and ref_weight"):
            linear_kl(**x | {"ref_hidden": x["hidden"]})
        with pytest.raises(ValueError, match=r"agree on N and V.*ref_weight \(6, 4\)"):
            linear_kl(**x | {"ref_weight": x["ref_weight"][:6]})
        with pytest.raises(ValueError, match=r"agree on N and V.*ref_hidden \(2, 4\)"):
            linear_kl(**x | {"ref_hidden": x["ref_hidden"][:2]})
        with pytest.raises(ValueError, match=r"ref_bias \(3,\) must be \[V\]"):
            linear_kl(**x | {"ref_bias": x["ref_bias"][:3]})
        with pytest.raises(ValueError, match="chunk_size must be 1 or more, got 0"):
            linear_kl(**x, chunk_size=0)
        with pytest.raises(ValueError, match="temperature must be positive"):
            linear_kl(**x, temperature=0.0)
        with pytest.raises(ValueError, match="temperature must be positive"):
            kl_from_logits(f64([1.0]), f64([1.0]), temperature=-1.0)
        with pytest.raises(ValueError, match=r"ref_logits \(2,\) and logits \(1, 2\)"):
            kl_from_logits(torch.zeros(1, 2), torch.zeros(2))


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


class TestMemory:
    """16 features, 2,000 words and 20 rows a chunk: 160 KB of float32 logits each for policy and reference."""

    chunk = 20 * 2000 * 4

    def peak(self, rows, *, whole=False):
        """Bytes allocated at the highest point of forward and backward, beyond what there was before."""
        x = layers(rows=rows, features=16, ref_features=16, vocabulary=2000, dtype=torch.float32)
        for name in ("hidden", "weight", "bias"):
            x[name].requires_grad_()
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            kl = plain(x) if whole else linear_kl(**x, chunk_size=20)
            kl.sum().backward()
        level = highest = 0
        for event in profile.kineto_results.events():
            if event.name() == "[memory]":
                level += event.nbytes()
                highest = max(highest, level)
        return highest

    def test_is_flat_beyond_a_chunk(self):
        few, many = self.peak(40), self.peak(400)
        # More rows cost their gradient of 16 float32 and a few numbers each, no logits.
        assert 0 < many - few < 360 * 2 * 16 * 4 < self.chunk
        assert self.peak(400, whole=True) > 10 * (many - few) + 20 * self.chunk  # proof that the recorder sees logits

    @pytest.mark.parametrize(("chunk_size", "rows_held"), [(1, 1), (4, 4), (64, 64)])
    def test_never_holds_more_than_a_chunk_of_logits(self, chunk_size, rows_held):
        x = layers(rows=64, vocabulary=1000)
        for name in ("hidden", "weight"):
            x[name].requires_grad_()
        with Largest() as seen:
            linear_kl(**x, chunk_size=chunk_size).sum().backward()
        # The weight's own gradient has 3 columns for each token of the vocabulary.
        assert seen.numel <= max(rows_held, 4) * 1000
        if chunk_size == 64:
            assert seen.numel == 64_000

    def test_nothing_of_the_vocabularys_size_is_saved_for_backward(self):
        x = layers(rows=40, vocabulary=1000)
        for name in ("hidden", "weight", "bias"):
            x[name].requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()), lambda x: x):
            linear_kl(**x, chunk_size=20)
        # The inputs and three numbers a row: two normalisers and the KL.
        assert sum(saved) == sum(value.numel() for value in x.values()) + 3 * 40
