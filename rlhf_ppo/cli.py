"""The `rlhf-ppo` command: each subcommand's arguments are parsed and checked before what it runs is imported."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_ppo.config.arguments.commands import (
    DemoArgs,
    ExplainArgs,
    ExportArgs,
    MigrateArgs,
    ReplayArgs,
    join_command_line,
)
from rlhf_ppo.config.arguments.critic_fit import CriticFitArgs, CriticReportArgs
from rlhf_ppo.config.arguments.doctor import DoctorArgs
from rlhf_ppo.config.arguments.inference import EvaluateArgs, GenerateArgs
from rlhf_ppo.config.arguments.plan import PlanArgs
from rlhf_ppo.config.arguments.reward_training import RewardTrainingArgs
from rlhf_ppo.config.arguments.sft import SFTArgs
from rlhf_ppo.config.arguments.train import CriticRecordArgs, TrainArgs
from rlhf_ppo.config.arguments.verify import VerifyArgs
from rlhf_ppo.config.presets import PresetsArgs
from rlhf_ppo.runtime.command_line.commands import AdviseArgs, CheckArgs, ReportArgs
from rlhf_ppo.runtime.command_line.settings import Command, run_command
from rlhf_ppo.runtime.errors import RunError, print_failure
from rlhf_ppo.runtime.machine.signals import Interrupted
from rlhf_ppo.runtime.processes.launch import read_launch
from rlhf_ppo.runtime.processes.voice import settle

COMMANDS: dict[str, Command] = {
    "demo": (DemoArgs, "rlhf_ppo.pipeline.demo:demo"),
    "train": (TrainArgs, "rlhf_ppo.pipeline.train:train"),
    "doctor": (DoctorArgs, "rlhf_ppo.pipeline.doctor.examine:doctor"),
    "verify": (VerifyArgs, "rlhf_ppo.verify.verify:verify_command"),
    "plan": (PlanArgs, "rlhf_ppo.pipeline.plan.report:plan_command"),
    "sft": (SFTArgs, "rlhf_ppo.pipeline.labelled.sft:sft_command"),
    "reward": (RewardTrainingArgs, "rlhf_ppo.pipeline.labelled.reward_training:reward_command"),
    "evaluate": (EvaluateArgs, "rlhf_ppo.pipeline.evaluation.evaluate:evaluate_command"),
    "critic record": (CriticRecordArgs, "rlhf_ppo.pipeline.train:record_command"),
    "critic fit": (CriticFitArgs, "rlhf_ppo.pipeline.critic.critic_fit:fit_command"),
    "critic report": (CriticReportArgs, "rlhf_ppo.pipeline.critic.critic_report:report_command"),
    "generate": (GenerateArgs, "rlhf_ppo.pipeline.chat_session:generate_or_chat"),
    "explain": (ExplainArgs, "rlhf_ppo.pipeline.explain:explain_command"),
    "presets": (PresetsArgs, "rlhf_ppo.config.presets:print_presets"),
    "migrate": (MigrateArgs, "rlhf_ppo.migration.migrate:migrate_command"),
    "replay": (ReplayArgs, "rlhf_ppo.pipeline.replay:print_replay"),
    "export": (ExportArgs, "rlhf_ppo.pipeline.export:export_command"),
    "check": (CheckArgs, "rlhf_ppo.runtime.checkpoints.resume:check"),
    "advise": (AdviseArgs, "rlhf_ppo.runtime.diagnosis.advice:print_advice"),
    "report": (ReportArgs, "rlhf_ppo.runtime.report.page:report_command"),
}

DIVIDED = ("train", "sft", "reward", "evaluate", "generate", "critic record", "critic fit", "critic report")
"""Commands that divide their work among the processes of a launcher."""


def _join(command: str) -> None:
    """Join the other processes, before anything is read that each of them would complain about."""
    if read_launch().size > 1 and command.removeprefix("rlhf-ppo ") in DIVIDED:
        from rlhf_ppo.runtime.processes.join import join_processes

        join_processes()


@contextmanager
def _quiet() -> Iterator[None]:
    from rlhf_ppo.models.quiet_libraries import quiet_libraries

    with quiet_libraries():
        yield


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0, 1 for a failed run, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM.
    """
    words = join_command_line(sys.argv[1:] if argv is None else argv)
    try:
        return run_command("rlhf-ppo", COMMANDS, words, before=_join, around=_quiet)
    except (KeyboardInterrupt, RunError, OSError) as error:  # an OSError is mostly a full disk
        prints, code = settle(error)
        if prints:
            _print_end(error, words)
        return code


def _print_end(error: BaseException, words: list[str]) -> None:
    if isinstance(error, Interrupted):
        # Without a checkpoint (a full disk) a warning has said what was saved.
        print(error if error.saved is None else f"{error}. {resume_hint(words, error)}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        print_failure(error)


def resume_hint(words: list[str], stop: Interrupted) -> str:
    """Return the sentence that says how to resume an interrupted command."""
    if words[0] != "train":
        return "Resume from Python: PPOTrainer(...).train(resume_from_checkpoint=...)"
    flag = "--resume-from-checkpoint"
    # The command may itself have resumed: drop that flag and its value.
    earlier = [word.partition("=")[0].replace("_", "-") in (flag, "--resume") for word in words]
    values = [old and "=" not in word for old, word in zip(earlier, words, strict=True)]
    kept = [word for word, old, value in zip(words, earlier, [False, *values], strict=False) if not old and not value]
    return f"Resume with: {shlex.join(['rlhf-ppo', *kept, flag, str(stop.saved)])}"


if __name__ == "__main__":
    sys.exit(main())
