"""Record videos of an agent's episodes: mp4, gif, or a still of a few moments."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from classic.config import filled
from classic.envs.errors import CRASHES, BrokenEnvironmentError
from classic.envs.make_env import make_vector_env
from classic.envs.seeds import derive_seeds
from classic.evaluation import max_episode_steps, warn_of_cut
from classic.ppo import PPO
from classic.state import Run, TrainState
from rlhf_ppo.runtime.machine.signals import stop_if_asked

INSTALL = "pip install 'rlhf-ppo[video]'"
MOMENTS = 5
"""Frames in a still."""
MAX_FRAMES = 2_000
"""Frames kept in memory; of a longer video every second one is dropped, as often as needed."""


def record_video(agent: PPO, file: str | Path, *, episodes: int = 1, seed: int = 0, deterministic: bool = True) -> Path:
    """Play whole episodes in one copy and write its frames to a file.

    Args:
        agent: made from an id, or from an environment or a function with ``render_mode="rgb_array"``. If made from one
            environment, training begins a new episode on it afterwards.
        file: ``*.mp4``, ``*.gif``, or ``*.png``: a few of the frames side by side, from the first to the last.
        episodes: how many, one after another.
        seed: of the episodes, which are neither training's nor an evaluation's.
        deterministic: take the most likely action instead of a sampled one.
    Returns:
        The file.
    Warns:
        UserWarning: an episode was cut (``eval_max_steps``), or only every n-th frame is shown (``MAX_FRAMES``).
    Raises:
        ValueError: another file type, a negative seed, or the environment has no pictures.
        ModuleNotFoundError: a package for rendering or writing is missing; says how to install it.
    """
    file = Path(file)
    if file.suffix not in (".mp4", ".gif", ".png"):
        raise ValueError(f"a video is an .mp4 or a .gif, a still a .png, got {file}")
    if episodes < 1:
        raise ValueError(f"episodes must be 1 or more, got {episodes}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    predict = partial(agent.predict, deterministic=deterministic)
    frames, fps = _play(agent.run, agent.state, predict, episodes, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix != ".mp4":
        from PIL import Image  # comes with matplotlib

        if file.suffix == ".png":
            moments = np.linspace(0, len(frames) - 1, MOMENTS).round().astype(int)
            Image.fromarray(np.concatenate([frames[i] for i in moments], axis=1)).save(file)
            return file
        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(file, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
        return file
    try:
        from moviepy import ImageSequenceClip  # pyright: ignore[reportMissingImports] (an extra)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"writing {file.name} needs moviepy ({error}): {INSTALL}, or write a .gif") from None
    ImageSequenceClip(frames, fps=fps).write_videofile(str(file), logger=None)
    return file


def _play(
    run: Run, state: TrainState, predict: Callable[..., Any], episodes: int, seed: int
) -> tuple[list[np.ndarray], float]:
    """Play episodes and return their frames and the frames per second."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame looks for a window, and complains
    frames, cut = _Frames(), 0
    max_steps = max_episode_steps(run)
    with _stage(run, state) as env:
        for episode_seed in derive_seeds(seed, "video", episodes):
            observation, info = env.reset(seed=episode_seed)
            memory, over, steps = None, False, 0
            frames.add(_frame(env))
            while not over and steps < max_steps:
                stop_if_asked()
                masks = None if run.args.action_masks is False else allowed_actions(env, info)
                action, memory = predict(observation, state=memory, action_masks=masks)
                observation, _, terminated, truncated, info = env.step(action)
                frames.add(_frame(env))
                over, steps = terminated or truncated, steps + 1
            cut += not over
        fps = float(env.metadata.get("render_fps", 30))
    if cut:
        warn_of_cut(run.envs, cut, episodes, max_steps)
    if frames.every > 1:
        warnings.warn(f"the video is long, so it shows every {frames.every}th step", stacklevel=4)
    return frames.kept, fps


class _Frames:
    """Frames of a video, at most MAX_FRAMES of them."""

    def __init__(self) -> None:
        self.kept: list[np.ndarray] = []
        self.every, self._seen = 1, 0

    def add(self, frame: np.ndarray) -> None:
        """Keep one of ``every`` frames."""
        if len(self.kept) == MAX_FRAMES and self._seen % self.every == 0:
            self.kept, self.every = self.kept[::2], 2 * self.every
        if self._seen % self.every == 0:
            self.kept.append(frame)
        self._seen += 1


@contextmanager
def _stage(run: Run, state: TrainState) -> Iterator[gymnasium.Env]:
    """Make a copy to play on, or lend the only one, on which training then begins a new episode."""
    args, env = run.args, run.env
    single = isinstance(env, gymnasium.Env)
    drawn: Any = {"render_mode": "rgb_array"} if isinstance(env, str) else {}
    kwargs = {**(args.env_kwargs or {}), **drawn}
    try:
        made = (
            None
            if single
            else make_vector_env(env, 1, None, vectorization="sync", env_kwargs=kwargs, wrappers=filled(args.wrappers))
        )
    except (BrokenEnvironmentError, ValueError) as error:
        raise ValueError(f"a video needs an environment made with render_mode='rgb_array', but {error}") from None
    copy: gymnasium.Env = (made or run.envs.envs).unwrapped.envs[0]  # pyright: ignore
    try:
        if copy.render_mode != "rgb_array":
            raise ValueError(
                f"environment {run.env_id!r} has render_mode={copy.render_mode!r}: a video needs one made with "
                "render_mode='rgb_array'"
            )
        yield copy
    except gymnasium.error.DependencyNotInstalled as error:
        raise ModuleNotFoundError(f"environment {run.env_id!r} cannot be rendered: {error} (or: {INSTALL})") from None
    except (BrokenEnvironmentError, ModuleNotFoundError, ValueError):
        raise
    except CRASHES as error:
        raise BrokenEnvironmentError(
            f"environment {run.env_id!r} failed while it was recorded: {type(error).__name__}: {error}"
        ) from error
    finally:
        if made is None:
            state.playing = False
        else:
            made.close()


def allowed_actions(env: gymnasium.Env, info: dict[str, Any]) -> Any:
    """Return the environment's action mask, from its method or its infos, or None."""
    if "action_mask" not in info and env.has_wrapper_attr("action_masks"):
        return env.get_wrapper_attr("action_masks")()
    return info.get("action_mask")


def _frame(env: gymnasium.Env) -> np.ndarray:
    frame: Any = env.render()
    return np.array(frame, dtype=np.uint8)
