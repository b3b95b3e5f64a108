"""What an agent consists of: Run is fixed while it learns, TrainState is what training changes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import gymnasium
import torch
from torch import Tensor

from classic.advantages import Estimate
from classic.config import PPOArgs, filled
from classic.envs.checks import require_fit
from classic.envs.environments import Environments, Episode
from classic.envs.make_env import EnvLike, env_name, identify
from classic.envs.normalization import Normalizer
from classic.envs.parts import image_columns
from classic.envs.seeds import derive_seeds
from classic.fast.switch import Gradients, Optimizer, choose
from classic.gradient_step import trained_parameters
from classic.networks.actor_critic import ActorCritic
from classic.networks.decisions import Sample
from classic.networks.own_network import Encoder, NetworkFactory, factory_name, make_encoder
from classic.presets.resolve import preset, preset_ids, resolve
from classic.rollout import Rollout
from rlhf_ppo.core import PPOConfig, ValueScale, update_value_scale
from rlhf_ppo.runtime.logs.run_directory import RunDirectory
from rlhf_ppo.runtime.logs.trackers import require_installed
from rlhf_ppo.runtime.machine.device import resolve_device


@dataclass(frozen=True)
class Run:
    """What is fixed while an agent learns; the environments keep their running episodes themselves."""

    env: EnvLike
    """The environment as it was given."""
    env_id: str
    """Its name in messages."""
    task: str | None
    """The registered id that the preset is looked up by; None: the environment is not registered."""
    args: PPOArgs
    """The settings, every None filled in."""
    encoder: Encoder | None
    """Makes what turns observations into features, if that is not the standard image network or nothing."""
    origin: str
    """Where settings that were not given come from."""
    envs: Environments
    """Training's copies."""
    folder: RunDirectory | None = None
    """Where metrics and checkpoints go; None: nothing is written."""


@dataclass
class Progress:
    """How far a call of learn is."""

    total: int
    """Environment steps of the call."""
    first_step: int
    """Environment steps before the call."""
    consecutive_skips: int = 0
    """Optimizer steps skipped since the last one with a finite gradient."""


class LastUpdate(NamedTuple):
    """What the last update learned from."""

    rollout: Rollout
    estimate: Estimate
    config: PPOConfig
    """The core's settings as they were."""


@dataclass
class TrainState:
    """What training changes; a checkpoint is this and the running episodes."""

    network: ActorCritic
    batch: int
    """Rows that act at a time: training's copies."""
    sample: Sample
    """Samples one step's actions."""
    gradients: Gradients
    """Forward and backward pass of one minibatch."""
    optimizer: Optimizer
    """Gradient clipping and Adam."""
    config: PPOConfig
    """The core's settings; schedules and controllers move some of them."""
    normalizer: Normalizer
    memory: Tensor | None
    """[B, K] state of the recurrent layer, or None without one."""
    generator: torch.Generator
    """Draws of training: the initial weights, actions, minibatches."""
    predict_generator: torch.Generator
    """Draws of :meth:`classic.PPO.predict`."""
    counters: dict[str, int]
    """Iterations, environment steps, optimizer steps and episodes so far, and environment steps of the last rollout."""
    device: torch.device
    """Where the network is; everything else is on the CPU."""
    value_scale: ValueScale | None
    """The units in which the critic predicts; None: it has seen no returns that differ (normalize_values)."""
    recent: deque[Episode] = field(default_factory=lambda: deque(maxlen=100))
    """The last finished episodes."""
    progress: Progress = field(default_factory=lambda: Progress(0, 0))
    playing: bool = False
    """Whether episodes are running that training continues."""
    best_return: float | None = None
    """The best evaluation so far (:func:`classic.callbacks.evaluate_every`)."""
    last_metrics: Mapping[str, float] = field(default_factory=dict)
    stopped: bool = False
    """Whether on_step or on_episode wanted training to end with the last rollout, which a resumed run cannot ask."""
    last_update: LastUpdate | None = None

    @property
    def done(self) -> int:
        """Environment steps of this call of learn."""
        return self.counters["env_steps"] - self.progress.first_step

    def count(self, rollout: Rollout) -> None:
        """Count an iteration, and the steps and episodes of its rollout."""
        self.counters["iteration"] += 1
        self.counters["rollout_steps"] = int(rollout.mask.sum())
        self.counters["env_steps"] += self.counters["rollout_steps"]
        self.counters["episodes"] += len(rollout.episodes)
        self.recent.extend(rollout.episodes)

    def follow_returns(self, estimate: Estimate, mask: Tensor) -> None:
        """Let the critic's units follow the returns of a rollout.

        Args:
            estimate: of the rollout, under the units so far.
            mask: [B, T] its decisions.
        """
        if self.value_scale is not None:
            self.change_value_scale(update_value_scale(self.value_scale, estimate.returns, mask))
        elif estimate.value_scale.count:
            self.value_scale = estimate.value_scale

    def change_value_scale(self, scale: ValueScale) -> None:
        """Let the critic predict in other units; what it has learned stays the same in the reward's.

        A last layer that is frozen or not linear keeps its units.
        """
        old = self.value_scale
        if old is None or scale == old or self.network.rescale_values(old, scale):
            self.value_scale = scale

    def follow_value_setting(self, normalize_values: bool) -> None:
        """Keep the reward's own units without normalize_values; with it an agent that has not learned has none yet."""
        if not normalize_values:
            self.change_value_scale(ValueScale())
        elif not self.counters["iteration"]:
            self.value_scale = None

    def follow_network(self) -> None:
        """Train the network as it is now: parts may have been replaced, frozen, loaded or copied.

        Adam keeps its moments if names and shapes of the trained parameters are the same; otherwise it starts afresh.

        Raises:
            ValueError: nothing is left to train, or a parameter is not in float32 on the device.
        """
        formats, device = {f"{p.dtype} on {p.device}" for p in self.network.parameters()}, self.device
        if formats != {f"torch.float32 on {device}"}:
            raise ValueError(
                f"the network's parameters are {' and '.join(sorted(formats))}, but classic computes in float32 on "
                f"{device}: agent.network.float().to({str(device)!r})"
            )
        if not trained_parameters(self.network):
            raise ValueError("every parameter of the network is frozen (requires_grad False): nothing is left to train")
        self.sample, self.gradients, self.optimizer = choose(
            self.network,
            self.config,
            batch=self.batch,
            learning_rate=self.optimizer.lr,
            optimizer=self.optimizer,
        )


def make_run(env: EnvLike, args: PPOArgs, network: NetworkFactory | None = None) -> Run:
    """Fill in the settings and make the environments.

    Args:
        env, args, network: see :class:`classic.PPO`.
    Raises:
        ValueError, ModuleNotFoundError, BrokenEnvironmentError: see :class:`classic.PPO`.
    """
    task, copies_of = identify(env, in_this_process=args.vectorization != "async")
    if not isinstance(env, str) and "env_kwargs" in preset(task):  # what was made already is as it should be
        made = {"env_kwargs": args.env_kwargs or {}, "wrappers": args.wrappers or ()}
        args = replace(args, **made, training_wrappers=args.training_wrappers or ())
    if network is not None:
        args = replace(args, network=factory_name(network))
    args = resolve(args, task, single=isinstance(env, gymnasium.Env))
    require_installed(args.report_to)
    resolve_device(args.device)
    if args.training_wrappers and isinstance(env, gymnasium.Env):
        raise ValueError(
            f"training_wrappers={args.training_wrappers} are around training's copies alone, but {env_name(env)!r} is "
            "one environment, on which evaluations play, too: give its id or a function that makes it"
        )
    around = (*filled(args.wrappers), *filled(args.training_wrappers))
    envs = make_copies(copies_of, args, filled(args.num_envs), around)
    try:
        require_fit(args, envs)
        encoder = make_encoder(args, envs, network)
    except ValueError:
        envs.close()
        raise
    origin = f"preset of {task}" if task in preset_ids() else "no preset for this environment: general defaults"
    return Run(env, env_name(env), task, args, encoder, origin, envs)


def make_copies(env: EnvLike, args: PPOArgs, num_envs: int, wrappers: Sequence[str]) -> Environments:
    """Make ``num_envs`` copies of an environment as the settings say, with these wrappers around each."""
    return Environments(
        env,
        num_envs,
        args.autoreset_mode,
        vectorization=args.vectorization,
        env_kwargs=args.env_kwargs,
        wrappers=wrappers,
        action_masks=args.action_masks,
        squash=filled(args.squash),
    )


def describe_spaces(envs: Environments) -> dict[str, str]:
    """Describe the spaces that an environment must still have when its agent is loaded."""
    return {"observation": str(envs.observation_space), "action": str(envs.action_space)}


def initial_state(run: Run) -> TrainState:
    """Draw a fresh network, with all that trains it."""
    args, envs = run.args, run.envs
    # Own generators: a run neither disturbs torch's global one nor depends on it.
    generator = torch.Generator().manual_seed(args.seed)
    network = ActorCritic(
        envs.observation_shape,
        envs.actions,
        hidden_sizes=filled(args.hidden_sizes),
        generator=generator,
        value_hidden_sizes=args.value_hidden_sizes,
        activation=filled(args.activation),
        shared=filled(args.shared_network),
        recurrent=filled(args.recurrent),
        recurrent_size=filled(args.recurrent_size),
        squash=filled(args.squash),
        log_std_init=filled(args.log_std_init),
        state_dependent_std=filled(args.state_dependent_std),
        explores=filled(args.use_sde),
        encoder=run.encoder,
    )
    device = resolve_device(args.device)
    network.to(device)
    config = args.ppo_config()
    methods = choose(network, config, batch=envs.num_envs, learning_rate=filled(args.learning_rate))
    return TrainState(
        network,
        envs.num_envs,
        *methods,
        config,
        Normalizer(
            envs.observation_shape if args.normalize_observations else None,
            envs.num_envs if args.normalize_rewards else None,
            config.gamma,
            image_columns(envs.observation_space),
        ),
        network.initial_state(envs.num_envs),
        generator,
        torch.Generator().manual_seed(derive_seeds(args.seed, "prediction", 1)[0]),
        {"iteration": 0, "env_steps": 0, "optimizer_steps": 0, "episodes": 0},
        device,
        None if args.normalize_values else ValueScale(),
    )


def begin_episodes(run: Run, state: TrainState) -> None:
    """Reset every copy: at the start, after an evaluation on a single one, or if a checkpoint has no episodes."""
    run.envs.reset(run.args.seed, begun=state.counters["env_steps"])
    state.memory = state.network.initial_state(run.envs.num_envs)
    state.normalizer.begin_episodes()
    state.playing = True
