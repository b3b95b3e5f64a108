"""Reward probe: whether PPO can learn from these scores, how long they take, and what it would exploit."""

from __future__ import annotations

import itertools
import re
import textwrap

import numpy as np

from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.pipeline.doctor.answers import try_answers
from rlhf_ppo.pipeline.doctor.findings import Section
from rlhf_ppo.pipeline.doctor.probe import TIES, Numbers, Probe, correlation, sample_and_measure
from rlhf_ppo.rewards.validation import RewardError
from rlhf_ppo.runtime.errors import RunError
from rlhf_ppo.runtime.texts import display_text
from rlhf_ppo.training.run import Run


def examine_reward(section: Section, run: Run, model: ActorCritic, prompts: int, each: int) -> Probe | None:
    """Sample, score, and add what the scores say; None: there is nothing to measure."""
    assert run.train_prompts is not None
    try:
        probe = sample_and_measure(run, model, min(prompts, len(run.train_prompts)), each)
    except RunError as error:
        remedy = "mend the environment, respond or server: this would end the run, too"
        if isinstance(error, RewardError):
            remedy = "mend the reward function; or set drop_nonfinite_scores, reward_timeout_s"
        # What was written for later is gone when the examination is over.
        gone = rf"\. [^.]*{re.escape(str(run.folder.path))}\S*"
        section.stop(re.sub(gone, "", str(error).splitlines()[0]), remedy)
        return None
    section.facts["responses"] = len(probe.rollout.prompts)
    check_ends(section, run, probe)
    if check_spread(section, probe):
        check_scale(section, run, probe)
        check_determinism(section, probe)
        exploits = check_length(section, probe)
        if run.respond is None:
            exploits += try_answers(section, run, probe)
        else:
            section.ok("made-up answers were not tried: they are replies, and these are conversations")
        say_exploits(section, exploits)
        check_agreement(section, probe)
        section.pages.append(best_and_worst(probe))
    check_latency(section, run, probe)
    return probe


def check_ends(section: Section, run: Run, probe: Probe) -> None:
    """Say how many responses end by themselves."""
    ended = float(probe.rollout.finished.double().mean())
    words = f"{ended:.0%} of {len(probe.rollout.prompts)} responses end by themselves"
    mean = float(probe.rollout.lengths.double().mean())
    if mean < 2:
        section.warn(
            f"{words}, after {mean:.1f} tokens", "check the prompts' form and the chat template, or set min_new_tokens"
        )
    elif ended == 0 and run.args.missing_eos_penalty:
        section.warn(f"{words}: all are charged missing_eos_penalty", "raise max_new_tokens, or set stop_strings")
    elif ended == 0:
        section.warn(
            f"{words}, the rest at {run.args.max_new_tokens} tokens: rewards see cut-off text",
            "raise max_new_tokens, or set stop_strings; leave it if cut-off text is what you want",
        )
    else:
        section.ok(f"{words}, after {mean:.1f} tokens on average")
    section.facts["ended"] = ended


def check_spread(section: Section, probe: Probe) -> bool:
    """Say whether scores differ, within prompts above all; returns whether they do at all."""
    totals = probe.totals
    unscored = float(np.isnan(totals).mean())
    if unscored == 1:
        section.stop("the reward scored none of the responses (None for all)", "let it return numbers")
        return False
    if unscored:
        section.warn(
            f"{unscored:.0%} of the responses were not scored, and teach nothing", "return a low score instead of None"
        )
    whole = float(np.nanstd(totals))
    if whole < TIES and probe.differs_by_token:
        section.ok(f"every response scored {float(np.nanmean(totals)):.4g} in sum, but their tokens differ in score")
        return False
    if whole < TIES:
        section.stop(
            f"every response scored {float(np.nanmean(totals)):.4g}: there is nothing to learn",
            "let the reward tell responses apart; or start from a model that solves some of the task",
        )
        return False
    groups = probe.by_prompt(totals)
    groups = groups[np.isfinite(groups).sum(axis=1) > 1]
    inside = np.nanstd(groups, axis=1)
    teach = float((inside > TIES).mean()) if len(groups) else 0.0
    across = float(np.nanstd(np.nanmean(groups, axis=1))) if len(groups) else 0.0
    within = float(np.sqrt(np.mean(inside**2))) if len(groups) else 0.0
    words = f"scores spread by {within:.3g} within a prompt and {across:.3g} across prompts"
    remedy = "take prompts that the model sometimes solves, raise temperature, or train with `sft` first"
    if teach == 0 and probe.differs_by_token:
        section.ok(f"{words}; no prompt's responses differ in sum, but their tokens do")
    elif teach == 0:
        section.stop(f"{words}: no prompt's responses differ in score, so none can teach", remedy)
    elif teach < 0.25:
        section.warn(f"{words}: only {teach:.0%} of the prompts can teach", remedy)
    else:
        section.ok(f"{words}; {teach:.0%} of the prompts can teach (their responses differ in score)")
    section.facts |= {"mean": float(np.nanmean(totals)), "within": within, "across": across, "can_teach": teach}
    return True


def check_scale(section: Section, run: Run, probe: Probe) -> None:
    """Compare the scores' spread with the price of moving away from the reference."""
    args, within = run.args, section.facts["within"]
    if not args.kl_coef or args.normalize_scores or not within:
        return
    nats = within / args.kl_coef
    words = f"one standard deviation of score pays for {nats:.3g} nats of KL a response (kl_coef={args.kl_coef:g})"
    if nats > 300:
        section.warn(f"{words}: the KL will hold nothing back", "set normalize_scores, or raise kl_coef")
    elif nats < 0.3:
        section.warn(f"{words}: the KL will outweigh the reward", "set normalize_scores, or lower kl_coef")
    else:
        section.ok(words)
    section.facts["nats_per_std"] = nats


def check_determinism(section: Section, probe: Probe) -> None:
    """Compare two scorings of the same responses."""
    for name, second in probe.again.items():
        first = probe.parts[name]
        both = np.isfinite(first) & np.isfinite(second)
        apart = float(np.abs(first[both] - second[both]).max()) if both.any() else 0.0
        if apart <= TIES * (1 + float(np.abs(first[both]).max(initial=0))):
            section.ok(f"{name} scores a response alike each time")
            continue
        agreement = correlation(first, second)
        words = f"{name} scores the same response differently each time, by up to {apart:.3g}"
        if agreement < 0.3:
            section.stop(
                f"{words}; two scorings correlate by {agreement:.2f}: what PPO would learn from is chance",
                "make the reward depend on the response; or average several of its answers",
            )
        else:
            section.warn(
                f"{words} (correlation {agreement:.2f}), or by what it is scored beside",
                "seed it, or set its temperature to 0; whole_rollout_rewards if it compares responses",
            )
    section.facts["agreement_of_two_scorings"] = {n: correlation(probe.parts[n], x) for n, x in probe.again.items()}


def check_length(section: Section, probe: Probe) -> list[str]:
    """Say whether longer or shorter responses score higher, comparing responses to the same prompt."""

    def centred(numbers: Numbers) -> Numbers:
        groups = probe.by_prompt(numbers)
        return (groups - np.nanmean(groups, axis=1, keepdims=True)).ravel()

    found = correlation(centred(probe.totals), centred(probe.lengths))
    words = f"score and length correlate by {found:.2f} within prompts"
    section.facts["length_correlation"] = found
    if abs(found) < 0.7:
        section.ok(words)
        return []
    section.warn(words, "divide the score by the length, or leave length out of it; or set kl_coef higher")
    return ["to write longer" if found > 0 else "to write shorter"]


def say_exploits(section: Section, exploits: list[str]) -> None:
    """Say in words what PPO would learn to exploit."""
    section.facts["exploits"] = exploits
    if exploits:
        section.warn(
            f"PPO would learn {', '.join(exploits)}: that scores as well as the best sampled responses",
            "score such answers low; a judge that is not trained on (judge) shows when it happens",
        )
    else:
        section.ok("none of the cheap tricks that were tried pays")


def check_agreement(section: Section, probe: Probe) -> None:
    """Say how far the parts of a mixture agree, and which of them make the sum's spread."""
    if len(probe.parts) < 2:
        return
    spread = {name: abs(probe.weights[name]) * float(np.nanstd(part)) for name, part in probe.parts.items()}
    total = sum(spread.values())
    shares = {name: x / total for name, x in spread.items()}
    words = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    weak = [name for name, share in shares.items() if share < 0.1]
    if weak:
        section.warn(
            f"the score's spread is made of {words}: {weak[0]} is hardly heard",
            "set reward_weights, or normalize_scores",
        )
    else:
        section.ok(f"the score's spread is made of {words}")
    pairs = {
        f"{a} and {b}": correlation(probe.weights[a] * probe.parts[a], probe.weights[b] * probe.parts[b])
        for a, b in itertools.combinations(probe.parts, 2)
    }
    for pair, found in pairs.items():
        if found < -0.5:
            section.warn(
                f"{pair} disagree (correlation {found:.2f}): what one pays for costs the other",
                "decide between them with reward_weights",
            )
        else:
            section.ok(f"{pair} correlate by {found:.2f}")
    section.facts["mixture"] = {"shares": shares, "correlations": pairs}


def check_latency(section: Section, run: Run, probe: Probe) -> None:
    """Say how long a rollout's scores take, beside sampling its responses."""
    size = run.args.rollout_batch_size
    scale = size / len(probe.rollout.prompts)
    scoring, sampling = sum(probe.scoring_s.values()) * scale, probe.sampling_s * scale
    words = f"a rollout of {size} responses takes {scoring:.2g} s to score, {sampling:.2g} s to sample"
    if scoring > sampling and scoring > 1:
        section.warn(
            f"{words}: the reward is most of it",
            "score in batches, set http_concurrency for a server, or cache_rewards if responses repeat",
        )
    else:
        section.ok(words)
    section.facts["rollout_seconds"] = {"scoring": scoring, "sampling": sampling}


def best_and_worst(probe: Probe, width: int = 56) -> str:
    """Show the best and the worst response to the prompt whose scores differ most, side by side."""
    groups = probe.by_prompt(probe.totals)
    spread = np.array([np.ptp(row[np.isfinite(row)]) if np.isfinite(row).any() else -1 for row in groups])
    prompt = int(spread.argmax())
    best, worst = int(np.nanargmax(groups[prompt])), int(np.nanargmin(groups[prompt]))
    sides = [_column(probe, prompt, side, name, width) for side, name in ((best, "best"), (worst, "worst"))]
    rows = itertools.zip_longest(*sides, fillvalue="")
    asked = textwrap.shorten(display_text(probe.rollout.prompts[prompt * probe.each]), 2 * width)
    return "\n".join([f"prompt: {asked}", *(f"{left:<{width}}  {right}" for left, right in rows)])


def _column(probe: Probe, prompt: int, side: int, name: str, width: int) -> list[str]:
    row = prompt * probe.each + side
    said = " ".join(display_text(probe.rollout.completions[row]).split())
    return [f"{name}, {probe.totals[row]:.3g}", *textwrap.wrap(said, width)[:8]]
