"""PPOArgs: every setting of a control run, each with its range."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar

from classic.schedules import factor, require_schedule, shares
from rlhf_ppo.core.config import Objective, PPOConfig
from rlhf_ppo.core.validation import require_types
from rlhf_ppo.runtime.command_line.unknown_names import refuse_unknown_settings
from rlhf_ppo.runtime.logs.trackers import check_trackers

T = TypeVar("T")

EPISODE_COLUMNS = ("iteration", "env_steps", "seconds", "env", "return", "length")
"""What episodes.jsonl has of every episode."""

Vectorization = Literal["auto", "sync", "async", "vector_entry_point"]

SCHEDULES = ("lr_schedule", "clip_range_schedule", "ent_coef_schedule")

LOG_STD_RANGE = (-20.0, 2.0)
"""Bounds of a log standard deviation; beyond them exp() of it is of no use."""

OTHER_NAMES: dict[str, str] = {
    "n_steps": "here it is num_steps",
    "n_envs": "here it is num_envs",
    "n_epochs": "here it is num_epochs",
    "n_timesteps": "here it is total_timesteps",
    "update_epochs": "here it is num_epochs",
    "batch_size": "here it is num_minibatches: num_steps x num_envs / batch_size of them",
    "minibatch_size": "here it is num_minibatches: num_steps x num_envs / minibatch_size of them",
    "normalize_advantage": "here it is normalize_advantages",
    "norm_adv": "here it is normalize_advantages",
    "normalize": "here it is normalize_observations and normalize_rewards",
    "clip_coef": "here it is clip_range",
    "clip_vloss": "here it is clip_range_vf, the range itself",
    "anneal_lr": "here it is lr_schedule, linear or constant",
    "optimizer_kwargs": "here they are adam_eps and weight_decay",
    "lr": "here it is learning_rate",
    "policy_kwargs": "here they are hidden_sizes, activation, shared_network, log_std_init and others",
    "net_arch": "here it is hidden_sizes, value_hidden_sizes and shared_network",
    "features_extractor_class": "here it is network, a function that makes one",
    "activation_fn": "here it is activation, tanh or relu",
    "env_wrapper": "here it is wrappers",
    "tensorboard_log": "here it is report_to=('tensorboard',), written into output_dir",
    "verbose": "here it is quiet",
}
"""A setting's name in Stable-Baselines3 or CleanRL -> ours, or why there is none."""

EARLIER: dict[str, Any] = {
    "normalize_values": False,
    "adam_eps": 1e-5,
    "weight_decay": 0.0,
    "use_sde": False,
    "sde_sample_freq": 4,
    "training_wrappers": (),
}
"""Settings that earlier versions did not have -> what those did."""

CONTINUOUS: dict[str, Any] = {"squash": False, "log_std_init": 0.0, "state_dependent_std": False, "use_sde": False}
"""Settings of continuous actions -> their defaults, the only values that fit discrete actions."""


@dataclass(frozen=True, kw_only=True)
class PPOArgs:
    """Settings of a run. None means the environment's preset, or the default where it has none."""

    seed: int = 0
    """Seed of the initial weights, the sampled actions, the minibatches and the environments."""
    total_timesteps: int | None = None
    """Environment steps to train for, rounded up to whole rollouts; schedules run over them."""
    num_envs: int | None = None
    """Environment copies stepped in parallel."""
    num_steps: int | None = None
    """Steps of each copy in a rollout."""
    autoreset_mode: Literal["next_step", "same_step"] | None = None
    """When copies reset after an episode; None: as Gymnasium's own vector environment does."""
    vectorization: Vectorization = "auto"
    """How copies are stepped: auto (the environment's own vector version if it has one, else sync), sync (one after
    another), async (one process each, for slow environments) or vector_entry_point."""
    env_kwargs: dict[str, bool | int | float | str] | None = None
    """Keyword arguments of the environment, such as continuous True; {}: none, where the preset has some."""
    wrappers: tuple[str, ...] | None = None
    """Wrappers around each copy, innermost first: names from gymnasium.wrappers, or module:Name, with arguments as in
    FrameStackObservation(stack_size=4)."""
    training_wrappers: tuple[str, ...] | None = None
    """Wrappers around the others, of training's copies alone: what evaluations should not see, as shaped rewards."""
    action_masks: bool | None = None
    """Sample only actions that infos["action_mask"], action_masks() or the observation's part action_mask allows; None:
    if the environment provides one of these."""
    hidden_sizes: tuple[int, ...] | None = None
    """Widths of the hidden layers; empty: none."""
    value_hidden_sizes: tuple[int, ...] | None = None
    """Widths of the critic's hidden layers; None: hidden_sizes."""
    network: str | None = None
    """A function that makes a network of your own below the hidden layers, as file.py:function or module:function: from
    the observation space to (module, width of its features). None: none."""
    activation: Literal["tanh", "relu"] | None = None
    """Activation function of the hidden layers."""
    shared_network: bool | None = None
    """Actor and critic share the hidden layers; False: they share no weights."""
    recurrent: Literal["none", "lstm", "gru"] | None = None
    """Recurrent layer before the hidden layers, reset at each episode's start; minibatches are then whole sequences."""
    recurrent_size: int | None = None
    """Width of the recurrent layer."""
    squash: bool | None = None
    """Squash continuous actions into their bounds by tanh (the log-probs account for it) instead of clipping them."""
    log_std_init: float | None = None
    """Initial log standard deviation of continuous actions."""
    state_dependent_std: bool | None = None
    """Predict the standard deviation from the observation; False: one learned number per action dimension."""
    use_sde: bool | None = None
    """Explore by gSDE: noise is a function of the last hidden layer, drawn anew every sde_sample_freq steps."""
    sde_sample_freq: int | None = None
    """Steps for which gSDE's function stays."""
    normalize_observations: bool | None = None
    """Scale observations to mean 0 and variance 1 by running statistics, which are saved with the agent."""
    normalize_rewards: bool | None = None
    """Divide rewards by the running standard deviation of the discounted return; reported returns are unscaled."""
    normalize_values: bool | None = None
    """Learn values in units of the returns' running mean and standard deviation, so that the critic does not depend on
    the rewards' scale; value loss and clip_range_vf are in these units."""
    learning_rate: float | None = None
    """Adam's initial learning rate."""
    lr_schedule: str | None = None
    """How the learning rate falls over total_timesteps: constant, linear or cosine (to 0), piecewise:0.5=0.1,0.9=0.01
    (a tenth from half of the steps on, ...), or file.py:function, from the share of steps done to a factor."""
    adam_eps: float | None = None
    """Adam's epsilon."""
    weight_decay: float | None = None
    """AdamW's weight decay: each step multiplies every weight by 1 - learning_rate x this."""
    objective: Objective | None = None
    """Policy loss: clip, penalty, adaptive_clip, dual_clip, cispo, dis (actions outside the clip range, on either side,
    are masked), a2c (no ratio) or reinforce (no ratio, no baseline)."""
    clip_range: float | None = None
    """Clip the ratio to 1 +- this (the initial value for adaptive_clip)."""
    clip_range_schedule: str | None = None
    """How the clip range falls over total_timesteps; as lr_schedule."""
    clip_range_high: float | None = None
    """Upper clip range, if it differs from the lower one; None: the same."""
    clip_range_vf: float | None = None
    """Value loss: clip new values to within this of the recorded ones; None: no value clipping."""
    dual_clip: float | None = None
    """dual_clip objective: for A < 0 the loss is at most this times -A."""
    penalty_beta: float | None = None
    """penalty objective: initial weight of KL(old || new), adapted toward target_kl if that is set."""
    target_kl: float | None = None
    """KL(old || new) per action in nats: stop an update beyond 1.5 times this; penalty and adaptive_clip adapt toward
    it. None: no target."""
    vf_coef: float | None = None
    """Weight of the value loss."""
    ent_coef: float | None = None
    """Weight of the entropy bonus."""
    ent_coef_schedule: str | None = None
    """How the entropy bonus falls over total_timesteps; as lr_schedule."""
    gamma: float | None = None
    """Discount per step."""
    gae_lambda: float | None = None
    """GAE's lambda: 0 is TD(0), 1 is Monte Carlo (which reinforce always uses)."""
    normalize_advantages: bool | None = None
    """Whiten the advantages of each rollout."""
    num_epochs: int | None = None
    """Passes over each rollout (a2c and reinforce: 1 unless set)."""
    recompute_advantages: bool | None = None
    """Recompute advantages and returns with the current critic before each pass."""
    num_minibatches: int | None = None
    """Optimizer steps per pass."""
    max_grad_norm: float | None = None
    """Global gradient norm after clipping."""
    max_initial_log_ratio: float | None = None
    """Stop if any |log-ratio| before a rollout's first optimizer step exceeds this many nats; None: 0.1."""
    eval_envs: int | None = None
    """Environment copies to evaluate on, at most; they are kept for the next evaluation. None: num_envs, at most 32."""
    eval_max_steps: int | None = None
    """Cut evaluation and video episodes after this many steps, with a warning; None: 10,000, or the environment's own
    time limit if that is longer."""
    device: str = "cpu"
    """Where networks compute: cpu, cuda (cuda:1, ...) or mps. A GPU pays for images and large networks alone."""
    num_threads: int = 1
    """Torch threads for training and evaluation; more than one slows small networks down."""
    output_dir: str | None = None
    """Folder for metrics.jsonl, episodes.jsonl, curve.png, report.html and run.json; None: write nothing."""
    report: bool = True
    """Write report.html into output_dir at the end (see docs/report.md)."""
    save_every: int = 0
    """Rollouts between checkpoints (checkpoint-<n> in output_dir), from which a run can resume; 0: none."""
    save_total_limit: int | None = None
    """Keep the newest checkpoints, at most this many; None: all."""
    episode_info: tuple[str, ...] = ()
    """Keys of the environment's infos that episodes.jsonl keeps of each episode's last step."""
    report_to: tuple[str, ...] = ()
    """Trackers that also receive the metrics: tensorboard (into output_dir/tensorboard), wandb, trackio."""
    quiet: bool = False
    """Show no progress."""

    ELSEWHERE: ClassVar[Mapping[str, str]] = OTHER_NAMES
    """Settings that have another name in other libraries, and ours."""

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Name the setting that was meant, where Python would only say that it is unknown."""
        refuse_unknown_settings(cls, settings)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        require_types(self)
        lists = ("hidden_sizes", "value_hidden_sizes", "wrappers", "training_wrappers", "episode_info", "report_to")
        for name in lists:  # they come from JSON; tuples compare and hash
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if taken := [key for key in self.episode_info if key in EPISODE_COLUMNS]:
            raise ValueError(
                f"episode_info={taken[0]!r} is a column that episodes.jsonl has of every episode: keep the info under "
                "another key, by a wrapper"
            )
        check_trackers(self.report_to)
        counts = ("total_timesteps", "num_envs", "num_steps", "num_threads", "recurrent_size", "sde_sample_freq")
        for name in (*counts, "eval_envs", "eval_max_steps", "save_total_limit"):
            self._require(name, lambda value: value >= 1, "1 or more")
        for name in ("save_every", "learning_rate", "weight_decay"):
            self._require(name, lambda value: value >= 0, "0 or more")
        self._require("adam_eps", lambda value: value > 0, "positive")
        for name in SCHEDULES:
            if getattr(self, name) is not None:
                require_schedule(name, getattr(self, name))
        self._require("seed", lambda value: 0 <= value < 2**32, "from 0 to 4294967295")
        for name in ("hidden_sizes", "value_hidden_sizes"):
            self._require(name, lambda value: min(value, default=1) >= 1, "positive widths, or empty for no layer")
        self._require("max_initial_log_ratio", lambda value: value > 0, "positive")
        low, high = LOG_STD_RANGE
        self._require("log_std_init", lambda value: low <= value <= high, f"between {low:g} and {high:g}")

    def _require(self, name: str, ok: Callable[[Any], bool], what: str) -> None:
        value = getattr(self, name)
        if value is not None and not ok(value):
            raise ValueError(f"{name} must be {what}, got {value!r}")

    def resolve(self, env_id: str | None, *, single: bool = False) -> PPOArgs:
        """Return these settings with every None filled in; see :func:`classic.presets.resolve.resolve`."""
        # That module imports this one.
        return importlib.import_module("classic.presets.resolve").resolve(self, env_id, single=single)

    def ppo_config(self) -> PPOConfig:
        """Return the core's part of resolved settings, validated there."""
        shared = {field.name for field in dataclasses.fields(PPOConfig)} & set(PPOArgs.__dataclass_fields__)
        return PPOConfig(**{name: getattr(self, name) for name in shared})

    def try_schedules(self) -> None:
        """Raise a ValueError if a schedule of resolved settings fails, or leaves a coefficient out of its range."""
        for name in SCHEDULES:
            schedule = filled(getattr(self, name))
            for done in shares(schedule):
                try:
                    if factor(schedule, done) == 0 and name == "clip_range_schedule":
                        raise ValueError("the clip range must stay above 0")
                except ValueError as error:
                    raise ValueError(f"{name}={schedule!r}, after {done:.3g} of all steps: {error}") from error

    def scheduled(self, config: PPOConfig, done: float) -> PPOConfig:
        """Return ``config`` as scheduled after the share ``done`` (0 or more, below 1) of all steps."""
        changed = {}
        if (schedule := filled(self.clip_range_schedule)) != "constant":
            left = factor(schedule, done)
            ranges = {"clip_range": self.clip_range, "clip_range_high": self.clip_range_high}
            changed |= {name: value * left for name, value in ranges.items() if value is not None}
        if (schedule := filled(self.ent_coef_schedule)) != "constant" and self.ent_coef is not None:
            changed["ent_coef"] = self.ent_coef * factor(schedule, done)
        return dataclasses.replace(config, **changed) if changed else config


def filled(value: T | None) -> T:
    """Return a setting that :func:`classic.presets.resolve.resolve` has filled in."""
    assert value is not None, "settings are not resolved"
    return value
