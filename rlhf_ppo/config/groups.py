"""Groups of settings by theme, each with its own checks: sampling, rewards, KL, advantages, critic, optimization.

A function takes the group that it reads (``args: RewardSettings``); :class:`rlhf_ppo.config.rlhf.RLHFConfig` inherits
all of them, so that users see one flat list. The groups about the run itself are in run_groups.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_ppo.config.json_mapping import JsonMapping
from rlhf_ppo.core.validation import Settings, is_changed, refuse_unread

_OF_WEIGHTS = ("importance_weights", "importance_weight_cap", "importance_weight_mode")


@dataclass(frozen=True, kw_only=True)
class RolloutSettings(Settings):
    """Rollout: how responses are sampled."""

    total_episodes: int = 4096
    """Responses to train on; rounded up to whole rollouts."""
    rollout_batch_size: int = 32
    """Responses per rollout; a multiple of num_minibatches and of num_generations."""
    num_generations: int = 1
    """Responses per prompt, side by side in the rollout."""
    max_new_tokens: int = 48
    """Maximum response length in tokens; in multi-turn runs, of each turn."""
    min_new_tokens: int = 0
    """Minimum response length: stop tokens are masked out, and their probability renormalized, until a response (or
    turn) has this many tokens."""
    temperature: float = 1.0
    """Divides the logits of policy and reference, in sampling and in training."""
    stop_token_ids: tuple[int, ...] | None = None
    """Tokens that end a response. None: the end-of-text tokens of the model's generation config or tokenizer."""
    stop_strings: tuple[str, ...] = ()
    """Strings that end a response (or turn); rewards see the text before them."""
    max_turns: int = 1
    """Maximum number of policy turns in a conversation; above 1, `respond` or an environment answers in between."""
    respond_timeout_s: float | None = 600.0
    """Timeout in seconds for one call of `respond`, or of an environment's `reset` or `step`; None: no timeout."""
    respond_concurrency: int | None = None
    """Maximum number of these calls that run at the same time in a process. 1: one after another, in the order of the
    rows, and all of them before any next turn is decoded. None: one for each conversation."""
    chat_template: str | None = None
    """Jinja chat template for the policy's tokenizer, a file or the text itself; saved with the model. None: the
    tokenizer's own."""
    chat_template_kwargs: JsonMapping = None
    """Variables of the chat template: {"enable_thinking": false}; a row's own column of this name goes first."""
    tool_parser: Literal["auto", "template", "hermes", "qwen3_xml", "llama3_json", "mistral"] = "auto"
    """How tool calls are found in a turn: template (the response template that the tokenizer brings), hermes (JSON
    in tool_call tags, as Qwen 2.5 and 3), qwen3_xml (function and parameter tags), llama3_json, mistral, or auto: the
    tokenizer's, else the one that its chat template writes."""
    stripped_thinking: Literal["keep", "refuse"] = "keep"
    """What to do with a chat template that drops thinking from earlier turns once a reply follows: keep it in the
    policy's context, which stays as it was sampled (a warning says so), or refuse the run."""
    overlong_prompts: Literal["error", "truncate", "drop"] = "error"
    """What to do with prompts that leave no room for max_new_tokens: raise an error, keep their end (truncate), or drop
    the row; truncated and dropped prompts are counted."""
    generation: Literal["auto", "dynamic", "static", "vllm"] = "auto"
    """Decoding engine: dynamic (finished rows leave the batch), static (fixed shapes, CUDA graphs), vllm (a vLLM server
    at vllm_url samples), or auto: static on a CUDA GPU if the model supports it, else dynamic."""
    decode_batch_size: int | None = None
    """Maximum number of responses that a process decodes at once, or asks a server for; one that has ended makes room
    for the next prompt. None: all of its part of the rollout."""
    recompute_logprobs: bool = False
    """Recompute the old log-probs with a full forward pass instead of using those recorded during decoding;
    generation=vllm always does."""
    importance_weights: Literal["auto", "none", "token", "sequence"] = "auto"
    """With recompute_logprobs: weight each action's loss by the ratio of recomputed to recorded probability: the
    token's own (token), the product over the response (sequence), or none; auto: token where another program sampled,
    or where importance_weight_cap is set."""
    importance_weight_mode: Literal["truncate", "mask"] = "truncate"
    """What happens to weights above importance_weight_cap: they become the cap (truncate), or 0 (mask)."""
    importance_weight_cap: float | None = None
    """Largest importance weight. None: 2, where there are weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(1, "total_episodes", "rollout_batch_size", "num_generations", "max_new_tokens")
        self._require_at_least(1, "max_turns", "respond_concurrency", "decode_batch_size", "importance_weight_cap")
        self._require_at_least(0, "min_new_tokens")
        self._require_positive("temperature", "respond_timeout_s")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is above max_new_tokens={self.max_new_tokens}: lower the first "
                "or raise the second"
            )
        if isinstance(self.stop_strings, str) or not all(self.stop_strings):
            raise ValueError(f"stop_strings must be a tuple of non-empty strings, got {self.stop_strings!r}")
        if self.generation == "static":
            for name in ("max_turns", "stop_strings"):
                if is_changed(self, name):
                    raise ValueError(
                        f"generation='static' does not support {name}={getattr(self, name)!r}: set generation="
                        f"'dynamic' (or 'auto'), or leave {name} at its default"
                    )
        self._check_weights()

    def _check_weights(self) -> None:
        names = [name for name in _OF_WEIGHTS if is_changed(self, name)]
        if names and not self.recomputes_logprobs:
            raise ValueError(
                f"{names[0]}={getattr(self, names[0])!r} compares log-probs recorded during decoding with recomputed "
                "ones, but recompute_logprobs=False: set recompute_logprobs"
            )
        if self.importance_weights == "none":
            refuse_unread(self, "importance_weights='none' makes no weights", *_OF_WEIGHTS[1:])
        elif self.generation != "vllm" and self.importance_weights == "auto" and self.importance_weight_cap is None:
            off = "importance_weights='auto' makes no weights without importance_weight_cap"
            refuse_unread(self, off, "importance_weight_mode")

    @property
    def recomputes_logprobs(self) -> bool:
        """Whether old log-probs are those of a full forward pass."""
        return self.recompute_logprobs or self.generation == "vllm"


@dataclass(frozen=True, kw_only=True)
class RewardSettings(Settings):
    """Reward: how responses are scored, and how scores are shaped."""

    reward_weights: tuple[float, ...] | None = None
    """One weight per reward function; None: all 1."""
    normalize_scores: bool = False
    """Normalize each reward function's scores to mean 0 and standard deviation 1 over all its scores so far."""
    score_clip: float | None = None
    """Clip the weighted sum of the scores to +- this, before penalties; None: no clipping."""
    missing_eos_penalty: float | None = None
    """Penalty for a response that reaches max_new_tokens without a stop token, on the scale of the final scores."""
    missing_eos_mode: Literal["subtract", "replace"] = "subtract"
    """Subtract missing_eos_penalty from the score, or replace the score by minus the penalty."""
    positive_score_above: float = 0.0
    """With positive_loss_coef: responses whose score, before shaping, is above this are positive examples."""
    drop_nonfinite_scores: bool = False
    """Treat a NaN or infinite score as unscorable (and count it) instead of stopping."""
    cache_rewards: bool = False
    """Score each distinct pair of prompt and response once per run; only for rewards that score each row by itself."""
    whole_rollout_rewards: bool = False
    """With several processes: let the first one score whole rollouts, for rewards that compare responses with each
    other. Otherwise each process scores its own responses. A function whose attribute whole_rollout is true says so
    itself."""
    reward_chat_template: str | None = None
    """For reward models loaded by name: a file with a Jinja chat template, or "tokenizer" for the tokenizer's own; text
    prompts then become a user message. None: the tokenizer's own for chats, none for text."""
    reward_max_length: int | None = None
    """For reward models loaded by name: maximum tokens of prompt and completion. None: what tokenizer and model
    allow."""
    reward_timeout_s: float | None = 600.0
    """Timeout in seconds for one reward function over one rollout; None: no timeout."""
    http_timeout_s: float = 60.0
    """For rewards over HTTP: timeout in seconds of one request."""
    http_retries: int = 3
    """For rewards over HTTP: retries after a 5xx answer, a timeout or a failed connection."""
    http_batch_size: int = 64
    """For rewards over HTTP: maximum responses per request."""
    http_concurrency: int = 4
    """For rewards over HTTP: maximum simultaneous requests per server."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(1, "http_batch_size", "http_concurrency")
        self._require_at_least(0, "http_retries")
        self._require_positive("http_timeout_s", "reward_timeout_s", "score_clip", "reward_max_length")
        if self.missing_eos_mode == "replace" and self.missing_eos_penalty is None:
            raise ValueError("missing_eos_mode='replace' needs a missing_eos_penalty, but missing_eos_penalty is None")


@dataclass(frozen=True, kw_only=True)
class KLSettings(Settings):
    """KL penalty: how the policy is kept near the reference."""

    kl_coef: float = 0.05
    """Coefficient of the KL penalty in the rewards (the initial value when kl_target is set)."""
    kl_target: float | None = None
    """Target KL to the reference in nats per response, toward which kl_coef adapts. None: kl_coef stays fixed."""
    kl_horizon: float = 10_000.0
    """Responses over which the adaptive controller corrects an error."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL in the rewards."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(0, "kl_coef")
        self._require_positive("kl_target", "kl_horizon")
        if self.kl_target is None:
            refuse_unread(self, "kl_target=None keeps kl_coef fixed", "kl_horizon")
        elif self.kl_coef == 0:
            raise ValueError(
                f"kl_target={self.kl_target} adapts kl_coef by a factor, but kl_coef=0 stays 0: set kl_coef above 0"
            )
        if self.kl_coef == 0:
            refuse_unread(self, "kl_coef=0 leaves no KL in the rewards", "kl_estimator")


@dataclass(frozen=True, kw_only=True)
class AdvantageSettings(Settings):
    """Advantages: how much better an action was than expected."""

    advantage_estimator: Literal["gae", "rloo", "grpo", "reinforce"] = "gae"
    """gae: with the critic's values. Without a critic: rloo (relative to the other responses to the prompt), grpo
    (rloo divided by their standard deviation, or without it: normalize_advantages=False), reinforce (the return)."""
    gamma: float = 1.0
    """Discount per token."""
    gae_lambda: float = 1.0
    """GAE's lambda: 1 credits every token with the whole score (less the critic's expectation); below 1 credit fades
    toward the beginning of a response, by this factor per token."""
    gae_lambda_value: float | None = None
    """GAE's lambda for the critic's targets; None: gae_lambda."""
    adaptive_lambda_alpha: float | None = None
    """Length-adaptive lambda for the policy's advantages: 1 - 1 / (this * response length). None: gae_lambda."""
    turn_credit: Literal["token", "turn"] = "token"
    """What counts as one action for GAE: a token, or a whole turn, whose tokens then share its advantage."""
    gamma_turn: float = 1.0
    """Discount per turn, under turn_credit="turn"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_between(0, 1, "gae_lambda_value", "gamma_turn")
        self._require_positive("adaptive_lambda_alpha")
        if self.turn_credit == "turn" and self.gamma != 1:
            raise ValueError(
                f"turn_credit='turn' discounts turns, not tokens: set gamma_turn instead of gamma={self.gamma}"
            )
        if self.turn_credit == "token" and self.gamma_turn != 1:
            raise ValueError(f"gamma_turn={self.gamma_turn} has no effect under turn_credit='token': set gamma")
        if self.advantage_estimator in ("rloo", "grpo"):
            estimator = f"advantage_estimator={self.advantage_estimator!r}"
            if self.gamma != 1:
                raise ValueError(
                    f"{estimator} compares whole responses without a discount, but gamma={self.gamma}: set gamma to 1"
                )
            if self.turn_credit == "turn":
                raise ValueError(f"{estimator} compares whole responses, but turn_credit='turn': drop one of them")


@dataclass(frozen=True, kw_only=True)
class OptimizationSettings(Settings):
    """Optimization: AdamW and its learning rate."""

    learning_rate: float | None = None
    """Peak learning rate of AdamW. None: chosen by the model's size, and 10 times as high for an adapter; the run's
    first lines and run.json say which."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate schedule after the warm-up, over all optimizer steps of the run."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Clip gradients to this global norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(0, "learning_rate", "warmup_steps", "weight_decay")


@dataclass(frozen=True, kw_only=True)
class CriticSettings(Settings):
    """Critic: where values come from, and how they are learned."""

    critic: Literal["auto", "shared", "separate", "adapter"] = "auto"
    """Where values come from: shared (a value head on the policy's trunk), separate (value_model), adapter (a second
    adapter on the policy's base, with peft_config), or auto: separate if there is a value_model, else shared."""
    vf_coef: float = 0.1
    """Coefficient of the value loss."""
    normalize_values: bool = True
    """Learn values in units of the returns' running mean and standard deviation, so that the critic does not depend on
    the reward's scale and offset; value loss and clip_range_vf are in these units."""
    clip_range_vf: float | None = None
    """Clip new values to within this of the recorded ones in the value loss; None: no value clipping."""
    value_head_from: str | None = None
    """Folder or hub id to load the value head from: a run of this project, an old TRL checkpoint with a value head, or
    a one-label sequence-classification model with a linear head. None: start at 0."""
    value_learning_rate: float | None = None
    """Peak learning rate of the value head and of the critic's own trunk or adapter. None: 10 times learning_rate, but
    at most 1e-3; with an adapter learning_rate itself."""
    critic_epochs: int | None = None
    """Epochs per rollout for the critic, num_epochs or more; those beyond num_epochs train the critic alone, after the
    others, and a shared trunk stays frozen in them. None: num_epochs."""
    critic_minibatches: int | None = None
    """Minibatches, each one optimizer step, per epoch that trains the critic alone. None: num_minibatches."""
    critic_frozen: Literal["none", "attention", "trunk"] = "none"
    """Parts of a separate critic (value_model) that stay as they are: nothing (none), its attention layers, or all but
    the value head (trunk)."""
    critic_warmup_rollouts: int = 0
    """Rollouts at the start that train the critic alone, on Monte Carlo returns and without value clipping; a shared
    trunk stays frozen too. They count as episodes and optimizer steps; the policy's learning rate schedule starts
    after them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(0, "critic_warmup_rollouts", "value_learning_rate")
        self._require_at_least(1, "critic_epochs", "critic_minibatches")
        if self.critic_warmup_rollouts and self.vf_coef == 0:
            raise ValueError(
                f"critic_warmup_rollouts={self.critic_warmup_rollouts} trains the critic, but vf_coef=0 leaves it no "
                "loss: set vf_coef above 0, or leave out the warm-up"
            )
