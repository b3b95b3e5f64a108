"""Keep a call of learn safe: open or resume its run, hold lock, threads and signals, save when due or interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from classic.checkpoint import load_checkpoint, save_checkpoint
from classic.config import PPOArgs, filled
from classic.envs.checks import warn_before_training
from classic.state import Progress, Run, TrainState
from rlhf_ppo.runtime.checkpoints.checkpoint import checkpoint_folder
from rlhf_ppo.runtime.checkpoints.resume import find_checkpoint
from rlhf_ppo.runtime.logs.lines import LOGGER
from rlhf_ppo.runtime.logs.run_directory import RunDirectory, run_lock
from rlhf_ppo.runtime.logs.trackers import reporting
from rlhf_ppo.runtime.machine.signals import Interrupted, asked_to_stop, stop_on_signals
from rlhf_ppo.runtime.machine.threads import torch_threads
from rlhf_ppo.runtime.package import versions


def steps_to_train(args: PPOArgs, total_timesteps: float | None) -> int:
    """Return the number of environment steps that a call of learn trains for.

    Raises:
        ValueError: no whole number, or less than 1.
    """
    total = filled(args.total_timesteps) if total_timesteps is None else total_timesteps
    if not total >= 1 or total % 1:  # NaN, too
        raise ValueError(f"total_timesteps must be a whole number, 1 or more, got {total}")
    return int(total)


def announce(run: Run) -> None:
    """Say whose settings these are, and warn of what does not fit the environment."""
    warn_before_training(run.envs, run.args)
    if not run.args.quiet:
        LOGGER.info("%s: %s", run.env_id, run.origin)


@contextmanager
def guarded(run: Run) -> Iterator[RunDirectory | None]:
    """Hold the run's threads, signal handlers and the lock of its folder; yield the folder, if it has one."""
    args = run.args
    folder = None if args.output_dir is None else RunDirectory(args.output_dir, quiet=args.quiet)
    run.envs.record_episodes(folder is not None)
    lock = nullcontext() if folder is None else run_lock(folder.path)
    with torch_threads(args.num_threads), lock, stop_on_signals():
        yield folder


def trackers(run: Run) -> AbstractContextManager[None]:
    """Send the run's metrics to its trackers (``report_to``), too."""
    if run.folder is None:
        return nullcontext()
    settings = {"env_id": run.env_id, **asdict(run.args)}
    return reporting(run.folder, run.args.report_to, project="classic-ppo", settings=settings)


def open_run(
    run: Run,
    state: TrainState,
    total: int,
    folder: RunDirectory | None,
    *,
    resume: str | Path | None = None,
    override: bool = False,
) -> Run:
    """Begin a call of learn: afresh, where the last call ended, or from a checkpoint.

    Args:
        run: the run so far; with the folder of the last call, if there was one.
        state: its progress is set, and everything else if a checkpoint is loaded.
        total: environment steps of the call.
        folder: where it writes; None: nowhere.
        resume: a checkpoint, a run's folder, or "auto" (see :meth:`classic.PPO.learn`).
        override: resume although settings or the environment differ.
    Returns:
        The run with its folder.
    """
    checkpoint = None if resume is None else find_checkpoint(resume, run.args.output_dir)
    state.progress = Progress(total, state.counters["env_steps"])
    if checkpoint is not None:
        if state.playing:
            raise ValueError("resume_from_checkpoint is for a fresh agent, but this one has learned already: make one")
        load_checkpoint(run, state, checkpoint, total, override=override)
    if folder is None:
        return replace(run, folder=None)
    settings = {
        "env_id": run.env_id,
        "versions": versions("torch", "gymnasium"),
        "origin": run.origin,
        # This call's total, which may differ from the setting.
        "args": {**asdict(run.args), "total_timesteps": state.progress.first_step + total},
    }
    if run.folder is not None and run.folder.path == folder.path:
        folder.write_json("run.json", settings)
        return run
    if checkpoint is not None:
        folder.continue_from(checkpoint.folder, state.counters["iteration"], settings)
    else:
        if resume is not None and not run.args.quiet:
            LOGGER.info("no checkpoint in %s: training starts afresh", folder.path)
        folder.start(settings)
    return replace(run, folder=folder)


def save_if_due(run: Run, state: TrainState) -> None:
    """Save a checkpoint every ``save_every`` rollouts, and when a signal has come."""
    every = run.args.save_every
    due = bool(every) and state.counters["iteration"] % every == 0
    if run.folder is not None and (due or asked_to_stop()):
        save_checkpoint(run, state, run.folder)


@contextmanager
def saving_if_interrupted(run: Run, state: TrainState) -> Iterator[None]:
    """Save a checkpoint if a signal stops the block, callbacks mostly; the resumed run calls them again."""
    try:
        yield
    except Interrupted:
        if run.folder is not None and not checkpoint_folder(run.folder.path, state.counters["iteration"]).exists():
            save_checkpoint(run, state, run.folder)
        raise
