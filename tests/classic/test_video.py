"""Videos: what is written, and the error if it cannot be."""

from __future__ import annotations

import importlib.util
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from PIL import Image

import classic
from classic.video import record_video


class Drawn(gymnasium.Env):
    """Three steps, drawn as a square that grows lighter."""

    observation_space = Box(0, 3, (1,), np.float32)
    action_space = Discrete(2)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode="rgb_array"):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(1, dtype=np.float32), 1.0, self.t == 3, False, {}

    def render(self):
        return np.full((32, 32, 3), 60 * self.t, dtype=np.uint8)


@pytest.mark.parametrize("recurrent", ["none", "gru"])
def test_a_gif_has_one_frame_per_step_and_one_at_the_start(recurrent, small, tmp_path):
    agent = classic.PPO(Drawn, small(recurrent=recurrent))
    with Image.open(record_video(agent, tmp_path / "sub" / "a.gif", episodes=2)) as gif:
        assert gif.n_frames == 8 and gif.info["duration"] == 100 and gif.size == (32, 32)
        gif.seek(3)
        assert gif.convert("RGB").getpixel((5, 5))[0] == pytest.approx(180, abs=8)


def test_a_still_shows_moments_side_by_side(small, tmp_path):
    with Image.open(record_video(classic.PPO(Drawn, small()), tmp_path / "a.png")) as still:
        assert still.size == (5 * 32, 32)
        shades = [still.getpixel((32 * i + 5, 5))[0] for i in range(5)]
    assert shades[0] == 0 and shades[-1] == 180 and shades == sorted(shades)


class Forced(Drawn):
    """Ends the run with an error if the option that the method ``action_masks`` forbids is taken."""

    shut = 0

    def action_masks(self):
        return np.arange(2) != self.shut

    def step(self, action):
        assert action != self.shut
        self.shut = 1 - self.shut
        return super().step(action)


class Leaves(Drawn):
    """Calls sys.exit() at its second step."""

    def step(self, action):
        return sys.exit() if self.t == 1 else super().step(action)


def test_an_environment_that_exits_does_not_exit_the_program(small, tmp_path):
    with pytest.raises(classic.BrokenEnvironmentError, match="'Leaves' failed while it was recorded: SystemExit"):
        record_video(classic.PPO(Leaves, small()), tmp_path / "a.gif")


def test_masks_from_a_method_are_followed(small, tmp_path):
    agent = classic.PPO(Forced, small())
    assert record_video(agent, tmp_path / "a.gif", episodes=3, deterministic=False).is_file()


def test_an_mp4_is_written_or_the_missing_package_named(small, tmp_path, monkeypatch):
    agent = classic.PPO(Drawn, small())
    if importlib.util.find_spec("moviepy"):
        assert b"ftyp" in record_video(agent, tmp_path / "a.mp4").read_bytes()[:16]
    monkeypatch.setitem(sys.modules, "moviepy", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"a\.mp4 needs moviepy .*pip install 'rlhf-ppo\[video\]', or write a \.gif"
    ):
        record_video(agent, tmp_path / "a.mp4")


def test_environments_without_pictures_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match=r"an \.mp4 or a \.gif, a still a \.png, got"):
        record_video(classic.PPO(Drawn, small()), tmp_path / "a.avi")
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        record_video(classic.PPO(Drawn, small()), tmp_path / "a.gif", seed=-1)
    with pytest.raises(ValueError, match=r"has render_mode=None: a video needs one made with render_mode='rgb_array'"):
        record_video(classic.PPO(lambda: Drawn(None), small()), tmp_path / "a.gif")


def test_a_missing_rendering_package_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"'CartPole-v1' cannot be rendered: .*pip install 'rlhf-ppo\[video\]'"
    ):
        record_video(classic.PPO("CartPole-v1", small()), tmp_path / "a.gif")
