"""Analyse a critic: what its values explain, where in a response, and how they are calibrated.

Everything is estimated from whole responses; standard errors come from a delete-a-group jackknife over prompts, because
tokens of one response, and responses to one prompt, are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_FOLDS = 20
TINY = 1e-30
WORDS = 128
"""Words that are counted apart: the most frequent tokens, and all others as one."""

Rows = list[dict[str, float]]


@dataclass(frozen=True)
class Evidence:
    """N responses as a critic sees them: T tokens each, in float64, 0 outside ``mask``."""

    rewards: Tensor
    """[N, T] shaped scores minus the KL's cost."""
    values: Tensor
    """[N, T] the critic's."""
    returns: Tensor
    """[N, T] discounted sums of the rewards from each token on."""
    mask: Tensor
    """[N, T] bool, the policy's tokens."""
    words: Tensor
    """[N, T] long, the tokens sampled, as numbers below ``WORDS``."""
    prompts: Tensor
    """[N, WORDS] counts of the words in each prompt."""
    folds: Tensor
    """[N] long, from 0: responses to one prompt are in one fold (see :func:`fold_numbers`)."""
    gamma: float

    @property
    def fold(self) -> Tensor:
        """[n] the fold of each token that counts."""
        return self.folds[:, None].expand(self.mask.shape)[self.mask]


def fold_numbers(prompts: Sequence[Any], seed: int = 0) -> Tensor:
    """Deal the distinct prompts into at most 20 folds at random; return [N], the fold of each response's prompt.

    If all responses are to one prompt, the responses themselves are dealt.

    Raises:
        ValueError: fewer than two responses.
    """
    if len(prompts) < 2:
        raise ValueError(f"{len(prompts)} scored response: at least 2 are needed to judge values; record more")
    names = [repr(prompt) for prompt in prompts]
    if len(set(names)) == 1:
        names = [str(i) for i in range(len(prompts))]
    distinct = list(dict.fromkeys(names))
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    fold = {distinct[i]: place % min(_FOLDS, len(distinct)) for place, i in enumerate(order)}
    return torch.tensor([fold[name] for name in names])


def jackknife(statistic: Callable[[Tensor], Tensor], sums: Tensor) -> tuple[Tensor, Tensor]:
    """Compute a statistic of sums over all folds, and its standard error from leaving out one fold at a time.

    Args:
        statistic: [..., S] sums -> [..., M] numbers.
        sums: [K, S] sums over each fold's tokens; folds without any are left out.
    Returns:
        (numbers [M], standard errors [M]).
    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 11.
    """
    sums = sums[sums.abs().sum(dim=1) > 0]
    whole = sums.sum(dim=0)
    without = statistic(whole - sums)
    spread = (without - without.mean(dim=0)).square().sum(dim=0)
    return statistic(whole), (spread * (len(sums) - 1) / len(sums)).sqrt()


def fold_sums(columns: Sequence[Tensor], fold: Tensor) -> Tensor:
    """Sum columns, [n] each, over the tokens of each fold: [K, S]."""
    stacked = torch.stack(list(columns), dim=1)
    return torch.zeros(int(fold.max()) + 1, len(columns), dtype=stacked.dtype).index_add(0, fold, stacked)


def _explained(sums: Tensor) -> Tensor:
    """Compute what :func:`explain` returns, from sums of 1, r, r^2, v - r, (v - r)^2."""
    n, r, rr, e, ee = sums.unbind(dim=-1)
    spread, left = (rr / n - (r / n) ** 2).clamp(min=0), ee / n - (e / n) ** 2
    share = torch.where(spread > 0, 1 - left / spread.clamp(min=TINY), 0.0)
    return torch.stack([share, e / n, (ee / n).sqrt(), spread.sqrt()], dim=-1)


def explain(values: Tensor, returns: Tensor, fold: Tensor) -> dict[str, float]:
    """Compare values with returns, [n] each.

    Returns:
        {explained_variance, its standard_error, offset (mean of value - return) and its offset_error, error (root mean
        squared), error_of_mean (that of the returns' own mean)}.
    """
    centre = returns.mean()  # squares of numbers around 0 keep their digits
    r, e = returns - centre, values - returns
    numbers, errors = jackknife(_explained, fold_sums([torch.ones_like(r), r, r * r, e, e * e], fold))
    found = dict(zip(("explained_variance", "offset", "error", "error_of_mean"), numbers.tolist(), strict=True))
    return {**found, "standard_error": float(errors[0]), "offset_error": float(errors[1])}


def explains(critic: dict[str, float]) -> bool:
    """Whether values explain anything: an explained variance of more than two standard errors above 0."""
    return critic["explained_variance"] > 2 * critic["standard_error"]


def explain_by_position(evidence: Evidence, *, relative: bool, bins: int = 10) -> Rows:
    """Compute the explained variance in parts of the response.

    Args:
        evidence: N responses.
        relative: by the share of the response that came before the token, in equal parts; else by the number of tokens
            before it, in parts with about equal numbers of tokens.
        bins: at most so many parts.
    Returns:
        A row per part with several prompts: first and last position, tokens, and what :func:`explain` says of them.
    """
    mask = evidence.mask
    before = (mask.cumsum(dim=1) - 1)[mask]
    if relative:
        length = mask.sum(dim=1, keepdim=True).expand(mask.shape)[mask]
        part = (before * bins).div(length, rounding_mode="floor").clamp(max=bins - 1)
    else:
        edges = torch.quantile(before.double(), torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1])
        part = torch.bucketize(before.double(), edges.unique(), right=False)
    rows: Rows = []
    for number in part.unique().tolist():
        here = part == number
        if len(evidence.fold[here].unique()) < 2:
            continue  # a single prompt shows no spread
        where = (number / bins, (number + 1) / bins) if relative else (before[here].min(), before[here].max())
        told = explain(evidence.values[mask][here], evidence.returns[mask][here], evidence.fold[here])
        rows.append({"first": float(where[0]), "last": float(where[1]), "tokens": int(here.sum()), **told})
    return rows


def calibrate(evidence: Evidence, bins: int = 10) -> tuple[Rows, dict[str, float]]:
    """Compare values with the returns that followed, in bins of about equal numbers of tokens.

    Returns:
        (a row per bin: tokens, mean value, mean return and its standard error; slope of the returns over the values,
        1 if calibrated, 0 if the values say nothing, with its standard error).
    """
    v, r, fold = evidence.values[evidence.mask], evidence.returns[evidence.mask], evidence.fold
    edges = torch.quantile(v, torch.linspace(0, 1, bins + 1, dtype=v.dtype)[1:-1])
    part = torch.bucketize(v, edges.unique(), right=True)
    rows: Rows = []
    for number in part.unique().tolist():
        here = part == number
        if len(fold[here].unique()) < 2:
            continue
        means, errors = jackknife(
            lambda sums: sums[..., 1:] / sums[..., :1],
            fold_sums([torch.ones_like(v[here]), v[here], r[here]], fold[here]),
        )
        rows.append(
            {"tokens": int(here.sum()), "value": float(means[0]), "return": float(means[1]), "error": float(errors[1])}
        )
    v, r = v - v.mean(), r - r.mean()
    slope, error = jackknife(_slope, fold_sums([torch.ones_like(v), v, r, v * r, v * v], fold))
    return rows, {"slope": float(slope), "standard_error": float(error)}


def _slope(sums: Tensor) -> Tensor:
    n, v, r, vr, vv = sums.unbind(dim=-1)
    spread = vv / n - (v / n) ** 2
    return torch.where(spread > 0, (vr / n - v * r / n**2) / spread.clamp(min=TINY), 0.0)


def position_baseline(evidence: Evidence) -> Tensor:
    """Predict each return [n] by the mean return at the same position of responses in other folds."""
    mask, folds = evidence.mask, evidence.folds
    count = int(folds.max()) + 1
    shape = count, mask.shape[1]
    sums, tokens = (
        torch.zeros(shape, dtype=torch.float64).index_add(0, folds, x) for x in (evidence.returns, mask.double())
    )
    others, number = sums.sum(dim=0) - sums, tokens.sum(dim=0) - tokens
    mean = others.sum(dim=1, keepdim=True) / number.sum(dim=1, keepdim=True)
    return torch.where(number > 0, others / number.clamp(min=1), mean)[folds][mask]
