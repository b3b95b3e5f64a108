"""Checks of an update: ratio 1 before it, one gradient for every split, nothing from masked places, EOS and score."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import torch
from torch import Tensor

from rlhf_ppo.core import Experience, PolicyOutput, ppo_loss
from rlhf_ppo.core.masked import last_true
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.runtime.errors import RunError
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.rewards import shape_rewards
from rlhf_ppo.training.rollouts.collect import next_draws, next_prompts
from rlhf_ppo.training.rollouts.generate import generate
from rlhf_ppo.verify.changed_rollouts import widened
from rlhf_ppo.verify.report import Check, Finding
from rlhf_ppo.verify.subject import Gradient, Subject, largest


def _splits(subject: Subject) -> dict[str, Gradient]:
    sizes = {"one response each": 1, "as the run does": subject.run.microbatch_tokens, "all at once": 10**9}
    return {words: subject.gradient(microbatch_tokens=tokens) for words, tokens in sizes.items()}


def _repeatable(subject: Subject) -> Finding:
    part = subject.rollout.sequences(subject.rows)
    first, again = subject.forward(part), subject.forward(part)
    gap = largest([first.logprobs - again.logprobs])
    modes = [type(m).__name__ for m in subject.model.modules() if m.training]
    mode = f"; in training mode: {', '.join(sorted(set(modes)))}" if modes and gap else ""
    said = f"two passes over the same responses differ by {gap:.2g} nats{mode}"
    return Finding(gap <= (0.0 if subject.run.device.type == "cpu" else subject.bound), said, {"gap_nats": gap})


def _ratio(subject: Subject) -> Finding:
    gaps = {words: gradient.max_abs_log_ratio for words, gradient in _splits(subject).items()}
    gap = max(gaps.values()) if not any(map(math.isnan, gaps.values())) else math.inf
    listed = ", ".join(f"{words} {x:.2g}" for words, x in gaps.items())
    said = f"largest |log ratio| in nats, by microbatches: {listed} (at most {subject.bound:g})"
    return Finding(gap <= subject.bound, said, {"max_abs_log_ratio": gap})


def _standstill(subject: Subject) -> Finding:
    policy = [p.detach().clone() for p in subject.model.policy_parameters()]
    try:
        metrics = subject.trainer.step(subject.scored)
    except RunError as error:
        return Finding(False, f"the update stopped: {error}")
    moved = largest(a - b.detach() for a, b in zip(policy, subject.model.policy_parameters(), strict=True))
    gap, clipped = metrics["policy/max_abs_log_ratio"], metrics["policy/clip_fraction"]
    said = (
        f"in {subject.args.steps_per_rollout} optimizer steps at learning rate 0 weights moved by {moved:.2g}, |log "
        f"ratio| reached {gap:.2g} nats, and {clipped:.2g} of the actions were clipped"
    )
    right = moved == 0 and gap <= subject.bound and clipped == 0
    return Finding(right, said, {"moved": moved, "max_abs_log_ratio": gap, "clip_fraction": clipped})


def _microbatches(subject: Subject) -> Finding:
    splits = list(_splits(subject).values())
    worst = max(splits[0].difference(other) for other in splits[1:])
    said = (
        f"the minibatch's gradient (norm {splits[0].norm:.3g}) differs by {worst:.2g} of its norm over 3 splits "
        f"(at most {subject.gradient_bound:g})"
    )
    return Finding(worst <= subject.gradient_bound and splits[0].norm > 0, said, {"difference": worst})


def _poisoned(x: Tensor | None, mask: Tensor) -> Tensor | None:
    return None if x is None else torch.where(mask, x, math.nan)


def _estimated(subject: Subject, rollout: Rollout) -> Experience:
    return estimate(rollout, shape_rewards(rollout, subject.args, subject.trainer.kl_coef), subject.args).experience


def _nan_poison(subject: Subject) -> Finding:
    # Three more places, so that there is padding even where all responses are equally long.
    wide = widened(subject.scored, left=0, right=3, filler=0)
    mask, recorded = wide.mask, ("logprobs", "values", "ref_logprobs", "sampled_logprobs")
    poisoned = dataclasses.replace(wide, **{name: _poisoned(getattr(wide, name), mask) for name in recorded})
    clean, spoiled = _estimated(subject, wide), _estimated(subject, poisoned)
    leaks = sum(not torch.equal(a[mask], b[mask]) for a, b in _pairs(clean, spoiled))
    fields = {name: _poisoned(x, mask) for name, x in vars(clean).items() if x is not None and x.is_floating_point()}
    before, after = (subject.gradient(wide, old) for old in (clean, dataclasses.replace(clean, **fields)))
    difference = before.difference(after)
    losses = sum(not math.isclose(x, after.losses[name], abs_tol=1e-6) for name, x in before.losses.items())
    said = (
        f"NaN in all {int((~mask).sum())} masked places changes the gradient by {difference:.2g} of its norm, {losses} "
        f"of the losses and {leaks} of the estimates"
    )
    right = difference <= subject.gradient_bound and not losses and not leaks
    return Finding(right, said, {"difference": difference, "losses": losses, "leaks": leaks})


def _pairs(one: Experience, other: Experience) -> list[tuple[Tensor, Tensor]]:
    names = ("advantages", "returns", "values")
    found = [(getattr(one, name), getattr(other, name)) for name in names]
    return [(a, b) for a, b in found if a is not None and b is not None]


def _score_place(subject: Subject) -> Finding:
    rewards = shape_rewards(subject.scored, subject.args, 0.0)
    lengths = [max((i for i, chosen in enumerate(row) if chosen), default=-1) for row in subject.rollout.mask.tolist()]
    wrong = 0
    for row, last in zip(rewards.per_token.tolist(), lengths, strict=True):
        wrong += [t for t, reward in enumerate(row) if reward != 0] != ([] if last < 0 else [last])
    said = f"in {wrong} of {len(lengths)} responses the score is elsewhere than on the last token that the policy chose"
    return Finding(wrong == 0, said, {"wrong": wrong})


def _eos_gradient(subject: Subject) -> Finding:
    run, model, state = subject.run, subject.model, subject.trainer.state
    rollout, stops, forced = subject.scored, run.sampling.stop_token_ids, ""
    if not stops and not run.sampling.stop_strings:
        return Finding(None, "the run has no stop token or string: responses end at max_new_tokens alone")
    if not rollout.finished.any():
        # None of these responses has ended by itself, so the same draws are made with a token that they did have.
        counts = Counter(rollout.response_ids[rollout.mask].tolist())
        stops = (counts.most_common(1)[0][0],)
        changed = dataclasses.replace(run, sampling=dataclasses.replace(run.sampling, stop_token_ids=stops))
        rollout = generate(changed, model, next_prompts(run, state.iteration), next_draws(run, state))
        forced = f" (none of them did with the run's stop tokens, so token {stops[0]} was made one)"
    mask = rollout.mask
    ended = last_true(mask) & rollout.finished[:, None]
    stop = torch.isin(rollout.response_ids, torch.tensor(stops, device=mask.device))
    lost = 0 if run.sampling.stop_strings else int((ended & ~stop).sum())
    logprobs = rollout.logprobs.detach().clone().requires_grad_()
    old = Experience(rollout.logprobs, None, torch.ones_like(logprobs), None, mask, turns=torch.zeros_like(mask.long()))
    plain = dataclasses.replace(subject.args, ent_coef=0.0, kl_loss_coef=0.0, kl_loss="k2", positive_loss_coef=0.0)
    ppo_loss(PolicyOutput(logprobs), old, plain).policy.backward()
    assert logprobs.grad is not None
    dead = int((logprobs.grad[ended] == 0).sum())
    count = int(ended.sum())
    said = f"{count} responses ended by themselves{forced}: {dead} of their last tokens have no gradient"
    said += f", and {lost} are not the token that ended them, which is masked" if lost else ""
    return Finding(count > 0 and not dead and not lost, said, {"ended": count, "dead": dead, "masked": lost})


CHECKS = (
    Check(
        "repeatable",
        _repeatable,
        "two forward passes over one batch give the same log-probs: no dropout or other noise",
        "dropout left on (an adapter's too), a router with noise, code of the model's own that draws numbers",
        "the model's eval(), dropout 0 in its config or in peft_config",
    ),
    Check(
        "ratio",
        _ratio,
        "before the first step new and old log-probs agree (ratio 1), however the minibatch is split",
        "a stale cache, dropout, a sampler that filters or renormalises, another temperature, padding in the positions",
        "recompute_logprobs=True; precision='fp32' if bf16's rounding is too coarse for the model",
    ),
    Check(
        "standstill",
        _standstill,
        "a whole update at learning rate 0 leaves weights and ratios as they were, through all epochs and minibatches",
        "something besides the optimizer changes weights: a hook, a callback, statistics of a normalisation layer",
        "remove the hook; freeze layers with running statistics",
    ),
    Check(
        "microbatches",
        _microbatches,
        "a minibatch has one gradient, however microbatch_tokens splits it",
        "a loss divided by its own microbatch, a model whose rows depend on each other (batch norm, routing by batch)",
        "a model without such layers; precision='fp32' to tell rounding from a fault",
    ),
    Check(
        "nan_poison",
        _nan_poison,
        "NaN in every masked place changes no advantage, return or gradient",
        "a mask that multiplies, statistics over padding",
        "nothing to set: report it, with the model's name",
    ),
    Check(
        "score_place",
        _score_place,
        "a response's score is on the last token that the policy chose",
        "padding or an environment's tokens taken for the response, a score one token late",
        "nothing to set: report it",
    ),
    Check(
        "eos_gradient",
        _eos_gradient,
        "the token that ends a response is trained, so that the policy can learn to stop",
        "a mask that is made from ids takes the stop token for padding (pad == eos)",
        "stop_token_ids: the tokens that end a turn in the model's chat template",
    ),
)
