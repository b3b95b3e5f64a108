"""Compare settings on one environment over several seeds, as a table and a picture."""

from __future__ import annotations

import dataclasses
import itertools
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from classic.config import EARLIER, PPOArgs
from classic.ppo import PPO
from classic.presets.resolve import resolve
from rlhf_ppo.runtime.command_line.settings import as_type
from rlhf_ppo.runtime.files import read_json
from rlhf_ppo.runtime.logs.run_directory import RunDirectory
from rlhf_ppo.runtime.statistics import bootstrap_iqm, mean_and_error

RESULT = "result.json"
NEEDED = ("env_id", "episodes", "settings", "env_steps", "mean_return")
SEEDING = "independent"
"""How episodes are seeded; in earlier versions neighbouring seeds shared some."""
CURVE_POINTS = 100

# Settings that may differ between a finished run and the same run repeated.
NOT_COMPARED = ("output_dir", "quiet", "eval_envs", "report")


@dataclasses.dataclass(frozen=True)
class Variant:
    """The finished runs of one variant of the settings."""

    name: str
    """The varied settings, such as ``num_epochs=4``."""
    folders: list[Path]
    """One folder per seed."""
    returns: np.ndarray
    """[seeds] mean return of the final policy, deterministic actions."""
    env_steps: int
    """Environment steps of a run (the largest of them)."""


def read_variants(words: Sequence[str]) -> list[dict[str, Any]]:
    """Read ``name=value,value`` words as settings to vary; return every combination.

    Values are YAML: ``num_epochs=1,4,10``, ``normalize_advantages=true,false``, ``hidden_sizes=[64,64],[32]``.

    Raises:
        ValueError: no such setting, a value of the wrong type, no value, or the same setting twice.
    """
    types = typing.get_type_hints(PPOArgs)
    lists: dict[str, list[Any]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in types or name in ("seed", *NOT_COMPARED):
            raise ValueError(f"--vary takes name=value,value with the name of a setting, got {word!r}")
        if name in lists:
            raise ValueError(f"--vary names {name} twice; give all of its values at once")
        try:
            values = yaml.safe_load(f"[{text}]")
            values = [None if value == "None" else value for value in values]  # as flags and tables spell it
            lists[name] = [as_type(value, types[name]) for value in values]
        except (yaml.YAMLError, ValueError) as error:
            reason = "not a list of values" if isinstance(error, yaml.YAMLError) else error
            raise ValueError(f"--vary {word}: {reason}") from None
        if not values:
            raise ValueError(f"--vary {word}: no value")
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def compare(
    env_id: str, args: PPOArgs, changes: Sequence[Mapping[str, Any]], *, seeds: int, episodes: int, folder: str | Path
) -> list[Variant]:
    """Train ``args`` with each of ``changes`` over consecutive seeds from ``args.seed``; finished runs are only read.

    Args:
        env_id: the environment.
        args: settings common to all variants.
        changes: settings that make a variant.
        seeds: runs of each variant; variants share their seeds.
        episodes: how many the evaluation after each run plays.
        folder: ``<folder>/<variant>/seed<k>/`` is one run.
    Raises:
        ValueError: settings contradict each other, two variants are the same (both before any training), or a finished
            run has other settings.
    """
    if seeds < 1 or episodes < 1:
        raise ValueError(f"seeds and episodes must be 1 or more, got seeds={seeds} and episodes={episodes}")
    wanted = []
    for change in changes:
        # Resolved, so that a run finished under another preset is not taken for one under this.
        name = _name(change)
        if name in dict(wanted):
            raise ValueError(f"two variants are {name}: name each value once")
        variant = dataclasses.replace(args, **change, output_dir=str(Path(folder) / name))
        wanted.append((name, resolve(variant, env_id)))
    variants = []
    # Seed by seed, so that a comparison stopped early is complete for its seeds.
    results: dict[str, list[dict[str, Any]]] = {name: [] for name, _ in wanted}
    for seed in range(args.seed, args.seed + seeds):
        for name, variant in wanted:
            path = Path(folder) / name / f"seed{seed}"
            run = dataclasses.replace(variant, seed=seed, output_dir=str(path))
            results[name].append(_finished(path, env_id, run, episodes) or _train(path, env_id, run, episodes))
    for name, _ in wanted:
        rows = results[name]
        variants.append(
            Variant(
                name,
                [Path(folder) / name / f"seed{row['settings']['seed']}" for row in rows],
                np.array([row["mean_return"] for row in rows]),
                max(row["env_steps"] for row in rows),
            )
        )
    return variants


def _name(change: Mapping[str, Any]) -> str:
    return (
        ",".join(
            f"{name}={'x'.join(map(str, value)) if isinstance(value, tuple) else value}"
            for name, value in change.items()
        )
        or "as it is"
    )


def _settings(args: PPOArgs) -> dict[str, Any]:
    given = {name: value for name, value in dataclasses.asdict(args).items() if name not in NOT_COMPARED}
    return json.loads(json.dumps(given))  # tuples become lists, as in the file


def _finished(path: Path, env_id: str, args: PPOArgs, episodes: int) -> dict[str, Any] | None:
    if not (path / RESULT).is_file():
        return None
    remedy = "remove it, and the run is repeated"
    result = read_json(path / RESULT, remedy)
    if missing := [name for name in NEEDED if name not in result]:
        raise ValueError(f"{path / RESULT} is damaged (it has no {', '.join(missing)}): {remedy}")
    if result.get("seeding") != SEEDING:
        raise ValueError(
            f"{path} was finished by an earlier version, whose neighbouring seeds shared episodes, which makes "
            "intervals too narrow: name another --output-dir, or remove that folder"
        )
    now = {"env_id": env_id, "episodes": episodes, **_settings(args)}
    then = {"env_id": result["env_id"], "episodes": result["episodes"], **EARLIER, **result["settings"]}
    for key in sorted({*now, *then}):
        if now.get(key) != then.get(key):
            raise ValueError(
                f"{path} was finished with {key}={then.get(key)!r}, now it is {now.get(key)!r}: "
                "name another --output-dir, or remove that folder"
            )
    return result


def _train(path: Path, env_id: str, args: PPOArgs, episodes: int) -> dict[str, Any]:
    agent = PPO(env_id, args).learn()
    result = {
        "env_id": env_id,
        "episodes": episodes,
        "settings": _settings(args),
        "seeding": SEEDING,
        "env_steps": agent.counters["env_steps"],
        **agent.evaluate(episodes=episodes),
    }
    agent.close()
    # Written last: a run without it is not finished.
    temporary = path / f".tmp-{RESULT}"
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path / RESULT)
    return result


def rows(variants: Sequence[Variant]) -> list[tuple[str, str, str, str, str]]:
    """Return table rows: variant, seeds, IQM with its 95 % interval, mean and standard error, worst seed."""
    lines = []
    for variant in variants:
        middle, low, high = bootstrap_iqm([variant.returns])
        lines.append(
            (
                variant.name,
                str(len(variant.returns)),
                f"{middle:.1f} [{low:.1f}, {high:.1f}]",
                mean_and_error(variant.returns),
                f"{variant.returns.min():.1f}",
            )
        )
    return lines


def draw(variants: Sequence[Variant], path: str | Path, *, title: str) -> Path:
    """Draw learning curves (the IQM over seeds of the training return with its 95 % bootstrap band) and final returns.

    Returns:
        The PNG's path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    curves, finals = figure.subplots(1, 2, width_ratios=(2, 1))
    for i, variant in enumerate(variants):
        color = f"C{i % 10}"
        draw_learning_curve(curves, variant, color)
        middle, low, high = bootstrap_iqm([variant.returns])
        y = len(variants) - 1 - i
        finals.plot([low, high], [y, y], linewidth=7, alpha=0.3, color=color, solid_capstyle="butt")
        finals.plot(variant.returns, [y] * len(variant.returns), "|", markersize=9, color=color)
        finals.plot(middle, y, "o", color=color)
    curves.set(xlabel="environment steps", ylabel="return of the last 100 episodes")
    curves.grid(alpha=0.3)
    finals.set_yticks(range(len(variants)), [variant.name for variant in variants][::-1])
    finals.set(xlabel="return of the final policy", ylim=(-0.6, len(variants) - 0.4))
    finals.grid(alpha=0.3, axis="x")
    figure.suptitle(f"{title}: IQM and 95 % interval over {len(variants[0].returns)} seeds", fontsize=11)
    figure.savefig(path, dpi=130)
    return Path(path)


def draw_learning_curve(axes: Any, variant: Variant, color: str) -> None:
    """Draw the IQM over seeds of the training return and its 95 % bootstrap band, over steps of all seeds."""
    if (curve := _curve(variant)) is not None:
        steps, middle, low, high = curve
        axes.plot(steps, middle, linewidth=1.8, color=color)
        axes.fill_between(steps, low, high, alpha=0.18, color=color, linewidth=0)


def _curve(variant: Variant) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Return (steps, iqm, low, high), each [CURVE_POINTS], over the steps that all seeds have; None without any."""
    runs = []
    for folder in variant.folders:
        points = [
            (row["progress/env_steps"], row["episode/return_mean"])
            for row in RunDirectory(folder).read()
            if "episode/return_mean" in row
        ]
        if not points:
            return None
        runs.append(np.array(points).T)
    first, last = max(run[0, 0] for run in runs), min(run[0, -1] for run in runs)
    if first >= last:
        return None
    steps = np.linspace(first, last, CURVE_POINTS)
    values = np.stack([np.interp(steps, *run) for run in runs], axis=-1)  # [CURVE_POINTS, seeds]
    return (steps, *bootstrap_iqm([values]))
