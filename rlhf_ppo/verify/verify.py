"""Verify: run the checks on a model, its tokenizer, reward, data and settings, and report."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ppo.config.arguments.verify import VerifyArgs
from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.data.rows import RowSource
from rlhf_ppo.generation.environments.episodes import TextEnvironment
from rlhf_ppo.generation.multi_turn import Respond
from rlhf_ppo.generation.tools.schemas import Tool
from rlhf_ppo.models.compare import source_name
from rlhf_ppo.pipeline.train import load_prompts, trainer_arguments
from rlhf_ppo.rewards.loading import RewardSource
from rlhf_ppo.runtime.machine.threads import torch_threads
from rlhf_ppo.runtime.processes.launch import read_launch
from rlhf_ppo.verify.report import Check, Report, run_check
from rlhf_ppo.verify.run_checks import CHECKS as RUN_CHECKS
from rlhf_ppo.verify.subject import Arguments, Subject, small_run
from rlhf_ppo.verify.template_checks import CHECKS as TEMPLATE_CHECKS
from rlhf_ppo.verify.token_checks import CHECKS as TOKEN_CHECKS
from rlhf_ppo.verify.update_checks import CHECKS as UPDATE_CHECKS

# Standstill last of those on one trainer: it alone takes optimizer steps.
_LAST = ("standstill",)
CHECKS: tuple[Check, ...] = (*UPDATE_CHECKS, *TOKEN_CHECKS, *TEMPLATE_CHECKS, *RUN_CHECKS)


def verify_training(
    model: str | PreTrainedModel,
    reward_funcs: RewardSource | Sequence[RewardSource] | None,
    args: RLHFConfig,
    train_dataset: RowSource,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    ref_model: str | PreTrainedModel | None = None,
    value_model: str | PreTrainedModel | None = None,
    peft_config: Any = None,
    respond: Respond | None = None,
    tools: Sequence[Tool] = (),
    environment: Callable[[], TextEnvironment] | None = None,
    num_responses: int = 16,
    response_tokens: int = 64,
    only: Sequence[str] = (),
) -> Report:
    """Check on these arguments of :class:`rlhf_ppo.PPOTrainer` that training is computed right.

    Two small rollouts are sampled and trained on; nothing is written into ``args.output_dir``, and model objects are
    copied.

    Args:
        num_responses: responses to check with.
        response_tokens: maximum response length.
        only: names of the checks to run; none: all.
    Raises:
        ValueError: bad settings, data, reward or models, as the trainer says it; or no check of that name.
        RewardError, RespondError: the reward or respond failed on the first rollout.
    """
    small = small_run(args, num_responses, response_tokens)
    given = Arguments(
        model=model,
        reward_funcs=reward_funcs,
        args=dataclasses.replace(args, **small),
        train_dataset=train_dataset,
        processing_class=processing_class,
        ref_model=ref_model,
        value_model=value_model,
        peft_config=peft_config,
        respond=respond,
        tools=tools,
        environment=environment,
    )
    return _run_checks(given, only)


def verify_command(args: VerifyArgs) -> int:
    """Run the `verify` command; the exit code is 1 if a check failed."""
    _chosen(args.only)
    started = time.perf_counter()
    train_rows, _ = load_prompts(dataclasses.replace(args, eval_dataset=None, eval_split=None, eval_size=0))
    small = dataclasses.replace(args, **small_run(args, args.num_responses, args.response_tokens))
    arguments = {name: x for name, x in trainer_arguments(small).items() if name != "judge_funcs"}
    given = Arguments(**arguments, train_dataset=train_rows, command=small)
    report = _run_checks(given, args.only)
    if args.json:
        print(json.dumps(report.facts(), indent=2))
    else:
        print(f"{report} in {time.perf_counter() - started:.0f} s")
    return 0 if report.passed else 1


def _chosen(only: Sequence[str]) -> list[Check]:
    """Return the checks with these names, all for none.

    Raises:
        ValueError: there is no check of a name, or several processes were started.
    """
    names = [check.name for check in CHECKS]
    for name in only:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"only={name!r} names no check{meant} known: {', '.join(names)}")
    if read_launch().size > 1:
        raise ValueError(
            f"verify was started as {read_launch().size} processes, but compares one with two that it starts itself: "
            "run it without a launcher"
        )
    return [check for check in CHECKS if not only or check.name in only]


def _run_checks(given: Arguments, only: Sequence[str]) -> Report:
    checks = _chosen(only)
    order = sorted(checks, key=lambda check: check.name in _LAST)
    with tempfile.TemporaryDirectory(prefix="rlhf-ppo-verify-") as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*a constant reward gives no signal")  # the report says so
        subject = Subject(given, Path(folder))
        with torch_threads(given.args.num_threads, subject.model):
            results = {check.name: run_check(check, subject) for check in order}
    return Report(_words(subject), tuple(results[check.name] for check in checks))


def _words(subject: Subject) -> str:
    run, rollout = subject.run, subject.rollout
    lengths = rollout.lengths.tolist()
    return (
        f"{source_name(subject.given.model)}: {len(rollout.prompts)} responses of {min(lengths)} to {max(lengths)} "
        f"tokens, on {run.device.type} in {'bf16' if run.bf16 else 'fp32'}"
    )
