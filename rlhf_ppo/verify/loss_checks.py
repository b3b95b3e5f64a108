"""Loss checks: what a PPO loss can get wrong, shown on random data for anyone's loss function."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_ppo.verify.held_gradients import Held
from rlhf_ppo.verify.loss_subject import Batch, Loss, LossSubject
from rlhf_ppo.verify.report import Check, Finding, Report, run_check

TOLERANCE = 1e-6
"""Relative, in float64."""


def check_loss(fn: Loss, *, seed: int = 0) -> Report:
    """Check a policy loss for what such losses get wrong, on random data in float64.

    Args:
        fn: ``fn(logprobs, old_logprobs, advantages, mask, denominator)`` returns one number to minimise: [B, T] each,
            mask bool, and ``denominator`` [] the whole minibatch's number of tokens (or of sequences: both are tried),
            by which the parts of a minibatch are divided.
        seed: of the data.
    Returns:
        A report with ``passed``, and the names of checks in ``failures`` and ``warnings``; printed, it explains them.
    """
    subject = LossSubject(fn, seed)
    name = getattr(fn, "__name__", type(fn).__name__)
    return Report(f"the loss {name}", tuple(run_check(check, subject) for check in CHECKS))


def _difference(one: Tensor, other: Tensor) -> float:
    """Return the distance of two tensors relative to the first; infinite if one is non-finite."""
    distance = float((one - other).norm() / one.norm().clamp(min=1e-12))
    return distance if math.isfinite(distance) else math.inf


def _close(difference: float) -> bool:
    return difference <= TOLERANCE


# Splits


def _split_invariance(subject: LossSubject) -> Finding:
    batch = subject.batch
    best, found = math.inf, ""
    for words, denominator in (("tokens", subject.tokens), ("sequences", subject.sequences)):
        whole, worst = subject.answer(batch, denominator).gradient, 0.0
        for split in ([[0, 1], [2], [3, 4, 5]], [[i] for i in range(len(whole))]):
            parts = [subject.answer(batch.rows(rows), denominator).gradient for rows in split]
            worst = max(worst, _difference(whole, torch.cat(parts)))
        if worst < best:
            best, found = worst, words
    said = f"gradients of the whole and of 3 and 6 microbatches differ by {best:.1e} of their norm"
    return Finding(_close(best), f"{said}, dividing by {found}", {"difference": best})


def _denominator(subject: LossSubject) -> Finding:
    once, twice = (subject.answer(subject.batch, n * subject.tokens).gradient for n in (1, 2))
    scale = float((once * twice).sum() / (once * once).sum().clamp(min=1e-300))
    said = f"twice the denominator multiplies the gradient by {scale:.3g}, where 0.5 is right"
    return Finding(_close(_difference(once, 2 * twice)), said, {"factor": scale})


# Masks


def _masked(subject: LossSubject, fillers: Sequence[float]) -> Finding:
    clean, worst, leaks = subject.answer(subject.batch), 0.0, 0
    for filler in fillers:
        logprobs, old, advantages = (torch.where(subject.mask, x, filler) for x in subject.batch[:3])
        loss, gradient = subject.answer(Batch(logprobs, old, advantages, subject.mask))
        worst = max(worst, _difference(clean.gradient, gradient), _difference(clean.loss, loss))
        leaks = max(leaks, int((gradient[~subject.mask] != 0).sum()), int((~gradient[subject.mask].isfinite()).sum()))
    where = ", ".join(f"{filler:g}" for filler in fillers)
    said = f"with {where} in masked places loss and gradient change by {worst:.1e} of their size"
    said += f", and {leaks} gradients are wrong" if leaks else ""
    return Finding(_close(worst) and not leaks, said, {"difference": worst, "wrong_gradients": leaks})


def _mask(subject: LossSubject) -> Finding:
    return _masked(subject, (0.0, -30.0, 5.0))


def _mask_poison(subject: LossSubject) -> Finding:
    return _masked(subject, (math.nan, math.inf, -math.inf))


def _empty_mask(subject: LossSubject) -> Finding:
    empty = torch.zeros_like(subject.mask)
    loss, gradient = subject.answer(subject.batch._replace(mask=empty), subject.tokens)
    alive = int((gradient != 0).sum())
    said = f"a microbatch without a token has the loss {float(loss):g} and {alive} gradients other than 0"
    return Finding(float(loss) == 0 and not alive, said, {"loss": float(loss)})


# Gradients


def _gradient(subject: LossSubject) -> Finding:
    batch, step = subject.batch, 1e-6
    gradient, frozen = subject.answer(batch).gradient, Held()

    def loss(logprobs: Tensor, *, record: bool) -> Tensor:
        # With a gradient to follow, as in training: what is computed under no_grad() is told apart by that.
        leaf = logprobs.clone().requires_grad_()
        frozen.place = None if record else 0
        with frozen:
            _, *others = (x.clone() for x in batch)
            result = subject.fn(leaf, *others, subject.tokens)
        return result.detach().sum()

    loss(batch.logprobs, record=True)
    numeric = torch.zeros_like(gradient)
    for place in batch.mask.nonzero().tolist():
        moved = torch.zeros_like(gradient)
        moved[tuple(place)] = step
        up, down = (loss(batch.logprobs + sign * moved, record=False) for sign in (1, -1))
        numeric[tuple(place)] = (up - down) / (2 * step)
    difference = _difference(numeric, torch.where(batch.mask, gradient, 0.0))
    said = f"autograd's gradient and finite differences differ by {difference:.1e} of their norm"
    return Finding(difference <= 1e-4, said, {"difference": difference})


def _policy_gradient(subject: LossSubject) -> Finding:
    """At ratio 1 the gradient of each action is -A times a positive number that its sequence shares."""
    per_token = _at_ratio_one(subject, subject.batch.advantages)
    gradient = subject.answer(subject.batch._replace(logprobs=subject.batch.old_logprobs)).gradient
    shared = torch.where(subject.mask, gradient[:, :1], 0.0)
    if per_token.passed or not _close(_difference(shared, gradient)):
        return per_token
    # A loss of whole sequences (GSPO), whose tokens share one gradient, knows one advantage for each.
    per_sequence = _at_ratio_one(subject, subject.batch.advantages[:, :1].expand_as(subject.mask))
    return per_sequence._replace(said=f"{per_sequence.said}, with one advantage per sequence")


def _at_ratio_one(subject: LossSubject, advantages: Tensor) -> Finding:
    batch = subject.batch._replace(logprobs=subject.batch.old_logprobs, advantages=advantages)
    gradient = subject.answer(batch).gradient
    target = torch.where(batch.mask, -batch.advantages, 0.0)
    scale = (gradient * target).sum(dim=1, keepdim=True) / target.square().sum(dim=1, keepdim=True)
    difference = _difference(gradient, scale * target)
    right = _close(difference) and bool((scale > 0).all())
    said = f"at ratio 1 the gradient is minus the advantage times {float(scale.min()):.3g} to {float(scale.max()):.3g}"
    return Finding(right, f"{said}, up to {difference:.1e} of its norm", {"difference": difference})


def _clip_side(subject: LossSubject) -> Finding:
    """An action that has moved the wrong way must be able to come back."""
    dead = []
    for sign, ratio, words in (
        (1.0, 0.5, "a good action that became rarer (A > 0, r = 0.5)"),
        (-1.0, 2.0, "a bad action that became likelier (A < 0, r = 2)"),
    ):
        old = subject.batch.old_logprobs
        batch = Batch(old + math.log(ratio), old, torch.full_like(old, sign), subject.mask)
        gradient = subject.answer(batch).gradient[subject.mask]
        if not bool((gradient * -sign > 0).all()):
            dead.append(words)
    said = f"no gradient back for {' and '.join(dead)}" if dead else "both kinds of action keep their gradient back"
    return Finding(not dead, said, {"dead_sides": len(dead)})


def _overflow(subject: LossSubject) -> Finding:
    old = subject.batch.old_logprobs.float()
    bad = 0
    for drift in (100.0, -100.0):
        for sign in (1.0, -1.0):
            batch = Batch(old + drift, old, torch.full_like(old, sign), subject.mask)
            loss, gradient = subject.answer(batch)
            bad += not (bool(loss.isfinite()) and bool(gradient.isfinite().all()))
    said = f"{bad} of 4 losses or gradients are non-finite where the policy has drifted by 100 nats, in float32"
    # A loss without a clamp is right as a formula, and a policy that has drifted so far is lost anyway.
    return Finding(True, said, {"nonfinite": bad}, warning=bad > 0)


def _inputs(subject: LossSubject) -> Finding:
    batch = Batch(*(x.clone() for x in subject.batch))
    subject.fn(batch.logprobs.requires_grad_(), *batch[1:], subject.tokens)
    changed = [n for n, x in subject.batch._asdict().items() if not torch.equal(x, getattr(batch, n).detach())]
    return Finding(not changed, f"changed in place: {', '.join(changed)}" if changed else "no argument is changed")


CHECKS = (
    Check(
        "split_invariance",
        _split_invariance,
        "a minibatch has one gradient, however it is split into microbatches or over processes",
        "each microbatch is divided by its own tokens, so that short ones weigh too much",
        "divide sums by the denominator that is given, and by nothing of the part's own",
    ),
    Check(
        "denominator",
        _denominator,
        "the loss is the sum over actions, or sequences, divided by the denominator",
        "the denominator is ignored or used twice",
        "divide sums by the denominator once",
    ),
    Check(
        "mask",
        _mask,
        "masked actions count nothing",
        "padding or an environment's tokens are in a sum or in a count",
        "replace masked inputs by 0 before computing, and count the mask's True entries",
    ),
    Check(
        "mask_poison",
        _mask_poison,
        "NaN and infinity in masked places reach neither the loss nor a gradient",
        "the mask multiplies a result (NaN * 0 is NaN), or where() is applied to results, whose gradient is then NaN",
        "torch.where(mask, x, 0) on each input before anything is computed",
    ),
    Check(
        "empty_mask",
        _empty_mask,
        "a microbatch of padding alone has loss 0 and no gradient",
        "the sum is divided by the part's own count, which is 0",
        "divide by the denominator that is given",
    ),
    Check(
        "gradient",
        _gradient,
        "the backward pass is the derivative of the forward pass (with what is detached on purpose held fixed)",
        "a backward pass written by hand, a fused kernel, an operation in place",
        "compare the kernel with the plain formula by torch.autograd.gradcheck",
    ),
    Check(
        "policy_gradient",
        _policy_gradient,
        "before the first step (ratio 1) the gradient is the policy gradient: -A per action, with one sign",
        "the sign of the advantage, a ratio that is detached as a whole, advantages paired with other actions",
        "minimise -ratio * advantage; the ratio carries the gradient",
    ),
    Check(
        "clip_side",
        _clip_side,
        "clipping never stops an action from coming back: only A > 0 with r above the range, and A < 0 below, lose it",
        "the ratio is clamped without the minimum of clipped and unclipped, or both sides are masked (right for "
        "double-sided importance sampling alone)",
        "max(-r * A, -clip(r) * A)",
    ),
    Check(
        "overflow",
        _overflow,
        "a policy that has drifted far has a large loss, not NaN",
        "exp of a log-ratio above 88 is infinite in float32, and infinity times 0 is NaN",
        "clamp the log-ratio (to 20, say) before exp",
    ),
    Check(
        "inputs",
        _inputs,
        "the arguments are as they were",
        "an operation in place on recorded data, which the next epoch reads again",
        "use the operation that returns a new tensor",
    ),
)
