"""PPO for control tasks: the loop (collect, estimate, update, report) and the agent around it."""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import gymnasium
import numpy as np
import torch

from classic import save as saving
from classic.callbacks import Callback, run_callbacks
from classic.changes import OF_COPIES, OF_WEIGHTS, differing, still_moved
from classic.checkpoint import Progress, load_checkpoint, save_checkpoint
from classic.config import PPOArgs
from classic.envs.checks import warn_before_training
from classic.envs.environments import Environments, Episode
from classic.envs.make_env import EnvLike, env_name, identify
from classic.envs.normalization import Normalizer
from classic.envs.seeds import derive_seeds
from classic.evaluation import MAX_COPIES, MAX_STEPS, evaluate_policy
from classic.explain import explain_rollout
from classic.fast.switch import choose
from classic.gradient_step import trained_parameters
from classic.networks.actor_critic import ActorCritic
from classic.prediction import predict
from classic.presets.resolve import preset_ids
from classic.report import draw_curve, run_metrics, show_progress
from classic.rollout import Estimate, Rollout, collect, estimate_advantages
from classic.save import in_force
from classic.update import update
from rlhf_ppo.core import PPOConfig
from rlhf_ppo.runtime.checkpoint import checkpoint_folder
from rlhf_ppo.runtime.explain import Explanation
from rlhf_ppo.runtime.package import versions
from rlhf_ppo.runtime.processes import require_one_process, torch_threads
from rlhf_ppo.runtime.progress import ProgressDisplay
from rlhf_ppo.runtime.resume import find_checkpoint
from rlhf_ppo.runtime.run_directory import RunDirectory, run_lock
from rlhf_ppo.runtime.signals import Interrupted, asked_to_stop, stop_if_asked, stop_on_signals
from rlhf_ppo.runtime.trackers import reporting, require_installed
from rlhf_ppo.runtime.unknown_names import refuse_unknown_arguments
from rlhf_ppo.runtime.user_code import require_callbacks

MAX_FORGETFUL = 3
"""Predictions in a row without a state before a warning: single ones are the beginnings of episodes."""


class LastUpdate(NamedTuple):
    """What the last update learned from."""

    rollout: Rollout
    estimate: Estimate
    config: PPOConfig
    """The core's settings as they were in force."""


class PPO:
    """Proximal policy optimisation on a Gymnasium environment.

    Example::

        agent = classic.PPO("CartPole-v1", classic.PPOArgs(seed=1))
        agent.learn()
        agent.evaluate(episodes=20)["mean_return"]
    """

    def __new__(cls, *args: Any, **arguments: Any) -> Self:
        """Say where a setting goes, where Python would only say that the argument is unknown."""
        fields = {name: f"it is a setting: PPO(env, PPOArgs({name}=...))" for name in PPOArgs.__dataclass_fields__}
        refuse_unknown_arguments(cls.__init__, "PPO", arguments, {**PPOArgs.ELSEWHERE, **fields})
        return super().__new__(cls)

    def __init__(self, env: EnvLike, args: PPOArgs | None = None) -> None:
        """Make the environments and fresh networks.

        Args:
            env: a registered id (or ``module:id``), a function that makes an environment, or one environment, which is
                then the only copy: evaluation and videos play on it too, and training begins a new episode afterwards.
            args: settings; None: the environment's preset.
        Raises:
            ValueError: unknown environment, unsupported spaces, settings that contradict each other, or a launcher's
                promise of several processes (WORLD_SIZE).
        """
        require_one_process()
        self.env, self.env_id = env, env_name(env)
        args = args or PPOArgs()
        self.task, copies_of = identify(env, in_this_process=args.vectorization != "async")
        """The registered id that the preset is looked up by; None: the environment is not registered."""
        self._args = self._resolved(args)
        require_installed(self.args.report_to)
        self.config: PPOConfig = self.args.ppo_config()
        self.envs = self._make_envs(copies_of, self._setting("num_envs"))
        try:
            self._require_fit(self.args)
        except ValueError:
            self.envs.close()
            raise
        # Own generators: a run neither disturbs nor depends on torch's global one.
        self.generator = torch.Generator().manual_seed(self.args.seed)
        self.predict_generator = torch.Generator().manual_seed(derive_seeds(self.args.seed, "prediction", 1)[0])
        self.network = ActorCritic(
            self.envs.observation_shape,
            self.envs.actions,
            hidden_sizes=self._setting("hidden_sizes"),
            generator=self.generator,
            activation=self._setting("activation"),
            shared=self._setting("shared_network"),
            recurrent=self._setting("recurrent"),
            recurrent_size=self._setting("recurrent_size"),
            squash=self._setting("squash"),
            log_std_init=self._setting("log_std_init"),
            state_dependent_std=self._setting("state_dependent_std"),
        )
        self.follow_network(afresh=True)
        self.best_return: float | None = None
        self.last_metrics: Mapping[str, float] = {}
        self.last_update: LastUpdate | None = None
        self.counters = {"iteration": 0, "env_steps": 0, "optimizer_steps": 0, "episodes": 0}
        self.recent: deque[Episode] = deque(maxlen=100)
        self._run: RunDirectory | None = None
        self.normalizer = Normalizer(
            self.envs.observation_shape if self.args.normalize_observations else None,
            self.envs.num_envs if self.args.normalize_rewards else None,
            self.config.gamma,
        )
        self.memory = self.network.initial_state(self.envs.num_envs)
        self._started = False
        self._evaluation_envs: Environments | None = None
        self._warned = False
        self._forgetful = 0
        has_preset = self.task in preset_ids()
        self.origin = f"preset of {self.task}" if has_preset else "no preset for this environment: general defaults"
        """Where settings that were not given come from."""
        self._said_origin = False

    @property
    def args(self) -> PPOArgs:
        """The settings, every None filled in. Others may be assigned, and count from the next rollout on.

        Raises:
            ValueError: a new one contradicts others, or cannot change any more (see :mod:`classic.changes`).
        """
        return self._args

    @args.setter
    def args(self, args: PPOArgs) -> None:
        args = self._resolved(args)
        if fixed := differing(self.args, args, (*OF_WEIGHTS, *OF_COPIES)):
            raise ValueError(
                f"the agent was made with {', '.join(f'{name}={getattr(self.args, name)!r}' for name in fixed)}, which "
                f"cannot change any more: make a new one; what its weights do not depend on ({', '.join(OF_COPIES)}) "
                "can change where a saved one is loaded, as PPO.load(folder, num_envs=2)"
            )
        self._require_fit(args)
        moved = still_moved(vars(self.args), vars(args), in_force(self))
        self._args, self.config = args, replace(args.ppo_config(), **moved)
        self.normalizer.gamma = self.config.gamma

    def follow_network(self, *, afresh: bool = False) -> None:
        """Train the network as it is now: parts may have been replaced, frozen, loaded or copied since.

        Adam goes on where names and shapes of the trained parameters are what they were; otherwise, or ``afresh``, it
        starts anew.

        Raises:
            ValueError: nothing is left to train, or a parameter is not in float32 on the CPU.
        """
        formats = {f"{p.dtype} on {p.device}" for p in self.network.parameters()}
        if formats - {"torch.float32 on cpu"}:
            raise ValueError(
                f"the network's parameters are {' and '.join(sorted(formats))}, but classic computes in float32 on the "
                "CPU: agent.network.float().cpu()"
            )
        if not trained_parameters(self.network):
            raise ValueError("every parameter of the network is frozen (requires_grad False): nothing is left to train")
        self.sample, self.gradients, self.optimizer = choose(
            self.network,
            self.config,
            batch=self.envs.num_envs,
            learning_rate=self._setting("learning_rate"),
            optimizer=None if afresh else self.optimizer,
        )

    def learn(
        self,
        total_timesteps: int | None = None,
        *,
        callbacks: Sequence[Callback] = (),
        at_end: Callback | None = None,
        resume_from_checkpoint: str | Path | None = None,
        resume_override: bool = False,
    ) -> PPO:
        """Train for ``total_timesteps`` more environment steps (default: the setting), rounded up to whole rollouts.

        Schedules span exactly this call. With ``output_dir``, each update appends one line to ``metrics.jsonl``, and
        ``curve.png`` is drawn at the end; with ``save_every``, checkpoints are written there. The first SIGINT or
        SIGTERM ends training after the update it came in, once a checkpoint lies in ``output_dir``.

        Args:
            total_timesteps: environment steps; a run that is resumed must be asked for as many as before.
            callbacks: called after each update with the agent and its metrics (:mod:`classic.callbacks`).
            at_end: called likewise after the last one, when trackers still listen.
            resume_from_checkpoint: folder ``checkpoint-<n>`` of a run with the same settings, or that run's folder for
                its newest good one; or "auto": the newest good one in ``output_dir``, and a fresh start if there is
                none. For a fresh agent alone.
            resume_override: resume although settings, total_timesteps or the environment have changed.
        Returns:
            The agent itself.
        Raises:
            BrokenEnvironmentError: the environment crashed or returned NaN; names environment, copy and step.
            NonFiniteGradientError: training diverged.
            RatioTripwireError: acting and training disagree about the policy.
            CheckpointError, FileNotFoundError: there is nothing good to resume from.
            Interrupted: SIGINT or SIGTERM came.
        """
        total = self._setting("total_timesteps") if total_timesteps is None else total_timesteps
        if not total >= 1 or total % 1:  # NaN, too
            raise ValueError(f"total_timesteps must be a whole number, 1 or more, got {total}")
        total = int(total)
        callbacks = require_callbacks(callbacks, "agent, metrics")
        folder = self.args.output_dir
        run = None if folder is None else RunDirectory(folder, quiet=self.args.quiet)
        display = ProgressDisplay(self.env_id, total, quiet=self.args.quiet)
        lock = nullcontext() if folder is None else run_lock(folder)
        self.envs.record_episodes(run is not None)
        with torch_threads(self.args.num_threads), lock, stop_on_signals():
            progress = self._begin(run, total, resume_from_checkpoint, override=resume_override)
            self._say_origin()
            resumed = resume_from_checkpoint is not None and self.counters["iteration"] > 0
            with self._trackers():
                # What follows an update is not in its checkpoint, so it is made again.
                if not (resumed and run_callbacks(callbacks, self, self.last_metrics)):
                    with display:
                        self._train(progress, display, callbacks)
                done = self.counters["env_steps"] - progress.first_step
                if done < total and not self.args.quiet:
                    print(f"a callback ended training after {done:,} of {total:,} steps")
                if at_end is not None:
                    at_end(self, self.last_metrics)
                    stop_if_asked()
        if self._run is not None:
            draw_curve(self._run, self.env_id)
        return self

    def _begin(self, run: RunDirectory | None, total: int, resume: str | Path | None, *, override: bool) -> Progress:
        """Where training starts: afresh, where the last call ended, or where a checkpoint was."""
        if not self._warned:
            self._warned = True
            warn_before_training(self.envs, self.args)
        checkpoint = None if resume is None else find_checkpoint(resume, self.args.output_dir)
        progress = Progress(total, self.counters["env_steps"])
        if checkpoint is not None:
            if self._started:
                raise ValueError(
                    "resume_from_checkpoint is for a fresh agent, but this one has learned already: make one"
                )
            progress = load_checkpoint(self, checkpoint, total, override=override)
            self._started = True
        asked = {"total_timesteps": progress.first_step + total}  # by this call, whatever the setting says
        args = {**asdict(self.args), **asked}
        settings = {
            "env_id": self.env_id,
            "versions": versions("torch", "gymnasium"),
            "origin": self.origin,
            "args": args,
        }
        if run is None:
            self._run = None
        elif self._run is not None and self._run.path == run.path:
            run.write_json("run.json", settings)
        else:
            self._run = run
            if checkpoint is None:
                if resume is not None and not self.args.quiet:
                    print(f"no checkpoint in {run.path}: training starts afresh")
                run.start(settings)
            else:
                run.go_on(checkpoint.folder, self.counters["iteration"], settings)
        return progress

    def begin_episodes(self) -> None:
        """Reset every copy: at the start, after evaluation on a single one, where a checkpoint has no episodes."""
        self.envs.reset(self.args.seed, begun=self.counters["env_steps"])
        self.memory = self.network.initial_state(self.envs.num_envs)
        self.normalizer.begin_episodes()
        self._started = True

    def end_episodes(self) -> None:
        """Training begins new episodes next time: something else has played on its environments."""
        self._started = False

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append a line to ``metrics.jsonl`` that belongs to the last update; nothing without ``output_dir``."""
        if self._run is not None:
            self._run.log({"progress/iteration": self.counters["iteration"], **metrics})

    def _train(self, progress: Progress, display: ProgressDisplay, callbacks: Sequence[Callback]) -> None:
        """The algorithm."""
        args, counters, total = self.args, self.counters, progress.total
        display.start(counters["env_steps"] - progress.first_step)
        self.follow_network()
        while (done := counters["env_steps"] - progress.first_step) < total:
            if not self._started:
                self.begin_episodes()
            learning_rate = self._setting("learning_rate") * (1 - done / total if args.lr_schedule == "linear" else 1)
            self.optimizer.lr = learning_rate
            self.config = args.scheduled(self.config, done / total)

            # 1. Collect.
            display.phase("collect")
            rollout = collect(
                self.envs,
                self.network,
                self._setting("num_steps"),
                self.generator,
                self.memory,
                self.normalizer,
                sample=self.sample,
            )
            self.memory, mask = rollout.state_after, rollout.mask

            # 2. Estimate.
            estimate = estimate_advantages(self.network, rollout, self.config)
            self.last_update = LastUpdate(rollout, estimate, self.config)

            # 3. Update.
            display.phase("update")
            learned = update(self, rollout, estimate, progress)

            # 4. Report.
            counters["iteration"] += 1
            counters["env_steps"] += int(mask.sum())
            counters["episodes"] += len(rollout.episodes)
            self.recent.extend(rollout.episodes)
            metrics = {**run_metrics(counters, self.recent), **learned}
            self.last_metrics = metrics
            self.log(metrics)
            show_progress(display, min(counters["env_steps"] - progress.first_step, total), metrics)

            # 5. Save, and whatever else is wanted after an update.
            interrupted = asked_to_stop()
            if self._run is not None and (
                interrupted or (args.save_every and counters["iteration"] % args.save_every == 0)
            ):
                save_checkpoint(self, self._run, progress)
            stop_if_asked()
            try:
                if run_callbacks(callbacks, self, metrics):
                    break
            except Interrupted:  # in an evaluation, mostly; resumed, the run calls them again
                if self._run is not None and not checkpoint_folder(self._run.path, counters["iteration"]).exists():
                    save_checkpoint(self, self._run, progress)
                raise
            if callbacks:  # which may change anything
                args = self.args
                self.follow_network()

    def evaluate(self, episodes: int = 20, *, deterministic: bool = True, seed: int | None = None) -> dict[str, float]:
        """Play whole episodes on environments of its own, which it keeps; training is not touched.

        Before training begins it plays on training's copies where these are as many as it needs.

        Args:
            episodes: how many.
            deterministic: take the most likely action instead of a sampled one.
            seed: of the environments and the draws; default: the agent's, so that two calls agree. Episodes are never
                those of training.
        Returns:
            mean_return and std_return (undiscounted; population), mean_length in steps.
        Warns:
            UserWarning: episodes were cut (``eval_max_steps``); what they had brought by then counts.
        """
        seed = self.args.seed if seed is None else seed
        if episodes < 1:
            raise ValueError(f"episodes must be 1 or more, got {episodes}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        with torch_threads(self.args.num_threads), self._copies_to_evaluate(episodes) as envs:
            return evaluate_policy(
                envs,
                self.network,
                episodes,
                deterministic=deterministic,
                seed=seed,
                view=self.normalizer.normalize,
                max_steps=self.max_episode_steps(),
            )

    @contextmanager
    def _copies_to_evaluate(self, episodes: int) -> Iterator[Environments]:
        wanted = min(episodes, self.args.eval_envs or min(self.envs.num_envs, MAX_COPIES))
        if isinstance(self.env, gymnasium.Env) or (not self._started and wanted == self.envs.num_envs):
            try:
                yield self.envs
            finally:
                self.end_episodes()
            return
        # Another number of copies would play other episodes.
        if self._evaluation_envs is not None and self._evaluation_envs.num_envs != wanted:
            self._close_evaluation()
        self._evaluation_envs = envs = self._evaluation_envs or self._make_envs(self.env, wanted)
        try:
            yield envs
        except BaseException:
            self._close_evaluation()
            raise

    def max_episode_steps(self) -> int:
        """Steps after which an episode of an evaluation or a video is cut."""
        return self.args.eval_max_steps or max(MAX_STEPS, self.envs.time_limit() or 0)

    def close(self) -> None:
        """Release the environments."""
        self.envs.close()
        self._close_evaluation()

    def _close_evaluation(self) -> None:
        if self._evaluation_envs is not None:
            self._evaluation_envs.close()
        self._evaluation_envs = None

    def explain(self, rollout: Rollout | None = None) -> Explanation:
        """Step by step, what a rollout earned and taught, beside what the policy as it is now makes of it.

        Args:
            rollout: default: the one that the last update learned from, with the values and advantages it took; another
                one is estimated by the critic as it is now.
        Returns:
            One row a decision: ``.text()``, ``.to_dataframe()``, ``.plot(path)``.
        Raises:
            ValueError: nothing was given, and there was no update yet.
        """
        if rollout is not None:
            return explain_rollout(self, rollout, estimate_advantages(self.network, rollout, self.config), self.config)
        if self.last_update is None:
            raise ValueError("there was no update yet to explain: call learn() first, or give a rollout")
        return explain_rollout(self, *self.last_update)

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
            observation: one, or a batch of N.
            deterministic: take the most likely action instead of a sampled one.
            state: what the last call returned; None at the first, and without a memory.
            episode_start: bool or [N], True where an episode begins and the memory is to be cleared.
            action_masks: [options] or [N, options], True where an option is allowed; None: what the observation's part
                action_mask allows, or all without one.
        Returns:
            (action, state): what ``env.step`` takes, or N of them, and the memory's state [N, K], or None without one.
        Raises:
            ValueError: the observation has another shape or is not finite, or the state or the masks do not fit.
        """
        self._notice_forgotten_state(state, episode_start)
        return predict(
            self.envs,
            self.network,
            observation,
            None if deterministic else self.predict_generator,
            view=self.normalizer.normalize,
            state=state,
            episode_start=episode_start,
            action_masks=action_masks,
        )

    def _notice_forgotten_state(self, state: np.ndarray | None, episode_start: Any) -> None:
        """Warn once where a loop leaves out the state that the last call returned, which clears the memory."""
        if not self.network.recurrent or self._forgetful == MAX_FORGETFUL:
            return
        self._forgetful = self._forgetful + 1 if state is None and not np.any(episode_start) else 0
        if self._forgetful == MAX_FORGETFUL:
            warnings.warn(
                f"predict was called {MAX_FORGETFUL} times in a row without a state, so the memory "
                f"(recurrent={self.args.recurrent!r}) was cleared each time: inside an episode give back what the last "
                "call returned, action, state = agent.predict(observation, state=state)",
                stacklevel=3,
            )

    def save(self, folder: str | Path) -> Path:
        """Write networks, optimizer and settings (safetensors and JSON, no pickle); returns the folder."""
        return saving.save(self, folder)

    @classmethod
    def load(cls, folder: str | Path, env: EnvLike | None = None, **changes: Any) -> PPO:
        """The agent in a folder written by :meth:`save`.

        Args:
            folder: where it lies.
            env: the environment, needed where the agent was not made from an id.
            **changes: settings that are to differ from the saved ones, such as learning_rate=1e-4; they count as if the
                agent had been made with them.
        Raises:
            FileNotFoundError: no agent there.
            ValueError: the environment or the settings do not fit what was saved.
            TypeError: a change names no setting.
        """
        return saving.load(cls, folder, env, changes)

    def _resolved(self, args: PPOArgs) -> PPOArgs:
        return args.resolve(self.task, single=isinstance(self.env, gymnasium.Env))

    def _require_fit(self, args: PPOArgs) -> None:
        args.require_full_minibatches(next_step_autoreset=self.envs.next_step_autoreset)
        args.require_fit(self.envs.actions, self.envs.observation_shape, self.env_id)

    def _say_origin(self) -> None:
        """One line, once, so that nobody wonders whose settings these are."""
        if not self.args.quiet and not self._said_origin:
            print(f"{self.env_id}: {self.origin}", file=sys.stderr, flush=True)
        self._said_origin = True

    def _make_envs(self, env: EnvLike, num_envs: int) -> Environments:
        args = self.args
        return Environments(
            env,
            num_envs,
            args.autoreset_mode,
            vectorization=args.vectorization,
            env_kwargs=args.env_kwargs,
            wrappers=args.wrappers,
            action_masks=args.action_masks,
            squash=self._setting("squash"),
        )

    def _trackers(self) -> AbstractContextManager[None]:
        if self._run is None:
            return nullcontext()
        settings = {"env_id": self.env_id, **asdict(self.args)}
        return reporting(self._run, self.args.report_to, project="classic-ppo", settings=settings)

    def _setting(self, name: str) -> Any:
        value = getattr(self.args, name)
        assert value is not None, f"{name} is unresolved"
        return value
