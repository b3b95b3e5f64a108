"""Proves log-probs and entropy from logits against closed forms, torch's own and their gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_ppo.core import entropy_from_logits, token_logprobs

seeds = st.integers(0, 10_000)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


class TestTokenLogprobs:
    def test_by_hand(self):
        # Weights 1, 2, 5 of 8; at temperature 1/2 they are squared: 1, 4, 25 of 30.
        logits = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).log().expand(3, 3)
        tokens = torch.arange(3)
        assert_close(token_logprobs(logits, tokens).exp(), torch.tensor([1, 2, 5], dtype=torch.float64) / 8)
        sharp = token_logprobs(logits, tokens, temperature=0.5).exp()
        assert_close(sharp, torch.tensor([1, 4, 25], dtype=torch.float64) / 30)

    @given(seeds, st.floats(0.1, 5), st.floats(-500, 500))
    def test_equal_to_log_softmax_whatever_is_added_to_all_logits(self, seed, temperature, shift):
        g = torch.Generator().manual_seed(seed)
        logits = torch.randn(2, 3, 6, generator=g, dtype=torch.float64)
        tokens = torch.randint(6, (2, 3), generator=g)
        expected = torch.distributions.Categorical(logits=logits / temperature).log_prob(tokens)
        assert_close(token_logprobs(logits, tokens, temperature=temperature), expected)
        assert_close(token_logprobs(logits + shift, tokens, temperature=temperature), expected)

    def test_banned_tokens(self):
        logits = torch.tensor([[0.0, -INF, 0.0], [0.0, -INF, 0.0]], requires_grad=True)
        out = token_logprobs(logits, torch.tensor([0, 1]))
        assert_close(out[0].exp().item(), 0.5)
        assert out[1] == -INF
        out[0].backward()
        assert_close(logits.grad, torch.tensor([[0.5, 0, -0.5], [0, 0, 0]]))

    def test_no_axis_but_the_vocabulary_and_no_tokens(self):
        assert token_logprobs(torch.zeros(4), torch.tensor(3)).exp() == 0.25
        assert token_logprobs(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long)).exp().tolist() == [1, 1]
        assert token_logprobs(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("ids", [torch.int64, torch.int32, torch.uint8])
    def test_dtype_and_device_are_kept(self, dtype, ids, device):
        logits, tokens = torch.randn(5, 9).to(device, dtype), torch.randint(9, (5,)).to(device, ids)
        before = logits.clone()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for out, exact in [
            (token_logprobs(logits, tokens), token_logprobs(logits.to(wide), tokens)),
            (entropy_from_logits(logits), entropy_from_logits(logits.to(wide))),
        ]:
            assert out.dtype == dtype
            assert out.device.type == device.type
            assert torch.equal(out, exact.to(dtype))
        assert torch.equal(logits, before)

    def test_gradcheck(self):
        logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        tokens = torch.tensor([0, 4, 2])
        assert torch.autograd.gradcheck(lambda x: token_logprobs(x, tokens, temperature=0.7), logits)
        assert torch.autograd.gradcheck(lambda x: entropy_from_logits(x, temperature=0.7), logits)

    def test_errors(self):
        logits, tokens = torch.zeros(4, 9), torch.zeros(4, dtype=torch.long)
        with pytest.raises(ValueError, match=r"logits_without_vocabulary \(4,\) and tokens \(4, 1\)"):
            token_logprobs(logits, tokens[:, None])
        with pytest.raises(ValueError, match="scalar"):
            token_logprobs(torch.tensor(1.0), tokens)
        for temperature in (0.0, -1.0, float("nan")):
            for call in (
                lambda t: token_logprobs(logits, tokens, temperature=t),
                lambda t: entropy_from_logits(logits, temperature=t),
            ):
                with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
                    call(temperature)
        for wrong in (9, -1, -100):
            with pytest.raises(ValueError, match=r"\[0, 9\)"):
                token_logprobs(logits, torch.tensor([0, 8, wrong, 1]))


class TestEntropy:
    def test_by_hand(self):
        # Uniform over four: ln 4; over the two that are not banned: ln 2; a certain choice: 0.
        logits = torch.tensor([[0.0, 0, 0, 0], [3, 3, -INF, -INF], [0, -INF, -INF, -INF]], dtype=torch.float64)
        assert_close(entropy_from_logits(logits).exp(), torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))

    @given(seeds, st.floats(0.2, 5))
    def test_equal_to_torch_and_rising_with_temperature(self, seed, temperature):
        logits = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        got = entropy_from_logits(logits, temperature=temperature)
        assert_close(got, torch.distributions.Categorical(logits=logits / temperature).entropy())
        assert torch.all(entropy_from_logits(logits, temperature=2 * temperature) > got)

    def test_gradient_with_banned_tokens_is_finite(self):
        logits = torch.tensor([[0.0, 1.0, -INF]], dtype=torch.float64, requires_grad=True)
        entropy_from_logits(logits).sum().backward()
        without = torch.tensor([[0.0, 1.0]], dtype=torch.float64, requires_grad=True)
        entropy_from_logits(without).sum().backward()
        assert_close(logits.grad[:, :2], without.grad)
        assert logits.grad[0, 2] == 0


def test_float_ids_are_refused():
    with pytest.raises(ValueError, match=r"token ids must be integers, got torch\.float32"):
        token_logprobs(torch.zeros(2, 3), torch.tensor([0.0, 1.0]))
