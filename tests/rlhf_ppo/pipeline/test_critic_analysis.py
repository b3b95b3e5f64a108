"""What is said of a critic: numbers that are known in small worlds."""

from __future__ import annotations

import itertools

import pytest
import torch

from rlhf_ppo.pipeline.critic.analysis import (
    WORDS,
    Evidence,
    calibrate,
    explain,
    explain_by_position,
    explains,
    fold_numbers,
    jackknife,
    position_baseline,
)
from rlhf_ppo.pipeline.critic.lambdas import (
    LAMBDAS,
    advantages_by_lambda,
    compare_lambdas,
    cross_fitted,
    mean_bias_by_position,
    supported_lambda,
    words_baseline,
)
from rlhf_ppo.training.advantages import gae

STEPS = 4


def evidence(scores: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, words=None, prompts=None) -> Evidence:
    """Responses with a score at their end."""
    last = mask & (mask.flip(1).cumsum(dim=1).flip(1) == 1)
    rewards = torch.where(last, scores[:, None], 0.0)
    _, returns = gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, gae_lambda=1.0)
    prompts = list(range(len(mask))) if prompts is None else prompts
    counts = torch.nn.functional.one_hot(torch.tensor(prompts) % WORDS, WORDS)
    words = torch.zeros(mask.shape, dtype=torch.long) if words is None else words
    return Evidence(rewards, values * mask, returns, mask, words, counts, fold_numbers(prompts), 1.0)


def lambdas(seen: Evidence) -> list[dict[str, float]]:
    return compare_lambdas(seen, words_baseline(seen)[1])


def tree() -> tuple[torch.Tensor, torch.Tensor]:
    """All 16 ways to toss a coin four times, equally likely: coins [16, 4], and the exact value before each toss.

    A toss is worth 1 or 0; what is still to come is worth a half each.
    """
    coins = torch.tensor(list(itertools.product([0.0, 1.0], repeat=STEPS)), dtype=torch.float64)
    return coins, coins.cumsum(dim=1) - coins + torch.arange(STEPS, 0, -1) / 2


def test_an_exact_critic_has_no_bias_under_any_lambda():
    coins, exact = tree()
    mask = torch.ones_like(coins, dtype=torch.bool)
    found = advantages_by_lambda(evidence(coins.sum(dim=1), exact, mask))
    assert mean_bias_by_position(found, mask).abs().max() < 1e-12
    gap = found - found[-1:]
    for t in range(STEPS):  # after every state and toss, too: the mean over all futures of the first t + 1 coins
        assert gap[..., t].view(len(LAMBDAS), 2 ** (t + 1), -1).mean(dim=2).abs().max() < 1e-12
    torch.testing.assert_close(found[0], coins - 0.5)  # lambda 0: what each toss brought, and no noise


def test_a_constant_offset_has_a_known_bias():
    """V + c at each later state leaves c (1 - lambda) sum_k lambda^k = c (1 - lambda^(steps left))."""
    coins, exact = tree()
    mask, offset = torch.ones_like(coins, dtype=torch.bool), 3.0
    found = mean_bias_by_position(advantages_by_lambda(evidence(coins.sum(dim=1), exact + offset, mask)), mask)
    left = torch.arange(STEPS - 1, -1, -1, dtype=torch.float64)
    for lam, row in zip(LAMBDAS, found, strict=True):
        torch.testing.assert_close(row, offset * (1 - lam**left))


def test_the_table_holds_mean_bias_and_variance_as_computed_by_hand():
    coins, exact = tree()
    mask = torch.ones_like(coins, dtype=torch.bool)
    rows = lambdas(evidence(coins.sum(dim=1), exact + 3, mask))
    by_hand = advantages_by_lambda(evidence(coins.sum(dim=1), exact + 3, mask))
    for row, advantages in zip(rows, by_hand, strict=True):
        assert row["mean_bias"] == pytest.approx(float((advantages - by_hand[-1]).mean()))
        assert row["variance"] == pytest.approx(float(advantages.var(correction=0) / by_hand[-1].var(correction=0)))
    assert rows[-1]["mean_bias"] == rows[-1]["squared_bias"] == 0 and rows[-1]["variance"] == 1


def world(kind: str, count: int = 400, steps: int = 16, seed: int = 0) -> tuple[Evidence, torch.Tensor]:
    """Words of known worth after prompts of known worth, and noise at the end, seen by critics of several kinds.

    Also returns what each word brings, [n].
    """
    random = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, 40, (count,), generator=random)
    worth = torch.randn(40, generator=random, dtype=torch.float64)
    words = torch.randint(0, 20, (count, steps), generator=random)
    gains = torch.randn(20, generator=random, dtype=torch.float64)
    gain = 0.3 * (gains - gains.mean())[words]
    exact = worth[prompts][:, None] + gain.cumsum(dim=1) - gain
    scores = worth[prompts] + gain.sum(dim=1) + torch.randn(count, generator=random, dtype=torch.float64)
    noise = torch.randn(count, steps, generator=random, dtype=torch.float64)
    values = {"exact": exact, "constant": torch.zeros_like(exact), "noise": noise, "noisy": exact + 0.7 * noise}[kind]
    mask = torch.ones(count, steps, dtype=torch.bool)
    return evidence(scores, values, mask, words=words, prompts=prompts.tolist()), gain[mask]


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("exact", 0, 0.5), ("noisy", 0.5, 0.95), ("constant", 1, 1), ("noise", 1, 1)]
)
def test_a_critic_supports_the_lambda_that_it_deserves(kind, low, high):
    """An exact one needs no returns, one with errors of its own needs some, one that explains nothing needs all."""
    for seed in range(3):
        seen, _ = world(kind, seed=seed)
        critic = explain(seen.values[seen.mask], seen.returns[seen.mask], seen.fold)
        assert low <= supported_lambda(lambdas(seen), critic) <= high, seed


@pytest.mark.parametrize("kind", ["exact", "noisy", "constant", "noise"])
def test_alignment_ranks_lambdas_as_the_true_worth_of_words_does(kind):
    """What the words were found to be worth holds noise of its own, which lowers all alignments by one factor."""
    seen, gain = world(kind)
    found = torch.tensor([row["alignment"] for row in lambdas(seen)], dtype=torch.float64)
    advantages = advantages_by_lambda(seen)[:, seen.mask]
    true = torch.stack([torch.corrcoef(torch.stack([row, gain]))[0, 1] for row in advantages])
    torch.testing.assert_close(found / found.max(), true / true.max(), atol=0.06, rtol=0)


def test_squared_bias_is_found_where_words_show_it_and_not_where_there_is_none():
    for seed in range(3):
        exact, constant = (lambdas(world(kind, seed=seed)[0])[0] for kind in ("exact", "constant"))
        assert exact["squared_bias"] < 2 * exact["squared_bias_error"]
        # A constant critic misses what prompts and words are worth.
        assert constant["squared_bias"] > 3 * constant["squared_bias_error"]
        # Errors that come and go with each token are those of the state after it, which its value shows.
        noise = lambdas(world("noise", seed=seed)[0])[0]
        assert noise["squared_bias"] > constant["squared_bias"] + 3 * noise["squared_bias_error"]


def test_a_fold_is_predicted_from_the_others_alone():
    """Features that name the fold, and a target that only they tell: of one's own fold nothing can be known."""
    mask = torch.ones(20, 1, dtype=torch.bool)
    target = torch.arange(20, dtype=torch.float64)
    seen = evidence(target, torch.zeros(20, 1, dtype=torch.float64), mask)
    found = cross_fitted(torch.eye(20, dtype=torch.float64), target[:, None], seen)[:, 0]
    assert float(torch.corrcoef(torch.stack([found, target]))[0, 1]) < 0


def test_explained_variance_has_the_standard_error_of_many_samples():
    """The mean and its error, from 200 draws of 100 prompts with 3 responses each that share their error."""
    found = []
    for seed in range(200):
        random = torch.Generator().manual_seed(seed)
        values = torch.randn(100, generator=random, dtype=torch.float64).repeat_interleave(3)
        noise = torch.randn(100, generator=random, dtype=torch.float64).repeat_interleave(3)
        fold = fold_numbers([i // 3 for i in range(300)], seed)
        found.append(explain(values, values + noise, fold))
    shares = torch.tensor([row["explained_variance"] for row in found])
    errors = torch.tensor([row["standard_error"] for row in found])
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(errors.mean()) == pytest.approx(float(shares.std()), rel=0.2)


def test_how_far_values_are_off():
    returns = torch.tensor([1e6, 1e6 + 2, 1e6 + 4, 1e6 + 6], dtype=torch.float64)
    told = explain(returns + 1, returns, torch.tensor([0, 1, 2, 3]))
    assert told["explained_variance"] == 1 and told["offset"] == 1 and told["error"] == 1
    assert told["error_of_mean"] == pytest.approx(5**0.5)
    flat = explain(torch.zeros(4, dtype=torch.float64), returns, torch.tensor([0, 1, 2, 3]))
    assert abs(flat["explained_variance"]) < 1e-9 and not explains(flat)
    same = explain(returns, torch.ones_like(returns), torch.tensor([0, 1, 2, 3]))
    assert same["explained_variance"] == 0


def test_parts_of_the_response():
    """Values that know everything in the second half of the response, and nothing in the first."""
    mask = torch.ones(8, 20, dtype=torch.bool)
    mask[::2, 10:] = False
    scores = torch.arange(8, dtype=torch.float64)
    place, length = mask.cumsum(dim=1) - 1, mask.sum(dim=1, keepdim=True)
    seen = evidence(scores, torch.where(2 * place >= length, scores[:, None], 0.0), mask)
    tenths = explain_by_position(seen, relative=True)
    assert [row["explained_variance"] for row in tenths] == pytest.approx([0.0] * 5 + [1.0] * 5)
    assert sum(row["tokens"] for row in tenths) == mask.sum() and tenths[0]["first"] == 0 and tenths[-1]["last"] == 1
    parts = explain_by_position(seen, relative=False)
    assert sum(row["tokens"] for row in parts) == mask.sum()
    assert parts[0]["first"] == 0 and parts[-1]["last"] == 19 and len(parts) <= 10
    assert all(one["last"] < two["first"] for one, two in itertools.pairwise(parts))


def test_calibration():
    scores = torch.linspace(-1, 1, 200, dtype=torch.float64)
    mask = torch.ones(200, 1, dtype=torch.bool)
    bins, slope = calibrate(evidence(scores, 2 * scores[:, None] + 5, mask))
    assert slope["slope"] == pytest.approx(0.5) and slope["standard_error"] < 1e-9
    assert len(bins) == 10 and sum(row["tokens"] for row in bins) == 200
    for row in bins:
        assert row["return"] == pytest.approx((row["value"] - 5) / 2)
    flat, none = calibrate(evidence(scores, torch.ones(200, 1, dtype=torch.float64), mask))
    assert len(flat) == 1 and none["slope"] == 0


def test_the_mean_at_a_position_is_that_of_other_prompts():
    scores = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    mask = torch.ones(4, 2, dtype=torch.bool)
    mask[3, 1] = False
    seen = evidence(scores, torch.zeros(4, 2, dtype=torch.float64), mask, prompts=[0, 0, 1, 2])
    expected = torch.tensor([[6, 4], [6, 4], [11 / 3, 1.5], [7 / 3, 0]], dtype=torch.float64)
    torch.testing.assert_close(position_baseline(seen), expected[mask])


def test_folds_keep_prompts_together():
    folds = fold_numbers([f"p{i % 50}" for i in range(200)])
    assert len(folds.unique()) == 20 and all(len({int(f) for f in folds[i::50]}) == 1 for i in range(50))
    assert len(fold_numbers(["one"] * 5).unique()) == 5  # one prompt: the responses stand for themselves
    with pytest.raises(ValueError, match="1 scored response: at least 2 are needed"):
        fold_numbers(["one"])


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, error = jackknife(lambda sums: sums[..., 1:] / sums[..., :1], torch.stack([torch.ones_like(x), x], dim=1))
    assert float(mean) == pytest.approx(float(x.mean()))
    assert float(error) == pytest.approx(float(x.std() / 20**0.5))
