"""PPOConfig: the settings of the algorithm itself, the same for CartPole and for language models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from rlhf_ppo.core.validation import Settings

Objective = Literal["clip", "penalty", "adaptive_clip", "dual_clip", "cispo", "dis", "a2c", "reinforce"]
RatioLevel = Literal["token", "turn", "sequence"]
KLLoss = Literal["k2", "exact"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum"]

OBJECTIVES: tuple[str, ...] = get_args(Objective)
RATIO_LEVELS: tuple[str, ...] = get_args(RatioLevel)
KL_LOSSES: tuple[str, ...] = get_args(KLLoss)
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)
WEIGHT_LEVELS, WEIGHT_MODES = ("token", "sequence"), ("truncate", "mask")
"""What importance weights are taken over, and what becomes of those above their cap."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig(Settings):
    """PPO: objective, clipping, entropy, epochs and minibatches."""

    objective: Objective = "clip"
    """Policy loss: clip (PPO), penalty (adaptive KL penalty), adaptive_clip (clip range follows the KL),
    dual_clip (bounds the loss of bad actions), cispo (the ratio is a capped weight, so no gradient is lost), dis (the
    ratio to the sampler's own log-probs is a weight, and actions outside the clip range, on either side, are masked),
    a2c (no ratio) or reinforce (no ratio, no critic)."""
    clip_range: float = 0.2
    """Ratios are clipped to 1 +- this (adaptive_clip: the initial value)."""
    clip_range_high: float | None = None
    """Upper clip range when it differs from the lower one; cispo's weights are capped at 1 + this."""
    ratio_level: RatioLevel = "token"
    """Whose ratio is clipped: each action's own (token), or the geometric mean over its turn or sequence (GSPO)."""
    dual_clip: float = 3.0
    """dual_clip objective: the loss of an action with A < 0 is at most this times -A."""
    penalty_beta: float = 1.0
    """penalty objective: initial coefficient of KL(old || new), adapted toward target_kl when that is set."""
    clip_range_vf: float | None = None
    """Clip new values to within this of the recorded ones in the value loss; None: no value clipping."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    kl_loss_coef: float = 0.0
    """Coefficient of the KL to the reference as a loss term, in addition to the KL penalty in the rewards."""
    kl_loss: KLLoss = "k2"
    """Its form: k2 (from the sampled actions; in expectation the exact KL's gradient) or exact (whole vocabulary)."""
    positive_loss_coef: float = 0.0
    """Coefficient of the negative log-likelihood of positive examples (language models: responses with a score above
    positive_score_above) as a loss term."""
    loss_aggregation: Aggregation = "token_mean"
    """How per-action losses are aggregated: token_mean, sequence_mean or sequence_sum."""
    gamma: float = 0.99
    """Discount per step."""
    gae_lambda: float = 0.95
    """GAE's lambda: 0 is TD(0), 1 is Monte Carlo."""
    normalize_advantages: bool = True
    """Whiten the advantages of each rollout."""
    num_epochs: int = 4
    """Epochs per rollout."""
    num_minibatches: int = 4
    """Minibatches, each one optimizer step, per epoch."""
    max_grad_norm: float = 0.5
    """Clip gradients to this global norm."""
    target_kl: float | None = None
    """Target of the mean KL(old || new) in nats per action. penalty and adaptive_clip adapt toward it (None: a fixed
    beta, and 0.01); the other objectives stop an update beyond 1.5 times it (None: never)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("clip_range", "max_grad_norm", "clip_range_high", "clip_range_vf", "target_kl")
        self._require_at_least(0, "vf_coef", "ent_coef", "kl_loss_coef", "positive_loss_coef", "penalty_beta")
        self._require_between(0, 1, "gamma", "gae_lambda")
        self._require_at_least(1, "num_epochs", "num_minibatches")
        self._require("above 1", lambda value: value > 1, "dual_clip")
        if self.objective == "adaptive_clip" and self.clip_range_high is not None:
            raise ValueError("objective='adaptive_clip' moves one symmetric clip_range; remove clip_range_high")
        if self.ratio_level != "token" and self.objective in ("penalty", "a2c", "reinforce"):
            raise ValueError(
                f"ratio_level={self.ratio_level!r} pools the ratio that clip, adaptive_clip, dual_clip, cispo and "
                f"dis bound, but objective={self.objective!r} bounds none: change one of the two"
            )
        if self.kl_loss != "k2" and self.kl_loss_coef == 0:
            raise ValueError(f"kl_loss={self.kl_loss!r} has the weight kl_loss_coef=0: set kl_loss_coef above 0")

    @property
    def steering_kl(self) -> float | None:
        """The KL that beta or the clip range is adapted toward, or None where nothing is adapted."""
        if self.objective == "adaptive_clip":
            return 0.01 if self.target_kl is None else self.target_kl
        return self.target_kl if self.objective == "penalty" else None

    @property
    def stopping_kl(self) -> float | None:
        """The KL beyond which an update takes no further step, or None."""
        steers = self.objective in ("penalty", "adaptive_clip")
        return None if steers or self.target_kl is None else 1.5 * self.target_kl
