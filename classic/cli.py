"""The `classic-ppo` command: train ENV, compare ENV --vary a=1,2; evaluate, explain and advise FOLDER."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from classic.cli_args import CompareCommand, EvaluateCommand, ExplainCommand, TrainCommand
from rlhf_ppo.runtime.commands import AdviseArgs
from rlhf_ppo.runtime.errors import RunError, print_failure
from rlhf_ppo.runtime.settings import Command, run_command
from rlhf_ppo.runtime.signals import Interrupted

COMMANDS: dict[str, Command] = {
    "train": (TrainCommand, "classic.commands:train"),
    "evaluate": (EvaluateCommand, "classic.commands:evaluate"),
    "compare": (CompareCommand, "classic.commands:compare"),
    "explain": (ExplainCommand, "classic.commands:explain"),
    "advise": (AdviseArgs, "rlhf_ppo.runtime.advice:print_advice"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `classic-ppo`.

    Returns:
        The exit code: 0, 1 for a failed run, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        return run_command("classic-ppo", COMMANDS, argv)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (RunError, OSError) as error:
        return print_failure(error)


if __name__ == "__main__":
    raise SystemExit(main())
