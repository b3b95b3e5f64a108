"""RLHFConfig: every setting of a language-model run, with defaults that learn on a small model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from rlhf_ppo.config.contradictions import refuse_contradictions
from rlhf_ppo.config.name_hints import SETTINGS
from rlhf_ppo.core.config import PPOConfig
from rlhf_ppo.runtime.names import refuse_unknown_settings
from rlhf_ppo.runtime.precision import Precision
from rlhf_ppo.runtime.trackers import check_trackers


@dataclass(frozen=True, kw_only=True)
class RLHFConfig(PPOConfig):
    """Settings of a run; only `output_dir` is required."""

    output_dir: str
    """Folder of the run: the model in transformers' format, metrics.jsonl, samples.jsonl, run.json, curve.png."""

    # Rollout
    total_episodes: int = 4096
    """Responses to train on; rounded up to whole rollouts."""
    rollout_batch_size: int = 32
    """Responses per rollout; a multiple of num_minibatches and of num_generations."""
    num_generations: int = 1
    """Responses to each prompt, side by side in the rollout."""
    microbatch_tokens: int | None = None
    """Most tokens, prompts included, in one pass through a model outside decoding; less memory, same gradient. A longer
    response has a pass of its own. None: 1024 on CPU, 16384 on a GPU."""
    max_new_tokens: int = 48
    """Longest response in tokens; with several turns, the longest turn."""
    min_new_tokens: int = 0
    """No stop token is drawn before a response, or turn, has so many tokens: their probability goes to the others."""
    temperature: float = 1.0
    """Divides the logits of policy and reference, when sampling and when training."""
    stop_token_ids: tuple[int, ...] | None = None
    """Tokens that end a response. None: the end-of-text tokens of the model's generation config or tokenizer."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response, or turn, once it contains one; rewards see it cut before the text."""
    max_turns: int = 1
    """Most turns of the policy in a conversation; above 1, `respond` answers in between."""
    chat_template: str | None = None
    """Jinja chat template for the policy's tokenizer, a file or the text itself, saved with it. None: the tokenizer's
    own."""
    respond_timeout_s: float | None = 600.0
    """Longest time in seconds that one call of `respond` may take; None: wait for ever."""
    overlong_prompts: Literal["error", "truncate", "drop"] = "error"
    """Prompts that leave no room for max_new_tokens: stop, keep their end, or leave the row out (both are counted)."""
    generation: Literal["auto", "dynamic", "static"] = "auto"
    """How responses are decoded: dynamic (finished rows leave), static (fixed shapes, CUDA graphs), or
    auto: static on a CUDA GPU if the model allows it, else dynamic."""
    recompute_logprobs: bool = False
    """Take the old log-probs from a full forward pass instead of the ones recorded while decoding."""
    importance_weight_cap: float | None = None
    """With recompute_logprobs: weigh each action's loss by the ratio of the two, at most this (2 is usual). None: no
    weights."""
    max_initial_log_ratio: float | None = None
    """Tripwire: stop when any |log-ratio| before a rollout's first optimizer step exceeds this many nats. None: 0.1, or
    0.5 where bf16 rounds decoding and training differently."""

    # Reward
    reward_weights: tuple[float, ...] | None = None
    """One weight per reward function; None: all 1."""
    normalize_scores: bool = False
    """Bring each reward function's scores to mean 0 and standard deviation 1 over all its scores so far."""
    score_scale: float = 1.0
    """Factor on the weighted sum of the scores."""
    score_clip: float | None = None
    """Largest absolute value of a score after score_scale, before penalties; None: no limit."""
    missing_eos_penalty: float | None = None
    """Penalty for a response that ran into max_new_tokens without a stop token, on the scale of the final scores."""
    missing_eos_mode: Literal["subtract", "replace"] = "subtract"
    """Subtract missing_eos_penalty from the score, or replace the score by minus the penalty."""
    length_penalty: float = 0.0
    """Subtracted from the score for each token of a response beyond length_penalty_from."""
    length_penalty_from: int = 0
    """Tokens that cost no length_penalty."""
    drop_nonfinite_scores: bool = False
    """Treat a NaN or infinite score as unscorable (counted) instead of stopping."""
    cache_rewards: bool = False
    """Score the same response to the same prompt once a run; for rewards that depend on their own row alone."""
    reward_chat_template: str | None = None
    """For reward models loaded by name: a file with a Jinja chat template, or "tokenizer" for the tokenizer's own; text
    prompts then become a user message. None: chats through the tokenizer's own, text as it is."""
    reward_max_length: int | None = None
    """For reward models loaded by name: most tokens of prompt and completion; None: what tokenizer and model allow."""
    http_timeout_s: float = 60.0
    """For rewards over HTTP: longest time in seconds for one request."""
    http_retries: int = 3
    """For rewards over HTTP: further attempts after a 5xx answer, a time-out or a failed connection."""
    http_batch_size: int = 64
    """For rewards over HTTP: most responses in one request."""
    http_concurrency: int = 4
    """For rewards over HTTP: most requests to a server at the same time."""
    reward_timeout_s: float | None = 600.0
    """Longest time in seconds that a reward function may take over one rollout; None: wait for ever."""

    # KL to the reference
    kl_coef: float = 0.05
    """Weight of the KL penalty in the rewards (the start value when kl_target is set)."""
    kl_target: float | None = None
    """Wanted KL to the reference in nats per response: adapts kl_coef. None: kl_coef stays fixed."""
    kl_horizon: float = 10_000.0
    """Responses over which the adaptive controller corrects an error."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL inside the rewards."""

    # Advantages
    advantage_estimator: Literal["gae", "rloo", "grpo", "reinforce"] = "gae"
    """gae: against the critic's values. Without a critic: rloo (against the other responses to the prompt), grpo
    (likewise, over their spread; normalize_advantages=False: not), reinforce (the return itself)."""
    gae_lambda_value: float | None = None
    """GAE's lambda for the critic's targets; None: gae_lambda."""
    adaptive_lambda_alpha: float | None = None
    """Lambda of the policy's advantages grows with the response: 1 - 1 / (this * its tokens). None: gae_lambda."""

    # Optimisation
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW; about 1e-4 for models of a few million parameters, 1e-5 for GPT-2 and larger."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up, over all optimizer steps of the run."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    gamma: float = 1.0
    """Discount per token."""
    turn_credit: Literal["token", "turn"] = "token"
    """What counts as one action for GAE: a token, or a whole turn, whose tokens then share its advantage."""
    gamma_turn: float = 1.0
    """Discount per turn, under turn_credit="turn"."""
    clip_range_vf: float | None = 0.2
    """Keeps a new value within this of the recorded one in the value loss; None: no value clipping."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    max_grad_norm: float = 1.0
    """Global gradient norm after clipping."""

    # Guards
    on_nonfinite: Literal["skip", "rollback", "stop"] = "skip"
    """What a loss or gradient that is not finite leads to: its step is skipped, and after max_skipped_steps of them the
    run stops (skip), or goes back to the last checkpoint and draws other responses (rollback); or it stops at the first
    (stop)."""
    max_skipped_steps: int = 10
    """So many optimizer steps in a row, over rollouts too, without a finite loss and gradient are too many."""
    max_kl_nats_per_response: float | None = None
    """The run stops, with a checkpoint, once a rollout's KL to the reference is above this. None: no limit."""
    min_entropy_nats_per_token: float | None = None
    """The run stops, with a checkpoint, once a rollout's entropy is below this. None: no limit."""

    # Memory
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, about a third more
    work in the update, the same gradients."""
    offload_activations: bool = False
    """Keep what the backward pass needs in main memory instead of on the GPU."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Load the policy's frozen base in this many bits (QLoRA): bitsandbytes, a CUDA GPU and an adapter are needed."""
    reference_dtype: Literal["float32", "bfloat16", "8bit", "4bit"] = "float32"
    """Number format of a reference with weights of its own; 8bit and 4bit need bitsandbytes and a CUDA GPU."""

    # Critic
    critic: Literal["auto", "shared", "separate", "adapter"] = "auto"
    """Where the values come from: shared (a head on the policy's trunk), separate (value_model), adapter (a second
    adapter on the policy's base, with peft_config), or auto: separate if there is a value_model, else shared."""
    value_head_from: str | None = None
    """Folder or hub id from which the value head starts: a run of this project, an old TRL checkpoint with a value
    head, or a one-label sequence-classification model with a linear head. None: it starts at 0."""
    value_learning_rate: float | None = None
    """Peak learning rate of the value head and of the critic's own trunk or adapter. None: learning_rate."""
    critic_warmup_rollouts: int = 0
    """The first rollouts of the run train the critic alone, on Monte Carlo returns and without value clipping; a shared
    trunk stays fixed too. They count as episodes and optimizer steps; the policy's learning rate schedule begins
    after them."""

    # Run
    seed: int = 0
    """One seed, one machine, one result."""
    device: str | None = None
    """cuda, mps or cpu; None: the first of these that is there."""
    precision: Precision = "auto"
    """Number format of the models' matrix products: bf16 (autocast; weights and optimizer stay in fp32), fp32, or auto:
    bf16 where the GPU or CPU multiplies it faster."""
    num_threads: int | None = None
    """CPU threads of train(); None: 1 for models below ten million parameters, which are too small to share, else every
    CPU that the process may use (its affinity, its container's share); OMP_NUM_THREADS, where it is set, decides."""
    eval_every: int = 0
    """Rollouts between evaluations on eval_dataset; 0: only before and after training."""
    save_every: int = 0
    """Rollouts between checkpoints (checkpoint-<n> in output_dir), from which a run can be resumed; the last rollout
    has one, too. 0: none."""
    save_total_limit: int | None = None
    """Newest checkpoints to keep; older ones are deleted once a new one is safe, but never the one of the best
    evaluation so far. None: all."""
    save_best: bool = False
    """Also save a checkpoint whenever an evaluation's eval/score_mean is the best so far; needs eval_every."""
    report_to: tuple[str, ...] = ()
    """Where metrics.jsonl's lines are sent as well: tensorboard (into output_dir/tensorboard), wandb, trackio."""
    samples_per_rollout: int = 2
    """Responses of each rollout written to samples.jsonl."""
    quiet: bool = False
    """Show no progress."""

    REFUSED: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("top_k", "top_p", "repetition_penalty"),
        "it would sample from another distribution than the one whose log-probs are trained, so ratios and KL would be "
        "wrong; use temperature, which sampling, training and reference share",
    )
    """Settings of other libraries that are not here, and why."""

    ELSEWHERE: ClassVar[Mapping[str, str]] = SETTINGS
    """Settings that have another name in other libraries, and ours."""

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Say what a setting is called here, or why it is not here, where Python would only say that it is unknown."""
        refuse_unknown_settings(cls, settings)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not str(self.output_dir).strip():
            raise ValueError("output_dir is empty: name a folder for the run")
        for name in (
            "total_episodes",
            "rollout_batch_size",
            "num_generations",
            "max_new_tokens",
            "max_turns",
            "max_skipped_steps",
            "http_batch_size",
            "http_concurrency",
        ):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        self._require("seed", 0 <= self.seed < 2**32, "from 0 to 4294967295")
        for name in (
            "min_new_tokens",
            "warmup_steps",
            "eval_every",
            "save_every",
            "samples_per_rollout",
            "critic_warmup_rollouts",
            "learning_rate",
            "kl_coef",
            "weight_decay",
            "length_penalty",
            "length_penalty_from",
            "http_retries",
        ):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("temperature", "kl_horizon", "score_scale", "http_timeout_s"):
            self._require(name, getattr(self, name) > 0, "positive")
        for name in (
            "kl_target",
            "reward_timeout_s",
            "respond_timeout_s",
            "microbatch_tokens",
            "num_threads",
            "max_initial_log_ratio",
            "value_learning_rate",
            "adaptive_lambda_alpha",
            "score_clip",
            "reward_max_length",
            "max_kl_nats_per_response",
            "min_entropy_nats_per_token",
            "save_total_limit",
        ):
            self._require(name, getattr(self, name) is None or getattr(self, name) > 0, "positive or None")
        for name, known in (("kl_estimator", ("k1", "k2", "k3")), ("overlong_prompts", ("error", "truncate", "drop"))):
            self._require_known(name, known)
        self._require_known("lr_scheduler_type", ("constant", "linear", "cosine"))
        self._require_known("precision", ("auto", "fp32", "bf16"))
        if self.generation == "continuous":
            raise ValueError("generation='continuous' has been removed: use generation='auto'")
        self._require_known("generation", ("auto", "dynamic", "static"))
        self._require_known("quantization", ("none", "8bit", "4bit"))
        self._require_known("reference_dtype", ("float32", "bfloat16", "8bit", "4bit"))
        self._require_known("on_nonfinite", ("skip", "rollback", "stop"))
        if self.on_nonfinite == "rollback" and self.save_every == 0:
            raise ValueError("on_nonfinite='rollback' goes back to a checkpoint, but save_every=0 writes none: set it")
        if self.on_nonfinite == "stop" and self.max_skipped_steps != 10:
            raise ValueError(
                f"on_nonfinite='stop' ends the run at the first step that is not finite, but max_skipped_steps="
                f"{self.max_skipped_steps}: drop one of them"
            )
        self._require_known("critic", ("auto", "shared", "separate", "adapter"))
        self._require_known("advantage_estimator", ("gae", "rloo", "grpo", "reinforce"))
        check_trackers(self.report_to)
        value_lambda, cap = self.gae_lambda_value, self.importance_weight_cap
        self._require("gae_lambda_value", value_lambda is None or 0 <= value_lambda <= 1, "between 0 and 1, or None")
        self._require("importance_weight_cap", cap is None or cap >= 1, "1 or more, or None")
        self._require_known("turn_credit", ("token", "turn"))
        self._require("gamma_turn", 0 <= self.gamma_turn <= 1, "between 0 and 1")
        self._require_known("missing_eos_mode", ("subtract", "replace"))
        refuse_contradictions(self)

    @property
    def critic_free(self) -> str | None:
        """The setting by which advantages come without values, as messages name it; None: there is a critic."""
        if self.advantage_estimator != "gae":
            return f"advantage_estimator={self.advantage_estimator!r}"
        return f"objective={self.objective!r}" if self.objective == "reinforce" else None

    @property
    def has_critic(self) -> bool:
        """False where advantages come without values."""
        return self.critic_free is None

    @property
    def num_rollouts(self) -> int:
        """Rollouts of the whole run."""
        return math.ceil(self.total_episodes / self.rollout_batch_size)

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps of the whole run: rollouts x epochs x minibatches."""
        return self.num_rollouts * self.num_epochs * self.num_minibatches
