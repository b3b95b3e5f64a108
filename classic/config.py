"""PPOArgs: every setting of a control run, and the presets that fill in what is left None."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from classic.envs.make_env import Vectorization
from classic.envs.spaces import ActionLayout
from classic.name_hints import SETTINGS
from classic.networks.actor_critic import LOG_STD_RANGE
from classic.presets.resolve import preset as preset_of
from rlhf_ppo.core import PPOConfig
from rlhf_ppo.core.config import Objective
from rlhf_ppo.core.validation import require_types
from rlhf_ppo.runtime.trackers import check_trackers
from rlhf_ppo.runtime.unknown_names import refuse_unknown_settings

# What an environment without a preset of its own gets: common values for low-dimensional control tasks. Neither these
# nor presets set a field whose None already means "off", so that "off" can always be asked for.
DEFAULTS: dict[str, Any] = {
    "total_timesteps": 500_000,
    "num_envs": 8,
    "num_steps": 256,
    "learning_rate": 3e-4,
    "lr_schedule": "linear",
    "hidden_sizes": (64, 64),
    "activation": "tanh",
    "shared_network": False,
    "recurrent": "none",
    "recurrent_size": 64,
    "squash": False,
    "log_std_init": 0.0,
    "state_dependent_std": False,
    "normalize_observations": False,
    "normalize_rewards": False,
    "clip_range_schedule": "constant",
    "ent_coef_schedule": "constant",
    "recompute_advantages": False,
    "objective": "clip",
    "clip_range": 0.2,
    "dual_clip": 3.0,
    "penalty_beta": 1.0,
    "vf_coef": 0.5,
    "ent_coef": 0.0,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "normalize_advantages": True,
    "num_epochs": 10,
    "num_minibatches": 32,
    "max_grad_norm": 0.5,
}

# Objectives with a clip range that stays where it is put.
CLIPPING = ("clip", "dual_clip", "cispo")

# Settings that some objectives alone read.
READ_BY = {
    "dual_clip": ("dual_clip",),
    "penalty_beta": ("penalty",),
    "clip_range": (*CLIPPING, "adaptive_clip"),
    "clip_range_high": CLIPPING,
}


def never_read(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names of settings that the others leave without effect, and why."""
    objective = f"objective={settings['objective']!r}"
    for name, readers in READ_BY.items():
        if settings["objective"] not in readers:
            yield name, f"is read by objective={' or '.join(map(repr, readers))} alone, but {objective}"
    if settings["objective"] == "cispo" and (high := settings.get("clip_range_high")) is not None:
        yield "clip_range", f"has no effect, since {objective} reads clip_range_high={high} alone"
    if settings["vf_coef"] == 0:
        yield "clip_range_vf", "is about the value loss, but vf_coef=0 leaves none"
    if settings["recurrent"] == "none":
        yield "recurrent_size", "is read by recurrent='lstm' or 'gru' alone, but recurrent='none'"


@dataclass(frozen=True, kw_only=True)
class PPOArgs:
    """Settings of a run. None means the preset of the environment, or what :data:`DEFAULTS` says."""

    seed: int = 0
    """Seed of the initialisation, the sampled actions, the minibatches and the environments."""
    total_timesteps: int | None = None
    """Environment steps to train for, rounded up to whole rollouts; schedules span them."""
    num_envs: int | None = None
    """Environment copies stepped side by side."""
    num_steps: int | None = None
    """Steps of each copy in a rollout."""
    autoreset_mode: Literal["next_step", "same_step"] | None = None
    """How copies restart after an episode; None: whatever Gymnasium's own vector environment does."""
    vectorization: Vectorization = "auto"
    """How copies are stepped: auto (the environment's own vector version, else one by one), sync (one by one), async (a
    process each, for slow environments) or vector_entry_point."""
    env_kwargs: dict[str, bool | int | float | str] | None = None
    """Arguments of the environment, such as continuous True."""
    wrappers: tuple[str, ...] = ()
    """Wrappers around each copy, innermost first: names from gymnasium.wrappers, or module:Name."""
    action_masks: bool | None = None
    """Keep to what infos["action_mask"], action_masks() or a part action_mask of the observations allows; None: where
    the environment offers one of them."""
    hidden_sizes: tuple[int, ...] | None = None
    """Widths of the hidden layers, the same for the actor and the critic."""
    activation: Literal["tanh", "relu"] | None = None
    """What follows each hidden layer."""
    shared_network: bool | None = None
    """One body with two heads; False: the actor and the critic share no weights."""
    recurrent: Literal["none", "lstm", "gru"] | None = None
    """A memory before the hidden layers, cleared where episodes begin; minibatches are then whole sequences."""
    recurrent_size: int | None = None
    """Width of the memory."""
    squash: bool | None = None
    """Bring continuous actions within their bounds by tanh (counted in the log-probs) instead of clipping them."""
    log_std_init: float | None = None
    """Log standard deviation of continuous actions at the start."""
    state_dependent_std: bool | None = None
    """The standard deviation depends on the observation; False: one learned number per action dimension."""
    normalize_observations: bool | None = None
    """Scale observations to mean 0 and variance 1 by running statistics, which the agent saves."""
    normalize_rewards: bool | None = None
    """Divide rewards by the running spread of the discounted return; reported returns stay as they are."""
    learning_rate: float | None = None
    """Adam's learning rate at the start."""
    lr_schedule: Literal["linear", "constant"] | None = None
    """linear falls to 0 over the total number of steps; constant stays."""
    objective: Objective | None = None
    """Policy loss: clip, penalty, adaptive_clip, dual_clip, cispo, a2c (no ratio) or reinforce (no ratio, no
    baseline)."""
    clip_range: float | None = None
    """Ratios beyond 1 +- this bring no further gain (the start value for adaptive_clip)."""
    clip_range_schedule: Literal["linear", "constant"] | None = None
    """linear lets the clip range fall to 0 over the total number of steps."""
    clip_range_high: float | None = None
    """Upper clip range when it differs from the lower one; None: the same."""
    clip_range_vf: float | None = None
    """Keeps a new value within this of the recorded one in the value loss; None: no value clipping."""
    dual_clip: float | None = None
    """dual_clip objective: the loss of an action with A < 0 is at most this times -A."""
    penalty_beta: float | None = None
    """penalty objective: first weight of KL(old || new), adapted toward target_kl when that is set."""
    target_kl: float | None = None
    """KL(old || new) per action in nats: ends an update past 1.5 times it, or is what penalty and adaptive_clip aim at;
    None: no target."""
    vf_coef: float | None = None
    """Weight of the value loss."""
    ent_coef: float | None = None
    """Weight of the entropy bonus."""
    ent_coef_schedule: Literal["linear", "constant"] | None = None
    """linear lets the entropy bonus fall to 0 over the total number of steps."""
    gamma: float | None = None
    """Discount per step."""
    gae_lambda: float | None = None
    """GAE's lambda: 0 is TD(0), 1 is Monte Carlo (which reinforce always uses)."""
    normalize_advantages: bool | None = None
    """Whiten the advantages of each rollout."""
    num_epochs: int | None = None
    """Passes over each rollout (a2c and reinforce: 1 unless set)."""
    recompute_advantages: bool | None = None
    """Estimate advantages and returns anew before each pass, with the critic as it is by then."""
    num_minibatches: int | None = None
    """Optimizer steps per pass."""
    max_grad_norm: float | None = None
    """Global gradient norm after clipping."""
    max_initial_log_ratio: float | None = None
    """Tripwire: stop when any |log-ratio| before a rollout's first optimizer step exceeds this many nats. None: 0.1."""
    eval_envs: int | None = None
    """Most environment copies of an evaluation, which it keeps for the next one; None: num_envs, at most 32."""
    eval_max_steps: int | None = None
    """Steps after which an episode of an evaluation or a video is cut, with a warning; None: 10,000, or the
    environment's own time limit if that is longer."""
    num_threads: int = 1
    """Torch threads while learning or evaluating; more than one slows networks this small down."""
    output_dir: str | None = None
    """Folder for metrics.jsonl, curve.png and run.json; None: nothing is written."""
    save_every: int = 0
    """Rollouts between checkpoints (checkpoint-<n> in output_dir), from which a run can be resumed; 0: none."""
    save_total_limit: int | None = None
    """Checkpoints to keep, the newest ones; None: all."""
    report_to: tuple[str, ...] = ()
    """Where metrics.jsonl's lines are sent as well: tensorboard (into output_dir/tensorboard), wandb, trackio."""
    quiet: bool = False
    """Show no progress."""

    ELSEWHERE: ClassVar[Mapping[str, str]] = SETTINGS
    """Settings that have another name in other libraries, and ours."""

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Say what a setting is called here, where Python would only say that it is unknown."""
        refuse_unknown_settings(cls, settings)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        require_types(self)
        for name in ("hidden_sizes", "wrappers", "report_to"):  # lists come from JSON, tuples compare and hash
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_trackers(self.report_to)
        counts = ("total_timesteps", "num_envs", "num_steps", "num_threads", "recurrent_size")
        for name in (*counts, "eval_envs", "eval_max_steps"):
            self._require(name, lambda value: value >= 1, "1 or more")
        self._require("seed", lambda value: 0 <= value < 2**32, "from 0 to 4294967295")
        self._require("save_every", lambda value: value >= 0, "0 or more")
        self._require("save_total_limit", lambda value: value >= 1, "1 or more")
        self._require("learning_rate", lambda value: value >= 0, "0 or more")
        self._require("hidden_sizes", lambda value: bool(value) and min(value) >= 1, "positive widths")
        self._require("max_initial_log_ratio", lambda value: value > 0, "positive")
        self._require("log_std_init", lambda value: LOG_STD_RANGE[0] <= value <= LOG_STD_RANGE[1], "between -20 and 2")

    def _require(self, name: str, ok: Any, what: str) -> None:
        value = getattr(self, name)
        if value is not None and not ok(value):
            raise ValueError(f"{name} must be {what}, got {value!r}")

    def resolve(self, env_id: str | None, *, single: bool = False) -> PPOArgs:
        """These settings with every None filled in from the environment's preset, or without one from the defaults.

        ``env_id`` None: it has no preset. ``single``: there can be only one copy, which takes as many steps a rollout
        as the preset's copies together.

        Warns:
            UserWarning: a2c or reinforce would use its data more than once.
        Raises:
            ValueError: settings contradict each other, or a value is out of range.
        """
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(PPOArgs)}
        given = {name: value for name, value in given.items() if value is not None}
        preset = {**DEFAULTS, **preset_of(env_id, PPOArgs)}
        if single and "num_envs" not in given:
            preset["num_envs"], preset["num_steps"] = 1, preset["num_envs"] * preset["num_steps"]
        filled = {**preset, **given}
        for name, needed in (("save_every", "output_dir"), ("save_total_limit", "save_every")):
            if filled.get(name) and not filled.get(needed):
                raise ValueError(
                    f"{name}={filled[name]} is about checkpoints, but {needed}={getattr(self, needed)}: set it, or "
                    f"remove {name}"
                )
        objective = filled["objective"]
        for name, why in never_read(filled):
            if filled.get(name) != preset.get(name):
                raise ValueError(f"{name}={given[name]} {why}: remove one of the two")
        if filled["clip_range_schedule"] != "constant" and objective not in CLIPPING:
            raise ValueError(
                f"clip_range_schedule={filled['clip_range_schedule']!r} needs a clip range of its own, but "
                f"objective={objective!r}: remove one of the two"
            )
        if objective in ("a2c", "reinforce"):
            filled["num_epochs"] = given.get("num_epochs", 1)
            if filled["num_epochs"] > 1:
                warnings.warn(
                    f"objective={objective!r} has no ratio to correct for old data, so num_epochs="
                    f"{filled['num_epochs']} reuses it off-policy; num_epochs=1 is exact",
                    stacklevel=3,
                )
        if objective == "reinforce":
            if given.get("gae_lambda", 1.0) != 1.0:
                raise ValueError(
                    f"objective='reinforce' learns from Monte Carlo returns, which is gae_lambda=1, but gae_lambda="
                    f"{given['gae_lambda']}: remove it, or use objective='a2c'"
                )
            filled["gae_lambda"] = 1.0
        if filled["recurrent"] != "none" and filled["num_minibatches"] > filled["num_envs"]:
            if "num_minibatches" in given:
                raise ValueError(
                    f"num_minibatches={filled['num_minibatches']} is more than num_envs={filled['num_envs']}, but with "
                    f"recurrent={filled['recurrent']!r} minibatches are whole sequences, one a copy"
                )
            filled["num_minibatches"] = filled["num_envs"]
        if filled["num_minibatches"] > filled["num_envs"] * filled["num_steps"]:
            raise ValueError(
                f"num_minibatches={filled['num_minibatches']} is more than the rollout's {filled['num_envs']} x "
                f"{filled['num_steps']} steps (num_envs x num_steps)"
            )
        if self.report_to and self.output_dir is None:
            raise ValueError(f"report_to={self.report_to!r} sends metrics.jsonl's lines on, but output_dir is None")
        args = PPOArgs(**filled)
        args.ppo_config()
        return args

    def require_full_minibatches(self, *, next_step_autoreset: bool) -> None:
        """Raise a ValueError unless any rollout of resolved settings can fill every minibatch.

        Under NEXT_STEP every second step may be a reset in the worst case, which is episodes of one step.
        """
        assert self.num_envs and self.num_steps and self.num_minibatches
        if self.recurrent != "none":  # whole sequences, of which there are always num_envs
            if next_step_autoreset and self.num_steps < 2:
                raise ValueError(
                    f"num_steps={self.num_steps} may hold no decision at all with recurrent={self.recurrent!r} "
                    "(NEXT_STEP autoreset may spend it): raise num_steps to 2 or more"
                )
            return
        decisions = self.num_envs * (self.num_steps // 2 if next_step_autoreset else self.num_steps)
        if self.num_minibatches > decisions:
            raise ValueError(
                f"num_minibatches={self.num_minibatches} needs as many decisions, but num_envs={self.num_envs} x "
                f"num_steps={self.num_steps} guarantees only {decisions} (NEXT_STEP autoreset may spend every second "
                "step): lower num_minibatches or raise num_steps"
            )

    def require_fit(self, actions: ActionLayout, observation_shape: tuple[int, ...], env_id: str) -> None:
        """Raise a ValueError unless resolved settings are about the spaces that the environment has."""
        if self.normalize_observations and len(observation_shape) == 3:
            raise ValueError(
                f"normalize_observations=True, but environment {env_id!r} has images, which are scaled to 0..1 "
                "already: remove it"
            )
        for name in ("squash", "state_dependent_std", "log_std_init"):
            if actions.choices and getattr(self, name) != DEFAULTS[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)} is for continuous actions, but environment {env_id!r} has choices: "
                    "remove it"
                )

    def scheduled(self, config: PPOConfig, done: float) -> PPOConfig:
        """``config`` after the share ``done`` (0 or more, below 1) of all steps."""
        left = {}
        if self.clip_range_schedule == "linear":
            assert self.clip_range is not None
            left["clip_range"] = self.clip_range * (1 - done)
            if self.clip_range_high is not None:
                left["clip_range_high"] = self.clip_range_high * (1 - done)
        if self.ent_coef_schedule == "linear":
            assert self.ent_coef is not None
            left["ent_coef"] = self.ent_coef * (1 - done)
        return dataclasses.replace(config, **left) if left else config

    def ppo_config(self) -> PPOConfig:
        """The core's share of resolved settings, validated there."""
        shared = {field.name for field in dataclasses.fields(PPOConfig)} & set(PPOArgs.__dataclass_fields__)
        return PPOConfig(**{name: getattr(self, name) for name in shared})
