"""Examine a run: preflight, reward probe and plan, each without leaving anything behind; the command `doctor`."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_ppo.config.arguments.doctor import DoctorArgs
from rlhf_ppo.config.engine import in_process
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.pipeline.doctor.arithmetic import check_batches
from rlhf_ppo.pipeline.doctor.findings import Examination, Section
from rlhf_ppo.pipeline.doctor.preflight import (
    check_device,
    check_disk,
    check_folder,
    check_lengths,
    check_tokens,
    check_trackers,
)
from rlhf_ppo.pipeline.doctor.reward import examine_reward
from rlhf_ppo.pipeline.plan.plan import Plan, plan
from rlhf_ppo.pipeline.plan.report import text, verdict
from rlhf_ppo.pipeline.train import load_prompts, trainer_arguments
from rlhf_ppo.runtime.errors import RunError
from rlhf_ppo.runtime.machine.threads import torch_threads
from rlhf_ppo.training.run import Run
from rlhf_ppo.training.setup import set_up

BAD_INPUT = (ValueError, OSError, ModuleNotFoundError, RunError)


def doctor(args: DoctorArgs) -> int:
    """Run the `doctor` command; return 1 if something speaks against the run, else 0."""
    found = examine(args)
    print(json.dumps(found.facts(), indent=2) if args.json else found.text())
    return 1 if found.stops else 0


def examine(args: DoctorArgs) -> Examination:
    """Examine the run that `train` would start with the same settings; nothing is trained, nothing is written."""
    preflight, reward = Section("Preflight"), Section("Reward, asked about the untrained policy's responses")
    found = Examination([preflight])
    check_folder(preflight, args.output_dir)
    check_trackers(preflight, args.report_to)
    with tempfile.TemporaryDirectory(prefix="rlhf-ppo-doctor-") as folder, _noting(preflight):
        try:
            run, model = _set_up(args, folder)
        except BAD_INPUT as error:
            preflight.stop(str(error), "correct this first: what follows it was not examined")
            return found
        assert run.train_prompts is not None
        if args.generation == "vllm":
            preflight.ok("sampled here instead of by the vLLM server, which keeps what it holds")
        check_batches(preflight, args, len(run.train_prompts))
        check_tokens(preflight, run, model)
        lengths = check_lengths(preflight, run)
        check_disk(preflight, run, model, args)
        with torch_threads(args.num_threads, model):
            check_device(preflight, run, model)
            found.sections.append(reward)
            probe = examine_reward(reward, run, model, args.probe_prompts, args.probe_responses)
        said = args.max_new_tokens if probe is None else round(float(probe.rollout.lengths.double().mean()))
    found.sections.append(examine_plan(args, max(lengths), said, reward))
    return found


def _set_up(args: DoctorArgs, folder: str) -> tuple[Run, ActorCritic]:
    rows, eval_rows = load_prompts(args)
    aside = dataclasses.replace(args, output_dir=folder, quiet=True, **in_process(vars(args)))
    data = {"train_dataset": rows, "eval_dataset": eval_rows, "processing_class": None}
    return set_up(**trainer_arguments(aside), **data)


@contextmanager
def _noting(section: Section) -> Iterator[None]:
    """Make findings of the warnings that come up during the block."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for said in dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning):
        section.warn(said, "see the message")


def examine_plan(args: DoctorArgs, prompt_tokens: int, response_tokens: int, reward: Section) -> Section:
    """Plan memory and time, with the lengths that were measured."""
    section = Section("Plan: memory and time on paper")
    try:
        found = plan(args.as_plan(prompt_tokens, min(response_tokens, args.max_new_tokens)))
    except ValueError as error:
        section.warn(f"no plan: {error}", "measure the first iterations instead")
        return section
    section.pages.append(text(found).rpartition("\n\n")[0])
    said, _, more = verdict(found).partition("\n")
    if found.fits:
        for line in [said, *more.splitlines()]:
            section.ok(line)
    else:
        section.stop(said, more)
    _say_time(section, args, found, reward)
    section.facts |= {"peak_bytes": found.peak, "usable_bytes": found.usable, "iteration_seconds": found.seconds}
    return section


def _say_time(section: Section, args: DoctorArgs, found: Plan, reward: Section) -> None:
    """Say how long the run takes, the reward as measured."""
    scoring = reward.facts.get("rollout_seconds", {}).get("scoring", 0.0)
    each = found.seconds + scoring
    share = scoring / each if each else 0.0
    words = f"an iteration takes about {each:.2g} s, {share:.0%} of it the reward as measured here; "
    words += f"the run's {args.num_rollouts:,} about {_hours(each * args.num_rollouts)}"
    if share > 0.5:
        section.warn(words, "speed the reward up: the GPU, or CPU, waits for it")
    else:
        section.ok(words)


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
