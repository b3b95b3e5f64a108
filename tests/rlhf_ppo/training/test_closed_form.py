"""A problem whose optimum is known by enumeration: training approaches it, and what the loop computes equals it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def closed(monkeypatch) -> ModuleType:
    """The module benchmarks/closed_form.py."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("closed_form")


def test_the_optimum_is_the_reference_tilted_by_the_score(closed):
    """J of pi* is J*, and J of any other policy, by KL(pi || pi*), is lower by beta KL: here for one in between."""
    problem = closed.Problem(3)
    reference = (
        torch.randn(problem.scores.shape, generator=torch.Generator().manual_seed(1)).double().log_softmax(dim=1)
    )
    best = (reference + problem.scores / closed.BETA).log_softmax(dim=1)

    def objective(logprobs):
        p = logprobs.exp()
        return float((p * (problem.scores - closed.BETA * (logprobs - reference))).sum(dim=1).mean())

    optimum = problem.optimum(reference)
    assert objective(best) == pytest.approx(optimum)
    between = (0.5 * (best + reference)).log_softmax(dim=1)
    lost = closed.BETA * float((between.exp() * (between - best)).sum(dim=1).mean())
    assert objective(between) == pytest.approx(optimum - lost) and lost > 0.01


def test_every_completion_is_enumerated_once(closed, tmp_path):
    problem = closed.Problem(0)
    model = closed.make_trainer(problem, 0, str(tmp_path)).model
    with torch.no_grad():
        logprobs = problem.logprobs(model)[0].sum(dim=-1)
    torch.testing.assert_close(logprobs.exp().sum(dim=1), torch.ones(2).double(), atol=1e-5, rtol=0)
    assert len(set(problem.texts)) == len(problem.texts) == 1 + 5 + 25 + 125 + 625


def test_training_approaches_the_optimum(closed):
    row = closed.train("grpo, mean only", 0, 40)
    assert 0.93 < row["reached"] < 1
    # At the optimum score - beta log(pi / reference) is the same for every response, and advantages vanish.
    assert row["advantage_std"][1] < 0.5 * row["advantage_std"][0]


def test_dividing_by_a_groups_spread_keeps_advantages_large_at_the_optimum(closed):
    row = closed.train("grpo", 0, 40)
    assert row["advantage_std"][1] > 0.9 * row["advantage_std"][0] > 0.8


def test_the_first_gradient_is_that_of_the_objective(closed):
    assert closed.gradient_cosine(0, 4096, moved=False) > 0.99


def test_reported_numbers_are_the_enumerated_ones(closed):
    """In standard errors; of the action values each beginning of a response that came up at least 30 times."""
    found = closed.reported(1, responses=1024)
    scores = {name: (said - exact) / error for name, (said, exact, error) in found.items()}
    assert {"kl/reference_nats_per_response", "policy/entropy", "score/mean"} < set(scores) and len(scores) > 12
    assert max(map(abs, scores.values())) < 4


def test_committed_results_reach_the_optimum(closed):
    rows = closed.read(closed.RESULTS)
    for arm in ("clip", "penalty", "cispo", "rloo", "grpo, mean only"):
        runs = [row for row in rows if row.get("arm") == arm]
        assert sorted(row["seed"] for row in runs) == [0, 1, 2, 3, 4]
        shares = sorted(row["reached"] for row in runs)
        assert shares[0] >= 0.99 and shares[-1] <= 1
    page = (FOLDER.parent / "docs/proof.md").read_text(encoding="utf-8")
    assert closed.table(rows) in page
    facts = [row for row in rows if "facts" in row]
    assert facts and all(row["first_gradient_cosine"] >= 0.99 for row in facts)
    assert all(abs(z) < 4 for row in facts for *_, z in row["reported"].values())
    assert all(row["action_values"]["mean_square_z"] < 2 for row in facts)
