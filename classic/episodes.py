"""Episodes of a run: read episodes.jsonl, which has a line for each, and plot their returns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf_ppo.runtime.logs.run_directory import RunDirectory

EPISODES = "episodes.jsonl"
"""Of a run's folder: iteration, env_steps, seconds (since learn began), env (the copy), return, length, and the setting
``episode_info``'s keys."""


def read_episodes(folder: str | Path) -> list[dict[str, Any]]:
    """Read the episodes of a run, in the order in which they ended.

    Raises:
        FileNotFoundError: the folder has none.
    """
    if not (Path(folder) / EPISODES).is_file():
        raise FileNotFoundError(f"no {EPISODES} in {folder}: a run writes it while it trains with output_dir")
    return RunDirectory(folder).read(EPISODES)


def plot_episodes(
    folders: str | Path | Sequence[str | Path],
    picture: str | Path,
    *,
    x: Literal["env_steps", "episodes", "seconds"] = "env_steps",
    y: str = "return",
    window: int = 100,
) -> Path:
    """Plot every episode of one or more runs as a dot, and the mean of the last ones as a line.

    Args:
        folders: of the runs.
        picture: the PNG to write.
        x: over environment steps, episodes or seconds.
        y: return, length, or a key of ``episode_info``.
        window: episodes that the line averages.
    Returns:
        The picture.
    Raises:
        ValueError: no episode has a number of that name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, folder in enumerate([folders] if isinstance(folders, (str, Path)) else folders):
        rows = read_episodes(folder)
        numbered = [(n if x == "episodes" else row[x], row[y]) for n, row in enumerate(rows, start=1) if y in row]
        if not numbered:
            known = sorted({key for row in rows for key in row})
            raise ValueError(f"no episode in {folder} has {y!r}; they have {', '.join(known) or 'not ended'}")
        places, values = np.array(numbered, dtype=float).T
        sums = np.cumsum(np.concatenate([[0.0], values]))
        last = np.arange(1, len(values) + 1)
        first = np.maximum(last - window, 0)
        axes.plot(places, values, ".", color=f"C{i}", alpha=0.25, markersize=3)
        axes.plot(places, (sums[last] - sums[first]) / (last - first), color=f"C{i}", label=Path(folder).name)
    axes.set_xlabel(x.replace("_", " "))
    axes.set_ylabel(f"{y}, each episode and the mean of the last {window}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    picture = Path(picture)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)
    return picture
