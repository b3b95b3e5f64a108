"""Search for settings with Optuna: trials train and evaluate, unpromising ones stop early; the best become a file."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from classic.config import PPOArgs, filled
from classic.ppo import PPO
from rlhf_ppo.runtime.errors import NonFiniteGradientError, RatioTripwireError

INSTALL = "pip install 'rlhf-ppo[optuna]'"
STUDY, BEST = "study.db", "best.yaml"
"""Files in the search's folder: all trials (SQLite), and the best settings."""

Space = Callable[[Any, PPOArgs], Any]
"""A function of the trial and the resolved settings."""

SPACES: dict[str, Space] = {
    "learning_rate": lambda trial, _: trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True),
    # Powers of ten matter for the distance to 1.
    "gamma": lambda trial, _: 1 - trial.suggest_float("1 - gamma", 1e-4, 0.2, log=True),
    "gae_lambda": lambda trial, _: 1 - trial.suggest_float("1 - gae_lambda", 5e-3, 0.3, log=True),
    "ent_coef": lambda trial, _: trial.suggest_float("ent_coef", 1e-6, 0.1, log=True),
    "clip_range": lambda trial, _: trial.suggest_categorical("clip_range", [0.1, 0.2, 0.3, 0.4]),
    "num_epochs": lambda trial, _: trial.suggest_categorical("num_epochs", [1, 3, 5, 10, 20]),
    "num_steps": lambda trial, args: 2 ** trial.suggest_int("log2 num_steps", *_num_steps(args)),
    "num_minibatches": lambda trial, _: 2 ** trial.suggest_int("log2 num_minibatches", 0, 6),
    "vf_coef": lambda trial, _: trial.suggest_float("vf_coef", 0.1, 2.0, log=True),
    "max_grad_norm": lambda trial, _: trial.suggest_categorical("max_grad_norm", [0.3, 0.5, 1.0, 2.0, 5.0]),
    "lr_schedule": lambda trial, _: trial.suggest_categorical("lr_schedule", ["constant", "linear"]),
    "activation": lambda trial, _: trial.suggest_categorical("activation", ["tanh", "relu"]),
    "hidden_sizes": lambda trial, _: (2 ** trial.suggest_int("log2 width", 4, 8),) * trial.suggest_int("layers", 1, 3),
    "log_std_init": lambda trial, _: trial.suggest_float("log_std_init", -3.0, 0.5),
    "normalize_observations": lambda trial, _: trial.suggest_categorical("normalize_observations", [False, True]),
    "normalize_rewards": lambda trial, _: trial.suggest_categorical("normalize_rewards", [False, True]),
}
"""Setting -> how a trial chooses it."""


def _num_steps(args: PPOArgs) -> tuple[int, int]:
    """Return the exponents of the least and the most steps of a copy in a rollout, of which a run should have four."""
    most = int(np.log2(max(2, filled(args.total_timesteps) / (4 * filled(args.num_envs)))))
    return min(4, most), min(11, most)


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a search varies and how it judges."""

    env: str
    args: PPOArgs
    """Settings of every trial but for those searched."""
    names: tuple[str, ...]
    """The settings searched."""
    trials: int
    """Trials of the whole search, those of earlier calls included."""
    seeds: int
    """Runs of each trial, whose returns are averaged."""
    evaluations: int
    """Evaluations of each run; after each but the last a trial may be stopped."""
    episodes: int
    """Episodes of each evaluation."""
    folder: Path

    def key(self) -> str:
        """Return what must be the same for trials to be comparable."""
        free = ("output_dir", "quiet", "num_threads", "device")
        args = {name: value for name, value in vars(self.args).items() if name not in free}
        return json.dumps([self.env, args, sorted(self.names), self.seeds, self.evaluations, self.episodes])


@dataclass(frozen=True)
class Trial:
    """A finished trial."""

    number: int
    value: float | None
    """Mean return of the last evaluation, over the seeds; None: stopped early, or its training diverged."""
    settings: dict[str, Any]
    """The settings it chose; {} for the first, which takes them as they are."""


class _Lowest:
    """Stands in for a trial: chooses each setting's lowest or first value."""

    number = 0

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return low

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return low

    def suggest_categorical(self, name: str, options: Sequence[Any]) -> Any:
        return options[0]


def require_searchable(names: Sequence[str]) -> None:
    """Raise a ValueError unless all settings can be searched."""
    if not names:
        raise ValueError(f"search is empty, so every trial would be the same: name settings of {', '.join(SPACES)}")
    for name in names:
        if name not in SPACES:
            close = difflib.get_close_matches(name, SPACES, n=1)
            raise ValueError(
                f"search={name!r} cannot be searched"
                + (f"; did you mean {close[0]!r}?" if close else f"; these can: {', '.join(SPACES)}")
            )


def tune(search: Search, show: Callable[[str], None] = print) -> list[Trial]:
    """Run the trials that are missing, and write the best settings to ``best.yaml``.

    The first trial takes the settings as they are (the preset), so the best is never worse than these as measured.
    Trials are kept in the folder: the same search continues there, and only a trial that was under way is lost.

    Args:
        search: what and how.
        show: gets a line for each trial.
    Returns:
        The finished trials, the best first.
    Raises:
        ModuleNotFoundError: Optuna is missing.
        ValueError: unknown settings, or the folder holds another search.
    """
    require_searchable(search.names)
    try:
        import optuna  # pyright: ignore[reportMissingImports] (an extra)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"tune needs Optuna ({error}): {INSTALL}") from None
    first = PPO(search.env, search.args)  # what is wrong with the settings is said before a folder is made
    resolved = first.args
    first.close()
    for name in search.names:  # a setting that does not fit the others is found before anything is trained
        PPO(search.env, _settings(search, {name: SPACES[name](_Lowest(), resolved)}, search.args.seed)).close()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    search.folder.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///{search.folder / STUDY}"
    study = optuna.create_study(storage=storage, study_name="ppo", direction="maximize", load_if_exists=True)
    if study.user_attrs.get("search", search.key()) != search.key():
        raise ValueError(
            f"{search.folder} holds a search with other settings than these, whose trials cannot be compared: name "
            "another output_dir, or give that search's settings"
        )
    study.set_user_attr("search", search.key())
    study.sampler = optuna.samplers.TPESampler(seed=search.args.seed + len(study.trials))
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=5)
    finished = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)

    def objective(trial: Any) -> float:
        # The settings as they are come first, again if that trial was interrupted.
        known = study.get_trials(deepcopy=False, states=finished)
        measured = any(trial.user_attrs["settings"] == {} for trial in known)
        chosen = {name: SPACES[name](trial, resolved) for name in search.names} if measured else {}
        trial.set_user_attr("settings", chosen)
        try:
            return _score(search, chosen, trial)
        except (NonFiniteGradientError, RatioTripwireError) as error:
            show(f"trial {trial.number}: training diverged: {error}")
            raise optuna.TrialPruned from error

    while (done := len(study.get_trials(deepcopy=False, states=finished))) < search.trials:
        study.optimize(objective, n_trials=1)
        last = _finished(study.trials[-1])
        said = "stopped early" if last.value is None else f"return {last.value:.1f}"
        show(f"trial {last.number} ({done + 1} of {search.trials}): {said}; {describe(last.settings)}")
    trials = [_finished(trial) for trial in study.get_trials(states=finished)]
    trials.sort(key=lambda trial: -np.inf if trial.value is None else trial.value, reverse=True)
    if trials[0].value is not None:
        _write_best(search, trials[0])
    return trials


def _finished(trial: Any) -> Trial:
    # Optuna gives a trial that was stopped the value of its last report.
    return Trial(trial.number, trial.value if trial.state.name == "COMPLETE" else None, trial.user_attrs["settings"])


def _score(search: Search, chosen: Mapping[str, Any], trial: Any) -> float:
    """Train and evaluate each seed; return the mean return. The first seed's evaluations decide whether to stop."""
    import optuna  # pyright: ignore[reportMissingImports]

    values = []
    for seed in range(search.args.seed, search.args.seed + search.seeds):
        agent = PPO(search.env, _settings(search, chosen, seed))
        total = filled(agent.args.total_timesteps)
        every = max(1, total // search.evaluations)

        def judge(agent: PPO, metrics: Mapping[str, float], every: int = every, total: int = total) -> None:
            done = agent.counters["env_steps"]
            reached, before = done // every, (done - agent.counters["rollout_steps"]) // every
            if reached == before or done >= total or values:
                return
            trial.report(agent.evaluate(search.episodes)["mean_return"], reached)
            if chosen and trial.should_prune():
                raise optuna.TrialPruned

        try:
            values.append(agent.learn(callbacks=[judge]).evaluate(search.episodes)["mean_return"])
        finally:
            agent.close()
    return float(np.mean(values))


def _settings(search: Search, chosen: Mapping[str, Any], seed: int) -> PPOArgs:
    """Return a trial's settings; more minibatches than a rollout can fill are as many as it can."""
    args = dataclasses.replace(search.args, seed=seed, quiet=True, **chosen)
    if "num_minibatches" in chosen or "num_steps" in chosen:
        resolved = dataclasses.replace(args, num_minibatches=1).resolve(search.env)
        rows = filled(resolved.num_envs) * max(1, filled(resolved.num_steps) // 2)
        limit = rows if resolved.recurrent == "none" else filled(resolved.num_envs)
        wanted = args.num_minibatches or filled(
            dataclasses.replace(args, num_steps=None).resolve(search.env).num_minibatches
        )
        args = dataclasses.replace(args, num_minibatches=min(wanted, limit))
    return args


def _write_best(search: Search, best: Trial) -> None:
    """Write the settings of the best trial as a file for ``--config``."""
    args, plain = _settings(search, best.settings, search.args.seed), PPOArgs()
    kept = {}
    for name, value in vars(args).items():
        if value != getattr(plain, name) and name not in ("quiet", "seed"):
            kept[name] = list(value) if isinstance(value, tuple) else value
    seeds = "one seed" if search.seeds == 1 else f"{search.seeds} seeds"
    head = (
        f"# The best of {search.trials} trials on {search.env}: trial {best.number}, mean return {best.value:.1f} over "
        f"{seeds}.\n# classic-ppo train {search.env} --config {search.folder / BEST}\n"
    )
    (search.folder / BEST).write_text(head + yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")


def describe(settings: Mapping[str, Any]) -> str:
    """Return settings in one line."""
    words = (f"{name}={x:.4g}" if isinstance(x, float) else f"{name}={x}" for name, x in settings.items())
    return ", ".join(words) or "the settings as they are"
