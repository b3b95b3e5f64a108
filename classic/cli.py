"""The `classic-ppo` command: train, compare and tune ENV; evaluate, explain, record, export, push and advise FOLDER.

Arguments are checked before anything heavy is imported, so a command names its function as text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import tyro

from classic.config import PPOArgs
from rlhf_ppo.core.validation import Settings
from rlhf_ppo.runtime.command_line.commands import AdviseArgs, ReportArgs
from rlhf_ppo.runtime.command_line.settings import Command, run_command
from rlhf_ppo.runtime.errors import RunError, print_failure
from rlhf_ppo.runtime.machine.signals import Interrupted


@dataclass(frozen=True, kw_only=True)
class TrainCommand(PPOArgs):
    """Train an agent on a Gymnasium environment, evaluate it and save it."""

    env: tyro.conf.Positional[str]
    """Environment id, such as CartPole-v1, or module:id to import a module first."""
    output_dir: str | None = None
    """Folder of the run; None: runs/<env>-seed<seed>."""
    eval_episodes: int = 20
    """Episodes of the evaluation at the end."""
    eval_every: int = 0
    """Rollouts between evaluations while training; the best agent is saved in best/. 0: none."""
    stop_at_return: float | None = None
    """Stop training once the mean return of the last 100 episodes reaches this; None: never."""
    warm_start: str | None = None
    """Demonstrations (.npz, as record writes them) whose actions the policy first imitates; None: none."""
    warm_start_epochs: int = 10
    """Passes over the demonstrations."""
    resume: str | None = None
    """Resume from a checkpoint: auto (the newest good one; a fresh start if there is none), its folder, or a run's."""
    resume_override: bool = False
    """Resume although settings, steps or the environment have changed; the changes are shown."""

    FIRST: ClassVar[tuple[str, ...]] = (
        *("env", "total_timesteps", "output_dir", "seed", "num_envs", "learning_rate", "num_epochs", "ent_coef"),
        *("gamma", "resume"),
    )
    """Settings that a beginner needs first, as help and docs list them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("warm_start_epochs", lambda value: value >= 1, "1 or more")
        if self.eval_episodes < 1:
            raise ValueError(f"eval_episodes must be 1 or more, got {self.eval_episodes}")
        if self.resume_override and self.resume is None:
            raise ValueError("resume_override=True is about a checkpoint to resume from: set resume")


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(Settings):
    """Evaluate a saved agent."""

    folder: tyro.conf.Positional[str]
    """Folder of a run, or any folder written by agent.save."""
    episodes: int = 20
    """Episodes to play."""
    seed: int | None = None
    """Seed of the episodes and sampled actions; None: the agent's, as in the evaluation at the end of training."""
    deterministic: bool = True
    """Take the most likely action; False: sample from the policy."""
    num_threads: int | None = None
    """Torch threads; None: as in training."""
    env: str | None = None
    """Environment to evaluate on, with the same spaces; None: the one it was trained on."""
    network: str | None = None
    """The function that made the agent's own network, as file.py:function; None: it has none."""
    video: str | None = None
    """Also record one episode into this file: an .mp4, a .gif, or a .png with a few moments; None: no video."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(1, "num_threads")


@dataclass(frozen=True, kw_only=True)
class CompareCommand(PPOArgs):
    """Train variants of settings over several seeds and compare them; run again, it continues where it stopped."""

    env: tyro.conf.Positional[str]
    """Environment id, such as CartPole-v1."""
    output_dir: str | None = None
    """Folder of the runs, each in <variant>/seed<k>/; None: runs/compare-<env>."""
    vary: tuple[str, ...]
    """Settings to vary, as name=value,value: num_epochs=1,4,10 or objective=clip,a2c; several: every combination."""
    seeds: int = 5
    """Runs of each variant, with consecutive seeds from --seed."""
    eval_episodes: int = 20
    """Episodes of the evaluation after each run."""


@dataclass(frozen=True, kw_only=True)
class TuneCommand(PPOArgs):
    """Search for better settings with Optuna; run again, it continues where it stopped."""

    env: tyro.conf.Positional[str]
    """Environment id, such as CartPole-v1."""
    output_dir: str | None = None
    """Folder of the search: study.db (all trials) and best.yaml; None: runs/tune-<env>."""
    trials: int | None = None
    """Trials of the whole search, those of earlier calls included; the first takes the settings as they are."""
    search: tuple[str, ...] = (
        *("learning_rate", "gamma", "gae_lambda", "ent_coef", "clip_range", "num_epochs", "num_steps"),
        "num_minibatches",
    )
    """Settings to search; vf_coef, max_grad_norm, lr_schedule, activation, hidden_sizes, log_std_init,
    normalize_observations and normalize_rewards can be searched, too."""
    seeds: int = 1
    """Runs of each trial, whose returns are averaged."""
    evaluations: int = 4
    """Evaluations of each run; after each but the last, a trial below the median of the others ends."""
    eval_episodes: int = 20
    """Episodes of each evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "search", tuple(self.search))
        if self.trials is None:
            raise ValueError("tune needs --trials, the number of settings to try: 20 for a look, 100 for a search")
        for name in ("trials", "seeds", "evaluations", "eval_episodes"):
            self._require(name, lambda value: value >= 1, "1 or more")


@dataclass(frozen=True, kw_only=True)
class RecordCommand(Settings):
    """Record episodes of a saved agent as demonstrations, for train --warm-start."""

    folder: tyro.conf.Positional[str]
    """Folder of a run, or any folder written by agent.save."""
    file: tyro.conf.Positional[str]
    """The .npz to write."""
    episodes: int = 20
    """Episodes to record."""
    seed: int = 0
    """Seed of the episodes."""
    deterministic: bool = True
    """Take the most likely action; False: sample from the policy."""
    network: str | None = None
    """The function that made the agent's own network, as file.py:function; None: it has none."""


@dataclass(frozen=True, kw_only=True)
class ExportCommand(Settings):
    """Export a saved agent's policy to ONNX or TorchScript, checked against the agent."""

    folder: tyro.conf.Positional[str]
    """Folder of a run, or any folder written by agent.save."""
    file: tyro.conf.Positional[str]
    """The .onnx or .pt (TorchScript) to write."""
    network: str | None = None
    """The function that made the agent's own network, as file.py:function; None: it has none."""


@dataclass(frozen=True, kw_only=True)
class PushCommand(Settings):
    """Upload a saved agent to the Hugging Face hub, with a model card and a video."""

    folder: tyro.conf.Positional[str]
    """Folder of a run, or any folder written by agent.save."""
    repo_id: tyro.conf.Positional[str]
    """user/name, or a name among yours."""
    private: bool = True
    """Whether a new repository is private."""
    video: bool = True
    """Record a video of one episode."""
    episodes: int = 20
    """Episodes of the evaluation for the card."""
    network: str | None = None
    """The function that made the agent's own network, as file.py:function; None: it has none."""


@dataclass(frozen=True, kw_only=True)
class ExplainCommand(Settings):
    """Make one more update in memory, with schedules at their start, and explain it; the folder is unchanged."""

    folder: tyro.conf.Positional[str]
    """Folder of a run, or any folder written by agent.save."""
    max_rows: int = 60
    """Rows to print, 1 or more."""
    network: str | None = None
    """The function that made the agent's own network, as file.py:function; None: it has none."""
    picture: str | None = None
    """PNG file for a plot of the first environment copy's steps; None: no picture."""
    html: str | None = None
    """HTML file in which each step is coloured by the number that you choose there; None: no such page."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(1, "max_rows")


COMMANDS: dict[str, Command] = {
    "train": (TrainCommand, "classic.commands:train"),
    "evaluate": (EvaluateCommand, "classic.commands:evaluate"),
    "compare": (CompareCommand, "classic.commands:compare"),
    "tune": (TuneCommand, "classic.commands:tune"),
    "record": (RecordCommand, "classic.commands:record"),
    "export": (ExportCommand, "classic.commands:export"),
    "push": (PushCommand, "classic.commands:push"),
    "explain": (ExplainCommand, "classic.commands:explain"),
    "advise": (AdviseArgs, "rlhf_ppo.runtime.diagnosis.advice:print_advice"),
    "report": (ReportArgs, "rlhf_ppo.runtime.report.page:report_command"),
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
