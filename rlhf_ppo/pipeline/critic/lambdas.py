"""What each lambda makes of a critic's values: bias, variance, and how well advantages follow what words bring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_ppo.pipeline.critic.analysis import TINY, WORDS, Evidence, Rows, explains, fold_sums, jackknife
from rlhf_ppo.training.advantages import gae

LAMBDAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)


def state_features(evidence: Evidence, *, values: bool) -> Tensor:
    """Return [n, F] what is known before each token: counts of the words so far and the position.

    With ``values`` also the critic's value and the word before the token; without, counts of the words in the prompt,
    which a value that knows the prompt makes superfluous.
    """
    mask, chosen = evidence.mask, _one_hot(evidence)
    before = chosen.cumsum(dim=1) - chosen
    position = (mask.cumsum(dim=1) - 1).clamp(min=0).double()
    columns = [before, torch.stack([position, position.log1p()], dim=-1)]
    if values:
        columns += [torch.cat([torch.zeros_like(chosen[:, :1]), chosen[:, :-1]], dim=1), evidence.values[:, :, None]]
    else:
        columns += [evidence.prompts[:, None].double().expand(-1, mask.shape[1], -1)]
    return torch.cat([x[mask] for x in columns], dim=1)


def _one_hot(evidence: Evidence) -> Tensor:
    words = torch.where(evidence.mask, evidence.words, 0)
    return torch.nn.functional.one_hot(words, WORDS).double() * evidence.mask[:, :, None]


def cross_fitted(features: Tensor, targets: Tensor, evidence: Evidence, *, at: Tensor | None = None) -> Tensor:
    """Predict targets [n, M] by ridge regression on features [n, F], each fold from the other folds.

    The penalty shrinks a weight by 1 / (1 + F / N): as many numbers are to be learned as F, from as many independent
    examples as there are responses.

    Args:
        features: of n tokens.
        targets: of the same tokens.
        evidence: its folds.
        at: [n, F] features to predict at; None: the same.
    """
    mean, fold = features.mean(dim=0), evidence.fold
    spread = (features - mean).square().mean(dim=0).sqrt()
    varies = spread > 0

    def scaled(x: Tensor) -> Tensor:
        return torch.cat([((x - mean) / spread)[:, varies], torch.ones_like(x[:, :1])], dim=1)

    x, y = scaled(features), features if at is None else at
    places = [fold == k for k in range(int(fold.max()) + 1)]
    inner = [(x[here].T @ x[here], x[here].T @ targets[here]) for here in places]
    gram, cross = (torch.stack(part).sum(dim=0) for part in zip(*inner, strict=True))
    penalty = torch.full((x.shape[1],), len(x) * (x.shape[1] - 1) / len(evidence.mask), dtype=x.dtype)
    penalty[-1] = 0.0  # the mean
    found = torch.zeros_like(targets)
    for here, (own_gram, own_cross) in zip(places, inner, strict=True):
        weights = torch.linalg.solve(gram - own_gram + penalty.diag(), cross - own_cross)
        found[here] = scaled(y[here]) @ weights
    return found


def words_baseline(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """Predict returns by a linear model of the words so far, fitted on responses to other prompts.

    Returns:
        (predicted returns [n], what the model says that each token brought [n]: the weight of its word).
    """
    before = state_features(evidence, values=False)
    after = before.clone()
    after[:, :WORDS] += _one_hot(evidence)[evidence.mask]
    returns = evidence.returns[evidence.mask][:, None]
    value = cross_fitted(before, returns, evidence)[:, 0]
    return value, cross_fitted(before, returns, evidence, at=after)[:, 0] - value


def advantages_by_lambda(evidence: Evidence, lambdas: Sequence[float] = LAMBDAS) -> Tensor:
    """Compute the advantages [L, N, T] under each lambda."""
    return torch.stack(
        [gae(evidence.rewards, evidence.values, evidence.mask, gamma=evidence.gamma, gae_lambda=x)[0] for x in lambdas]
    )


def mean_bias_by_position(advantages: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean of (advantage - Monte Carlo advantage) at each position, [L, T]; the last lambda is 1."""
    gap = torch.where(mask, advantages - advantages[-1], 0.0)
    return gap.sum(dim=1) / mask.sum(dim=0).clamp(min=1)


def compare_lambdas(evidence: Evidence, brought: Tensor, lambdas: Sequence[float] = LAMBDAS) -> Rows:
    """Measure bias, variance and alignment of the advantages under each lambda; the last one must be 1.

    The advantage under lambda = 1 is unbiased: its expectation after (state, token) is Q - V, whatever V is. So the
    bias of another lambda at a token is E[gap | state, token], gap = A_lambda - A_1.

    * ``mean_bias``: mean gap over all tokens.
    * ``squared_bias``: mean of E[gap | state, token]^2, as a share of A_1's variance. The expectation is estimated by
      ridge regression on position, value and words so far, b; E[2 b gap - b^2] over tokens that b was not fitted on is
      at most the true square in expectation, so this is a lower bound: bias that those features do not show stays
      unseen, and numbers around 0 or below mean that none was found.
    * ``variance``: of A_lambda, as a share of A_1's.
    * ``alignment``: correlation of A_lambda with ``brought``, which no error of the critic enters. Whitened advantages
      teach a policy by this correlation, so it weighs bias against variance: bias lowers the covariance, variance
      raises what that is divided by.

    Args:
        evidence: N responses.
        brought: [n] an independent estimate of what each token brought (:func:`words_baseline`).
        lambdas: in increasing order.
    Returns:
        A row per lambda; ``*_error`` are standard errors, ``behind_best`` how far the alignment is below the best one.
    """
    mask = evidence.mask
    found = advantages_by_lambda(evidence, lambdas)[:, mask].T  # [n, L]
    decay = torch.tensor(list(lambdas), dtype=found.dtype)
    gap = found - found[:, -1:]
    # The state after a token is the state before the next one; after the last there is nothing left to expect.
    later = cross_fitted(state_features(evidence, values=True), found, evidence)
    ends = mask & (mask.flip(1).cumsum(dim=1).flip(1) == 1)
    after = evidence.gamma * (~ends[mask])[:, None] * torch.cat([later[1:], later[:1]])
    bias = decay * after - after[:, -1:]
    brought = (brought - brought.mean())[:, None]
    columns = [gap, 2 * bias * gap - bias**2, found, found**2, found * brought]
    columns = torch.cat([*columns, torch.ones_like(brought), brought, brought**2], dim=1)
    sums, count = fold_sums(list(columns.T), evidence.fold), len(lambdas)
    best = int(_lambda_numbers(sums.sum(dim=0), count, 0)[3 * count : 4 * count].argmax())
    numbers, errors = jackknife(lambda part: _lambda_numbers(part, count, best), sums)
    names = ("mean_bias", "squared_bias", "variance", "alignment", "behind_best")
    names += tuple(f"{name}_error" for name in names)
    table = torch.cat([numbers, errors]).view(len(names), count).T.tolist()
    return [{"lambda": x, **dict(zip(names, row, strict=True))} for x, row in zip(lambdas, table, strict=True)]


def _lambda_numbers(sums: Tensor, count: int, best: int) -> Tensor:
    gap, square, a, aa, ab = sums[..., :-3].unflatten(-1, (5, count)).unbind(dim=-2)
    n, b, bb = (x[..., None] for x in sums[..., -3:].unbind(dim=-1))
    variance = (aa / n - (a / n) ** 2).clamp(min=TINY)
    spread = (variance * (bb / n - (b / n) ** 2).clamp(min=0)).sqrt()
    alignment = torch.where(spread > 0, (ab / n - a * b / n**2) / spread.clamp(min=TINY), 0.0)
    whole = variance[..., -1:]
    behind = alignment[..., best : best + 1] - alignment
    return torch.cat([gap / n, square / n / whole, variance / whole, alignment, behind], dim=-1)


def supported_lambda(rows: Rows, critic: dict[str, float]) -> float:
    """Return the lambda that a critic supports: 1 if it explains nothing, else the largest that is as good as the best.

    As good: its alignment is at most one standard error (of the difference) below the best one. Larger lambdas rely
    less on the critic, so they win ties.

    Args:
        rows: of :func:`compare_lambdas`.
        critic: of :func:`explain`.
    """
    if not explains(critic):
        return 1.0
    return max(row["lambda"] for row in rows if row["behind_best"] <= row["behind_best_error"])
