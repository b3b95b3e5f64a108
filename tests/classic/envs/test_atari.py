"""Atari: the presets' wrappers, a short run of the real game, and the missing extra."""

from __future__ import annotations

import sys

import gymnasium
import numpy as np
import pytest

import classic
from classic.presets.resolve import resolve

INSTALL = "pip install 'rlhf-ppo[atari]'"


def test_the_presets_stack_four_preprocessed_frames():
    for game in ("Pong", "Breakout"):
        args = resolve(classic.PPOArgs(), f"ALE/{game}-v5")
        assert args.env_kwargs == {"frameskip": 1, "repeat_action_probability": 0.0}
        assert [text.partition("(")[0] for text in args.wrappers] == ["AtariPreprocessing", "FrameStackObservation"]
        assert bool(args.training_wrappers) == (game == "Breakout")  # Pong's rewards are -1, 0 and 1 as they are
        own = resolve(classic.PPOArgs(wrappers=(), env_kwargs={}), f"ALE/{game}-v5")
        assert own.wrappers == () and own.env_kwargs == {}


def test_without_the_extra_its_install_line_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(ValueError, match=r"environment 'ALE/Pong-v5' needs an Atari emulator .*rlhf-ppo\[atari\]"):
        classic.PPO("ALE/Pong-v5")


@pytest.mark.parametrize("game", ["Pong", "Breakout"])
def test_a_short_run_of_the_real_game(game, tmp_path):
    pytest.importorskip("ale_py", reason=INSTALL)
    pytest.importorskip("cv2", reason=INSTALL)
    args = classic.PPOArgs(num_envs=2, num_steps=16, num_minibatches=2, num_epochs=1, quiet=True, eval_max_steps=20)
    agent = classic.PPO(f"ALE/{game}-v5", args).learn(64)
    assert agent.envs.observation_shape == (4, 84, 84) and agent.network.policy[0].in_features == 512
    assert agent.last_metrics["policy/first_minibatch_max_abs_log_ratio"] < 1e-4
    agent.save(tmp_path)
    with pytest.warns(UserWarning, match="1 of 1 episodes were cut after 20 steps"):
        classic.PPO.load(tmp_path).evaluate(1)
    assert agent.predict(np.zeros((4, 84, 84), np.uint8))[0].shape == ()


def test_what_was_made_already_is_not_wrapped_again():
    ale_py = pytest.importorskip("ale_py", reason=INSTALL)
    gymnasium.register_envs(ale_py)
    agent = classic.PPO(lambda: gymnasium.make("ALE/Pong-v5", obs_type="ram"), classic.PPOArgs(quiet=True, num_envs=1))
    assert agent.envs.observation_shape == (128,) and agent.args.wrappers == ()
    assert agent.origin == "preset of ALE/Pong-v5"
