"""Arguments of the smaller commands: demo, explain, replay, export, migrate."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Literal

import tyro

from rlhf_ppo.config.run_groups import Precision
from rlhf_ppo.core.validation import Settings


@dataclass(frozen=True, kw_only=True)
class DemoArgs(Settings):
    """Fine-tune a small GPT-2 toward a toy reward and show it before and after."""

    model: str = "embedded"
    """The policy: "embedded" (a small GPT-2 in the package), a folder or a hub id such as gpt2."""
    reward: str = "rlhf_ppo.rewards.toy:positive_sentiment"
    """What to learn: also no_letter_e or dialogue of rlhf_ppo.rewards.toy, or file.py:function."""
    output_dir: str = "runs/demo"
    """Folder for the model, metrics, samples and curve; an earlier run there is kept as previous-<n>."""
    total_episodes: int = 1536
    """Responses to train on."""
    learning_rate: float | None = None
    """Peak learning rate; None: chosen by the model's size."""
    kl_coef: float = 0.05
    """Coefficient of the KL penalty: larger stays closer to the initial model."""
    precision: Precision = "auto"
    """Number format of matrix products: bf16, fp32, or auto (bf16 where the device computes it faster)."""
    num_threads: int | None = None
    """CPU threads; None: 1 for a model as small as the embedded one, else all CPUs available."""
    seed: int = 0
    """Random seed; the same seed on the same machine gives the same result."""


@dataclass(frozen=True, kw_only=True)
class ExplainArgs(Settings):
    """Show a rollout of a run token by token: reward, KL, value, advantage, ratio and what the clip did."""

    run: tyro.conf.Positional[str]
    """Folder of a run, or one of its black boxes, blackbox-<n>."""
    rollout: int | None = None
    """Number of a rollout that was recorded (save_rollouts) or left a black box. None: the newest recorded one; in a
    run that recorded none, see sample."""
    sample: int | None = None
    """Sample new responses to this prompt of the run's training data, by number from 0, with the run's newest
    checkpoint (or saved model), settings and rewards. None: prompt 0, where no rollout is recorded."""
    responses: tuple[int, ...] = (0,)
    """Which responses of the rollout to show, by number from 0."""
    html: str | None = None
    """Also write these responses into this HTML file, each token coloured by the number that you choose there."""
    model: str | None = None
    """Where the run's model, an adapter's base and the tokenizer are. None: where they were in the run."""
    seed: int = 0
    """Random seed of the draws of sample."""
    device: str | None = None
    """cuda, mps or cpu; None: the first of these that is available."""
    num_threads: int | None = None
    """CPU threads; None: 1 for models below ten million parameters, else all CPUs available."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(1, "rollout", "num_threads")
        self._require_at_least(0, "sample")
        if self.rollout is not None and self.sample is not None:
            raise ValueError(
                f"rollout={self.rollout} is one that the run made, and sample={self.sample} makes a new one: drop one "
                "of them"
            )
        if not self.responses or min(self.responses) < 0:
            raise ValueError(f"responses must be numbers from 0, got {self.responses}: name at least one response")


@dataclass(frozen=True, kw_only=True)
class ReplayArgs(Settings):
    """Recompute the minibatch in a black box, and name the first non-finite number."""

    folder: tyro.conf.Positional[str]
    """Folder blackbox-<n> of a run."""
    model: str | None = None
    """Where the policy's frozen base (or the start that an exact KL is measured from) is. None: where it was then."""
    device: str | None = None
    """cuda, mps or cpu. None: the run's."""
    num_threads: int | None = None
    """CPU threads. None: as in the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(1, "num_threads")


@dataclass(frozen=True, kw_only=True)
class ExportArgs(Settings):
    """Make a checkpoint, sharded or not, a model folder that transformers loads; needs no GPU."""

    checkpoint: tyro.conf.Positional[str]
    """Folder checkpoint-<n> of a run, or a run's folder for its newest good one."""
    folder: tyro.conf.Positional[str]
    """Folder for the model, its value head and its tokenizer."""
    model: str | None = None
    """Where the base of an adapter, and the tokenizer, are. None: where they were in the run."""
    merge_adapter: bool = False
    """Save the whole model with the adapter merged in, instead of the adapter alone."""


@dataclass(frozen=True, kw_only=True)
class MigrateArgs(Settings):
    """Convert a PPO run of TRL, LLaMA-Factory or ms-swift: migrate ppo.yaml --output ours.yaml -- --lam 0.9"""

    file: tyro.conf.Positional[str | None] = None
    """The other project's file: YAML or JSON, a shell script (.sh) with its command, or a Python script (.py) with a
    PPOConfig, which is read and never run."""
    config: str | None = None
    """The same, as a flag."""
    command_line: str | None = None
    """Its flags, or the whole command, as one text; it is easier to write them at the end, after `--`."""
    source: Literal["trl", "trl-0x", "llama-factory", "ms-swift"] | None = None
    """The project; None: recognised from the program and the arguments (the first line of the result says which)."""
    num_processes: int | None = None
    """Processes of that run, whose batch sizes were per process; None: as the command says, else 1."""
    rows: int | None = None
    """Rows of the data set, where the length of the run depends on them; None: as its files or arguments say."""
    output: str | None = None
    """File to write, which must not exist; chat prompts made of the data set go into a file beside it. None: print."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(1, "num_processes", "rows")
        if self.file is not None and self.config is not None:
            raise ValueError(f"the file is given twice, as {self.file} and as --config {self.config}: give it once")
        if self.file is None and self.config is None and self.command_line is None:
            raise ValueError("nothing to migrate: give a file, or the other project's flags after --, or both")


def join_command_line(argv: list[str]) -> list[str]:
    """Join another project's words after ``--`` into one flag of ours: ``[..., "--command-line=word ..."]``."""
    if "--" not in argv:
        return argv
    at = argv.index("--")
    return [*argv[:at], f"--command-line={shlex.join(argv[at + 1 :])}"]
