"""PPO for control tasks: the loop (collect, estimate, update, report) and the agent around it.

Longer than other files: the agent is the public class, and its methods document every argument and error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import gymnasium
import numpy as np

from classic.advantages import estimate_advantages, to_experience
from classic.callbacks import Callback, run_callbacks
from classic.changed_settings import change_args, on_this_machine, with_changes
from classic.config import PPOArgs, filled
from classic.envs.environments import Environments, Episode
from classic.envs.make_env import EnvLike
from classic.envs.normalization import Normalizer
from classic.evaluation import EvaluationCopies, evaluate_policy, max_episode_steps
from classic.explain import explain_rollout, report_run
from classic.fast.switch import Optimizer
from classic.networks.actor_critic import ActorCritic
from classic.networks.own_network import NetworkFactory
from classic.play_hooks import EpisodeHook, PlayHooks, StepHook
from classic.predict import ForgottenState, predict
from classic.presets.resolve import resolve
from classic.report import draw_curve, estimate_metrics, make_panel, run_metrics, show_progress
from classic.rollout import Rollout, collect
from classic.save import read_agent, restore_agent, save_agent
from classic.session import announce, guarded, open_run, save_if_due, saving_if_interrupted, steps_to_train, trackers
from classic.state import LastUpdate, Run, TrainState, begin_episodes, initial_state, make_run
from classic.update import adapt, follow_schedules, update
from rlhf_ppo.core import PPOConfig, ValueScale
from rlhf_ppo.runtime.command_line.unknown_names import refuse_unknown_arguments
from rlhf_ppo.runtime.command_line.user_code import require_callbacks
from rlhf_ppo.runtime.explain import Explanation
from rlhf_ppo.runtime.logs.lines import LOGGER
from rlhf_ppo.runtime.logs.progress import ProgressDisplay
from rlhf_ppo.runtime.machine.signals import stop_if_asked
from rlhf_ppo.runtime.machine.threads import torch_threads
from rlhf_ppo.runtime.processes.launch import require_one_process


def _held_by(record: str, name: str) -> Any:
    """Make an attribute of the run or the state one of the agent's, too."""
    return property(
        lambda agent: getattr(getattr(agent, record), name),
        lambda agent, value: setattr(getattr(agent, record), name, value),
    )


class PPO:
    """Proximal policy optimisation on a Gymnasium environment: ``PPO("CartPole-v1", PPOArgs(seed=1)).learn()``."""

    env: EnvLike = _held_by("run", "env")
    env_id: str = _held_by("run", "env_id")
    task: str | None = _held_by("run", "task")
    envs: Environments = _held_by("run", "envs")
    origin: str = _held_by("run", "origin")
    network: ActorCritic = _held_by("state", "network")
    optimizer: Optimizer = _held_by("state", "optimizer")
    normalizer: Normalizer = _held_by("state", "normalizer")
    config: PPOConfig = _held_by("state", "config")
    counters: dict[str, int] = _held_by("state", "counters")
    recent: deque[Episode] = _held_by("state", "recent")
    best_return: float | None = _held_by("state", "best_return")
    value_scale: ValueScale | None = _held_by("state", "value_scale")
    last_metrics: Mapping[str, float] = _held_by("state", "last_metrics")
    last_update: LastUpdate | None = _held_by("state", "last_update")

    def __new__(cls, *args: Any, **arguments: Any) -> Self:
        """Say where a setting goes, where Python would only say that the argument is unknown."""
        fields = {name: f"it is a setting: PPO(env, PPOArgs({name}=...))" for name in PPOArgs.__dataclass_fields__}
        refuse_unknown_arguments(cls.__init__, "PPO", arguments, {**PPOArgs.ELSEWHERE, **fields})
        return super().__new__(cls)

    def __init__(self, env: EnvLike, args: PPOArgs | None = None, *, network: NetworkFactory | None = None) -> None:
        """Make the environments and a fresh network.

        Args:
            env: a registered id (or ``module:id``), a function that makes an environment, or one environment, which is
                then the only copy: evaluation and videos play on it too, and training begins a new episode afterwards.
            args: settings; None: the environment's preset.
            network: from the observation space to (module, width): a network of your own below the hidden layers, as
                the setting of this name gives by name.
        Raises:
            ValueError: unknown environment, unsupported spaces, settings that contradict each other, or a launcher
                that started several processes (WORLD_SIZE).
        """
        require_one_process("classic", "its networks are so small that dividing the work would cost more than it saves")
        self.run: Run = make_run(env, args or PPOArgs(), network)
        with torch_threads(self.args.num_threads):  # on which the last digits of the initial weights depend
            self.state: TrainState = initial_state(self.run)
        self._evaluation = EvaluationCopies()
        self._forgotten_state = ForgottenState()
        self._announced = False

    @property
    def args(self) -> PPOArgs:
        """The settings, every None filled in. Others may be assigned, and count from the next rollout on.

        Raises:
            ValueError: a new one contradicts others, or cannot change any more (see :mod:`classic.changed_settings`).
        """
        return self.run.args

    @args.setter
    def args(self, args: PPOArgs) -> None:
        args = resolve(args, self.run.task, single=isinstance(self.run.env, gymnasium.Env))
        self.run = change_args(self.run, self.state, args)

    def learn(
        self,
        total_timesteps: int | None = None,
        *,
        callbacks: Sequence[Callback] = (),
        on_step: StepHook | None = None,
        on_episode: EpisodeHook | None = None,
        at_end: Callback | None = None,
        resume_from_checkpoint: str | Path | None = None,
        resume_override: bool = False,
    ) -> PPO:
        """Train for ``total_timesteps`` more environment steps (default: the setting), rounded up to whole rollouts.

        Schedules run over exactly this call. With ``output_dir``, each update appends one line to ``metrics.jsonl`` and
        each episode one to ``episodes.jsonl``, and ``curve.png`` and ``report.html`` are made at the end; with
        ``save_every``, checkpoints are written there. The first SIGINT or SIGTERM ends training after the current
        update, with a checkpoint in ``output_dir``.

        Args:
            total_timesteps: environment steps; the same number as before in a run that resumes.
            callbacks: called after each update with the agent and its metrics (:mod:`classic.callbacks`).
            on_step: called with the agent and each step of all copies, as rewards, ends and infos; if it returns True,
                training ends with this rollout's update. ``agent.envs.set_attr`` changes the environments.
            on_episode: called likewise with each finished episode, a dict like a line of ``episodes.jsonl``.
            at_end: called likewise after the last update, while trackers still listen.
            resume_from_checkpoint: folder ``checkpoint-<n>`` of a run with the same settings, or that run's folder for
                its newest good one; "auto": the newest in ``output_dir``, if there is one. Only for a fresh agent.
            resume_override: resume although settings, total_timesteps or the environment have changed.
        Returns:
            The agent itself.
        Raises:
            BrokenEnvironmentError: the environment crashed or returned NaN; names environment, copy and step.
            NonFiniteGradientError, RatioTripwireError: training diverged; acting and training disagree.
            CheckpointError, FileNotFoundError: there is no good checkpoint to resume from.
            Interrupted: SIGINT or SIGTERM came.
        """
        args, total = self.args, steps_to_train(self.args, total_timesteps)
        callbacks = require_callbacks(callbacks, "agent, metrics")
        require_callbacks([] if on_step is None else [on_step], "agent, step")
        require_callbacks([] if on_episode is None else [on_episode], "agent, episode")
        hooks = PlayHooks(self, on_step, on_episode, args.episode_info)
        args.try_schedules()  # before the folder's last run is moved away
        with guarded(self.run) as folder:
            if not self._announced:
                self._announced = True
                announce(self.run)
            self.run = open_run(
                self.run, self.state, total, folder, resume=resume_from_checkpoint, override=resume_override
            )
            resumed = resume_from_checkpoint is not None and self.counters["iteration"] > 0
            with trackers(self.run):
                # What follows an update is not in its checkpoint, so it is repeated.
                stopped = resumed and hooks.called and self.state.stopped
                if not (resumed and run_callbacks(callbacks, self, self.last_metrics)) and not stopped:
                    with ProgressDisplay(self.env_id, total, quiet=args.quiet, panel=make_panel(args)) as display:
                        self._train(display, callbacks, hooks)
                if self.state.done < total and not args.quiet:
                    LOGGER.info("a callback ended training after %s of %s steps", f"{self.state.done:,}", f"{total:,}")
                if at_end is not None:
                    at_end(self, self.last_metrics)
                    stop_if_asked()
        if self.run.folder is not None:
            draw_curve(self.run.folder, self.env_id)
            report_run(self.run, self.state)
        return self

    def _train(self, display: ProgressDisplay, callbacks: Sequence[Callback], hooks: PlayHooks) -> None:
        """Run the algorithm, one rollout and update after another."""
        state = self.state
        state.follow_network()
        display.start(state.done)
        while state.done < state.progress.total:
            run = self.run
            if not state.playing:
                begin_episodes(run, state)
            follow_schedules(state, run.args)

            # 1. Play, recording observations, actions, log-probs and rewards.
            display.phase("collect")
            steps = filled(run.args.num_steps)
            rollout = collect(
                run.envs,
                state.network,
                steps,
                state.generator,
                state.memory,
                state.normalizer,
                sample=state.sample,
                on_step=hooks.begin(run.envs, state.counters, run.folder),
                sde_sample_freq=filled(run.args.sde_sample_freq),
            )
            state.memory = rollout.state_after

            # 2. Values, advantages and returns by compute_gae; the critic's units; whitened advantages.
            estimate = estimate_advantages(state.network, rollout, state.config, state.value_scale)
            if run.args.normalize_values:
                state.follow_returns(estimate, rollout.mask)
            experience = to_experience(rollout, estimate, state.config, state.value_scale)
            state.last_update = LastUpdate(rollout, estimate, state.config)

            # 3. Epochs of minibatches: ppo_loss, backward, clip, check finite, step.
            display.phase("update")
            learned = {**update(state, run, rollout, experience), **estimate_metrics(estimate, rollout.mask)}

            # 4. Controllers: the penalty's beta or the clip range.
            adapt(state, rollout, experience)

            # 5. Report.
            state.count(rollout)
            metrics = {**run_metrics(state.counters, state.recent), **learned}
            state.last_metrics = metrics
            self.log(metrics)
            hooks.write(run.folder)
            state.stopped = hooks.stop
            show_progress(display, min(state.done, state.progress.total), metrics)

            # 6. Save, and call back.
            save_if_due(run, state)
            stop_if_asked()
            with saving_if_interrupted(run, state):
                if run_callbacks(callbacks, self, metrics) or hooks.stop:
                    break
            if callbacks or hooks.called:  # they may change anything
                state.follow_network()

    def evaluate(
        self,
        episodes: int = 20,
        *,
        deterministic: bool = True,
        seed: int | None = None,
        env: EnvLike | None = None,
    ) -> dict[str, float]:
        """Play whole episodes on environments of its own (on training's, before training); training is not touched.

        Args:
            episodes: how many.
            deterministic: take the most likely action instead of a sampled one.
            seed: of the environments and the draws; default: the agent's, so that two calls agree. Episodes are never
                those of training.
            env: another environment with the same spaces, with the setting ``wrappers`` but not ``env_kwargs``.
        Returns:
            mean_return and std_return (undiscounted; population), mean_length in steps.
        Warns:
            UserWarning: episodes were cut (``eval_max_steps``); their return so far counts.
        """
        copies = self._evaluation.lend(self.run, self.state, episodes, env)
        with torch_threads(self.args.num_threads), copies as envs:
            return evaluate_policy(
                envs,
                self.network,
                episodes,
                deterministic=deterministic,
                seed=self.args.seed if seed is None else seed,
                view=self.state.normalizer.normalize,
                max_steps=max_episode_steps(self.run),
            )

    def predict(
        self,
        observation: Any,
        deterministic: bool = True,
        *,
        state: np.ndarray | None = None,
        episode_start: Any = False,
        action_masks: Any = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Choose an action.

        Args:
            observation: one, or a batch of N: an array, a list of observations, or for a Dict a dict of arrays.
            deterministic: take the most likely action instead of a sampled one.
            state: what the last call returned; None at the first, and if the policy is not recurrent.
            episode_start: bool or [N], True where an episode begins and the recurrent state is reset.
            action_masks: [options] or [N, options], True for allowed options; None: what the observation's part
                action_mask allows, or all without one.
        Returns:
            (action, state): what ``env.step`` takes, or N of them, and the recurrent state [N, K] or None.
        Raises:
            ValueError: the observation has another shape or is non-finite, or the state or the masks do not fit.
        """
        if self.network.recurrent:
            self._forgotten_state.notice(state is None and not np.any(episode_start), self.args.recurrent)
        generator = None if deterministic else self.state.predict_generator
        given = observation, state, episode_start, action_masks
        return predict(self.envs, self.network, self.normalizer.normalize, generator, *given)

    def explain(self, rollout: Rollout | None = None) -> Explanation:
        """Explain step by step what a rollout earned and taught, and what the current policy makes of it.

        Args:
            rollout: default: the one that the last update learned from, with the values and advantages it used; another
                one is estimated by the current critic.
        Returns:
            One row per decision: ``.text()``, ``.to_dataframe()``, ``.plot(path)``.
        Raises:
            ValueError: nothing was given, and there was no update yet.
        """
        if rollout is not None:
            estimate = estimate_advantages(self.network, rollout, self.config, self.state.value_scale)
            return explain_rollout(self.network, rollout, estimate, self.config)
        if self.last_update is None:
            raise ValueError("there was no update yet to explain: call learn() first, or give a rollout")
        return explain_rollout(self.network, *self.last_update)

    def save(self, folder: str | Path) -> Path:
        """Write networks, optimizer and settings (safetensors and JSON, no pickle); return the folder."""
        return save_agent(folder, self.run, self.state)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        env: EnvLike | None = None,
        *,
        network: NetworkFactory | str | None = None,
        **changes: Any,
    ) -> PPO:
        """Load the agent in a folder written by :meth:`save`, one that you trust.

        Its tensors and settings run no code, but code that its settings name is run: an environment or a wrapper as
        ``module:name`` now, a function as schedule when training goes on.

        Args:
            folder: the agent's.
            env: the environment, needed if the agent was not made from an id.
            network: the function that made the agent's own network, or its name, which is never taken from the folder.
            **changes: settings that differ from the saved ones, such as learning_rate=1e-4; they count as if the agent
                had been made with them.
        Raises:
            FileNotFoundError: no agent there.
            ValueError: the environment or the settings do not fit what was saved.
            TypeError: a change names no setting.
        """
        saved = read_agent(folder, env_given=env is not None, network=network)
        args = on_this_machine(with_changes(saved.args, changes, where=str(saved.folder)))
        # Using an agent needs no tracker; where training continues, a missing one is a warning.
        given = None if isinstance(network, str) else network
        agent = cls(saved.env_id if env is None else env, replace(args, report_to=()), network=given)
        agent.args = replace(agent.args, report_to=args.report_to)
        agent.run = replace(agent.run, origin=f"settings as saved in {saved.folder}")
        restore_agent(saved, agent.run, agent.state)
        return agent

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append a line to ``metrics.jsonl`` that belongs to the last update; nothing without ``output_dir``."""
        if self.run.folder is not None:
            self.run.folder.log({"progress/iteration": self.counters["iteration"], **metrics})

    def close(self) -> None:
        """Release the environments."""
        self.run.envs.close()
        self._evaluation.close()
