"""Groups of settings about the run itself: safety, memory, recording, device, evaluations, checkpoints, reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_ppo.core.validation import Settings, is_changed, refuse_unread
from rlhf_ppo.runtime.diagnosis.symptoms import WATCHED
from rlhf_ppo.runtime.logs.trackers import check_trackers

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class SafetySettings(Settings):
    """Safety: when a run skips a step, rolls back or stops."""

    on_nonfinite: Literal["skip", "rollback", "stop"] = "skip"
    """After a non-finite loss or gradient: skip the optimizer step, and stop after max_skipped_steps of them (skip);
    skip, and then resume from the last checkpoint with other responses (rollback); or stop at once (stop)."""
    max_skipped_steps: int = 10
    """Stop (or roll back) after this many consecutive non-finite optimizer steps, also across rollouts."""
    max_initial_log_ratio: float | None = None
    """Stop when any |log-ratio| before a rollout's first optimizer step exceeds this many nats. None: 0.1, or 0.5 where
    bf16 rounds decoding and training differently."""
    max_kl_nats_per_response: float | None = None
    """Stop, with a checkpoint, when a rollout's KL to the reference exceeds this. None: no limit."""
    min_entropy_nats_per_token: float | None = None
    """Stop, with a checkpoint, when a rollout's entropy falls below this. None: no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(1, "max_skipped_steps")
        self._require_positive("max_initial_log_ratio", "max_kl_nats_per_response", "min_entropy_nats_per_token")
        if self.on_nonfinite == "stop" and is_changed(self, "max_skipped_steps"):
            raise ValueError(
                f"on_nonfinite='stop' ends the run at the first non-finite step, but max_skipped_steps="
                f"{self.max_skipped_steps}: drop one of them"
            )


@dataclass(frozen=True, kw_only=True)
class WatchSettings(Settings):
    """Watch: warnings while a run trains, and a judge that it is not trained on."""

    watch: Literal["warn", "stop", "off"] = "warn"
    """What to do about a symptom of an unhealthy run, after each update: warn once, with the setting to change (warn);
    stop, with a checkpoint (stop); or not to look (off)."""
    stop_on: tuple[str, ...] = ()
    """Symptoms that stop a run which only warns of others: no_signal, too_fast, collapse, critic, kl, length, endless,
    repetition or judge (docs/watch.md)."""
    judge_responses: int = 8
    """With a judge: responses of each rollout that it scores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(1, "judge_responses")
        unknown = [name for name in self.stop_on if name not in WATCHED]
        if unknown:
            raise ValueError(f"stop_on names {unknown[0]!r}, which is no symptom: take some of {', '.join(WATCHED)}")
        if self.watch == "stop":
            refuse_unread(self, "watch='stop' stops at every symptom", "stop_on")
        elif self.watch == "off":
            refuse_unread(self, "watch='off' looks for none", "stop_on")


@dataclass(frozen=True, kw_only=True)
class MemorySettings(Settings):
    """Memory: trade speed or precision for it."""

    microbatch_tokens: int | None = None
    """Maximum tokens, prompts included, per forward pass outside decoding: less memory, the same gradient. A longer
    response gets a pass of its own. None: 1024 on CPU, 16384 on a GPU."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and recompute the rest: less memory, about a third more
    compute per update, the same gradients."""
    offload_activations: bool = False
    """Keep saved activations in main memory instead of on the GPU."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Load the policy's frozen base in 8 or 4 bits (QLoRA); needs bitsandbytes, a CUDA GPU and an adapter."""
    reference_dtype: Literal["auto", "float32", "bfloat16", "8bit", "4bit"] = "auto"
    """Number format in which a reference with weights of its own is held: auto is bfloat16 under bf16 and float32
    otherwise; 8bit and 4bit need bitsandbytes and a CUDA GPU."""
    sharding: Literal["auto", "none", "full", "hybrid"] = "auto"
    """With several processes: all weights on each (none); a share of weights, gradients and optimizer on each (full);
    a share within each machine, repeated on every machine (hybrid); or auto: full where a device's memory would not
    hold them all, else none."""
    sharded_decoding: Literal["auto", "whole", "layers"] = "auto"
    """Under sharding: gather all weights once for a rollout's decoding (whole), each layer's at each decode step
    (layers: less memory, much slower), or auto: whole where they fit."""

    def reference_format(self, *, bf16: bool) -> Literal["float32", "bfloat16", "8bit", "4bit"]:
        """Return the number format of a reference with weights of its own; ``bf16``: the run computes in bfloat16."""
        if self.reference_dtype != "auto":
            return self.reference_dtype
        return "bfloat16" if bf16 else "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("microbatch_tokens")
        if self.sharding == "none":
            refuse_unread(self, "sharding='none' leaves all weights on each process", "sharded_decoding")
        elif self.sharding != "auto" and self.quantization != "none":
            raise ValueError(
                f"sharding={self.sharding!r} shares out weights of 16 bits or more, but quantization="
                f"{self.quantization!r} packs the base's, which stay whole on each process: set sharding='none'"
            )


@dataclass(frozen=True, kw_only=True)
class RecordingSettings(Settings):
    """Recording: rollouts kept on disk, to fit a critic on or to replay."""

    save_rollouts: bool = False
    """Record the rollouts into output_dir/rollouts, with all that was measured about them."""
    save_rollouts_gb: float = 1.0
    """Maximum size of the recording in GB; the rollouts from the first one it has no room for on are not recorded."""
    replay: str | None = None
    """Train on recorded rollouts instead of sampling: a run's folder, or its rollouts/. The first update is that of a
    run that samples; later ones are off-policy, because another policy sampled their responses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("save_rollouts_gb")
        if not self.save_rollouts:
            refuse_unread(self, "save_rollouts=False records nothing", "save_rollouts_gb")
        elif self.replay is not None:
            raise ValueError(
                f"replay={self.replay!r} trains on rollouts that are recorded already, and save_rollouts=True would "
                "record them again: drop one of them"
            )


@dataclass(frozen=True, kw_only=True)
class ProcessSettings(Settings):
    """Several processes: how long they wait for each other."""

    process_timeout_s: float = 1800.0
    """Of several processes: how long one waits for another, in seconds, before all end and the one that did not come is
    named. It must be longer than a reward function, or a save, may take."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("process_timeout_s")


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Settings):
    """Reports: who else is told."""

    report_to: tuple[str, ...] = ()
    """Trackers that also receive metrics and samples: tensorboard (into output_dir/tensorboard), wandb, trackio."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trackers(self.report_to)


@dataclass(frozen=True, kw_only=True)
class RunSettings(ProcessSettings, ReportSettings):
    """Run: seed, device, evaluations, checkpoints, reports."""

    output_dir: str
    """Folder of the run: the model in transformers' format, metrics.jsonl, samples.jsonl, run.json, curve.png."""
    seed: int = 0
    """Random seed; the same seed on the same machine gives the same result."""
    device: str | None = None
    """cuda, mps or cpu; None: the first of these that is available."""
    precision: Precision = "auto"
    """Number format of matrix products: bf16 (of a rounded copy; weights and optimizer stay in fp32), fp32, or auto:
    bf16 where the GPU or CPU computes it faster."""
    attn_implementation: str | None = None
    """Attention of all models, by transformers' name: eager, sdpa, flex_attention, flash_attention_2 or another that is
    installed (flash attention: not of reward models). Only sdpa packs sequences. None: transformers' choice, usually
    sdpa."""
    use_kernels: bool = False
    """Replace layers by kernels of the Hugging Face hub where it has one for the device; needs the package kernels."""
    compile: Literal["auto", "never", "always"] = "auto"
    """Run each layer's forward and backward pass of an update as code by torch.compile: never, always, or auto: on a
    CUDA GPU, where measurements in the first update say that the run gains more time than compiling has taken."""
    num_threads: int | None = None
    """CPU threads during train(); None: 1 for models below ten million parameters, else all CPUs available to the
    process (affinity, container limit); OMP_NUM_THREADS takes precedence."""
    eval_every: int = 0
    """Rollouts between evaluations on eval_dataset; 0: only before and after training."""
    save_every: int = 0
    """Rollouts between checkpoints (checkpoint-<n> in output_dir), from which a run can resume; the last rollout is
    saved too. 0: no checkpoints."""
    save_total_limit: int | None = None
    """Number of newest checkpoints to keep; older ones are deleted, except that of the best evaluation so far. None:
    all."""
    save_best: bool = False
    """Also save a checkpoint whenever an evaluation's eval/score_mean is the best so far; needs eval_every."""
    samples_per_rollout: int = 2
    """Responses of each rollout to write to samples.jsonl, and to tokens/ where tokens are recorded."""
    record_tokens_every: int | None = None
    """Rollouts between two that are recorded in tokens/ (reward, KL, value, advantage, ratio of each token of a few
    responses) and responses/; the first and the last always are. None: about 20 in the run; 0: none."""
    report: bool = True
    """Write report.html into output_dir at the end (see docs/report.md)."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not str(self.output_dir).strip():
            raise ValueError("output_dir is empty: name a folder for the run")
        self._require("from 0 to 4294967295", lambda value: 0 <= value < 2**32, "seed")
        self._require_at_least(0, "eval_every", "save_every", "samples_per_rollout", "record_tokens_every")
        self._require_positive("num_threads", "save_total_limit")
        if self.eval_every == 0:
            refuse_unread(self, "it is about evaluations during training, and eval_every=0 makes none", "save_best")
