"""check_loss: our objectives pass, and each way to get a loss wrong fails the check that is about it, and no other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_ppo.core import Experience, PolicyOutput, PPOConfig, ppo_loss
from rlhf_ppo.verify import check_loss


def ours(**settings):
    def loss(logprobs, old_logprobs, advantages, mask, denominator):
        old = Experience(old_logprobs, None, advantages, None, mask)
        return ppo_loss(PolicyOutput(logprobs), old, PPOConfig(**settings), denominator=denominator).policy

    return loss


@pytest.mark.parametrize(
    "settings",
    [
        *({"objective": name} for name in ("clip", "penalty", "adaptive_clip", "dual_clip", "cispo", "a2c")),
        *({"loss_aggregation": name} for name in ("sequence_mean", "sequence_sum")),
        {"ratio_level": "sequence", "loss_aggregation": "sequence_mean"},
    ],
    ids=str,
)
def test_our_losses_pass(settings):
    report = check_loss(ours(**settings))
    assert report.passed and report.failures == (), str(report)
    assert len(report.results) == 10


def test_a_loss_that_masks_both_sides_on_purpose_is_told():
    assert check_loss(ours(objective="dis")).failures == ("clip_side",)


def clipped(logprobs, old_logprobs, advantages, mask):
    logprobs, old_logprobs, advantages = (torch.where(mask, x, 0) for x in (logprobs, old_logprobs, advantages))
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    return torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages)


def right(logprobs, old, advantages, mask, denominator):
    return clipped(logprobs, old, advantages, mask).sum() / denominator


def mean_of_microbatch_means(logprobs, old, advantages, mask, denominator):
    return clipped(logprobs, old, advantages, mask).sum() / mask.sum().clamp(min=1)


def divided_twice(logprobs, old, advantages, mask, denominator):
    return right(logprobs, old, advantages, mask, denominator) / denominator


def counts_padding(logprobs, old, advantages, mask, denominator):
    return (
        clipped(logprobs, old, advantages, mask) + torch.where(mask, 0, logprobs.nan_to_num(0, 0, 0))
    ).sum() / denominator


def masked_by_product(logprobs, old, advantages, mask, denominator):
    ratio = (logprobs - old).clamp(-20, 20).exp()
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages)
    return (loss * mask).sum() / denominator


def masked_results(logprobs, old, advantages, mask, denominator):
    ratio = (logprobs - old).exp()
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages)
    return torch.where(mask, loss, 0).sum() / denominator


def own_count(logprobs, old, advantages, mask, denominator):
    return right(logprobs, old, advantages, mask, denominator) * mask.sum() / mask.sum()


class Doubled(torch.autograd.Function):
    """The identity with a backward pass that is wrong by a factor where the gradient is negative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def wrong_kernel(logprobs, old, advantages, mask, denominator):
    return right(Doubled.apply(logprobs), old, advantages, mask, denominator)


def wrong_sign(logprobs, old, advantages, mask, denominator):
    return right(logprobs, old, -advantages, mask, denominator)


def other_actions(logprobs, old, advantages, mask, denominator):
    return right(logprobs, old, advantages.roll(1, dims=1), mask, denominator)


def clamped_alone(logprobs, old, advantages, mask, denominator):
    logprobs, old, advantages = (torch.where(mask, x, 0) for x in (logprobs, old, advantages))
    return -((logprobs - old).clamp(-20, 20).exp().clamp(0.8, 1.2) * advantages).sum() / denominator


def unbounded(logprobs, old, advantages, mask, denominator):
    logprobs, old, advantages = (torch.where(mask, x, 0) for x in (logprobs, old, advantages))
    ratio = (logprobs - old).exp()
    return torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages).sum() / denominator


def in_place(logprobs, old, advantages, mask, denominator):
    advantages.masked_fill_(~mask, 0.0)
    return right(logprobs, old, advantages, mask, denominator)


@pytest.mark.parametrize(
    ("loss", "failures"),
    [
        (right, set()),
        (mean_of_microbatch_means, {"split_invariance", "denominator"}),
        (divided_twice, {"denominator"}),
        (counts_padding, {"mask", "mask_poison", "empty_mask", "policy_gradient"}),
        (masked_by_product, {"mask_poison"}),
        (masked_results, {"mask_poison"}),
        (own_count, {"empty_mask"}),
        (wrong_kernel, {"gradient"}),
        (wrong_sign, {"policy_gradient", "clip_side"}),
        (clamped_alone, {"clip_side"}),
        (unbounded, set()),
        (in_place, {"inputs"}),
    ],
)
def test_each_fault_fails_its_check(loss, failures):
    report = check_loss(loss)
    assert set(report.failures) == failures and report.passed == (not failures)
    assert report.warnings == ("overflow",) * (loss in (masked_results, unbounded))


def test_advantages_of_other_actions_are_seen():
    # Rolled over the padding, so that masked places are read too.
    assert {"policy_gradient", "mask"} <= set(check_loss(other_actions).failures)


def test_a_loss_that_raises_or_is_no_number_is_a_failure_that_says_so():
    report = check_loss(lambda logprobs, *_: logprobs)
    assert "the loss must be one number as a tensor, got (6, 9)" in report["split_invariance"].said
    assert check_loss(lambda *_: 1.0)["mask"].said.endswith("must be one number as a tensor, got float")
    assert "raised KeyError: 'x'" in check_loss(lambda *_: {}["x"])["mask"].said


def test_a_stopped_gradient_is_held_in_finite_differences():
    """A ratio as a weight, by detach(), by no_grad() or by item(): the derivative is the one with the weight fixed."""

    def weight_by(how):
        def loss(logprobs, old, advantages, mask, denominator):
            logprobs, old, advantages = (torch.where(mask, x, 0) for x in (logprobs, old, advantages))
            if how == "no_grad":
                with torch.no_grad():
                    ratio = (logprobs - old).clamp(-20, 20).exp()
            else:
                ratio = (logprobs - old).clamp(-20, 20).exp()
                ratio = ratio.detach() if how == "detach" else ratio.data
            return -(ratio * advantages * logprobs).sum() / denominator

        return loss

    for how in ("detach", "no_grad", "data"):
        assert check_loss(weight_by(how)).passed


def test_a_report_is_read_and_printed():
    report = check_loss(mean_of_microbatch_means)
    assert not report.passed and report["denominator"].numbers["factor"] == pytest.approx(1)
    text = str(report)
    assert "FAILED   split_invariance" in text and "8 passed, 2 failed" in text and "cure: divide sums by" in text
    assert json.loads(json.dumps(report.facts()))["results"][0]["name"] == "split_invariance"


def test_a_warning_is_explained_like_a_failure():
    """A loss without a clamp on its ratio is right as a formula."""
    report = check_loss(unbounded)
    text = str(report)
    assert "warning  overflow" in text and "cure: clamp the log-ratio" in text and "9 passed, 1 warning" in text
    assert report.facts()["passed"] and report.facts()["results"][8]["warning"] and report["overflow"].passed


def test_the_page_says_what_is_found_in_public_formulas(capsys):
    page = (Path(__file__).parents[3] / "docs/proof.md").read_text(encoding="utf-8")
    code, printed = re.search(r"```python\n(import torch\n.*?)```\n\n```\n(.*?)```", page, flags=re.DOTALL).groups()
    exec(code, {})
    assert capsys.readouterr().out == printed
    assert all(f"| `{result.name}` |" in page for result in check_loss(right).results)


def test_torch_alone_is_loaded():
    code = (
        "import sys, rlhf_ppo.verify; rlhf_ppo.verify.check_loss; print(*{name.split('.')[0] for name in sys.modules})"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(answer.stdout.split())
    assert "torch" in loaded and not loaded & {"transformers", "datasets", "accelerate", "peft", "pydantic", "tyro"}


def test_a_loss_of_whole_sequences_passes():
    """GSPO: the ratio of a sequence is the geometric mean of its tokens', and its advantage is one number."""

    def gspo(logprobs, old_logprobs, advantages, mask, denominator):
        new, old, one = (torch.where(mask, x, 0.0) for x in (logprobs, old_logprobs, advantages))
        lengths = mask.sum(dim=1).clamp(min=1)
        ratio = ((new - old).sum(dim=1) / lengths).clamp(max=20.0).exp()
        advantage = one.sum(dim=1) / lengths
        losses = torch.max(-ratio * advantage, -ratio.clamp(0.8, 1.2) * advantage)
        return torch.where(mask.any(dim=1), losses, 0.0).sum() / denominator

    report = check_loss(gspo)
    assert "policy_gradient" not in report.failures, str(report)
    assert "one advantage per sequence" in report["policy_gradient"].said
