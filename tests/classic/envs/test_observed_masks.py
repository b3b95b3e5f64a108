"""Masks in observations: recognised, kept to in training and prediction, and said where they are not."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Tuple

import classic
from classic.envs.observed_masks import observed_mask, unread_masks
from classic.envs.spaces import ActionLayout

BITS = Box(0, 1, (4,), np.int8)
FOUR = ActionLayout(choices=(4,))


class Game(gymnasium.Env):
    """Five moves; of four options two are legal, by turns, another is an error. The last mask allows nothing."""

    action_space = Discrete(4)

    def __init__(self, key="action_mask"):
        self.key = key
        self.observation_space = Dict({"board": Discrete(2), key: BITS})

    def _look(self):
        self.legal = np.array([self.t % 2, 1 - self.t % 2] * 2, np.int8) * (self.t < 5)
        return {"board": self.t % 2, self.key: self.legal}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._look(), {}

    def step(self, action):
        assert self.key != "action_mask" or self.legal[action], f"{action} is illegal"
        self.t += 1
        return self._look(), 1.0, self.t == 5, False, {}


@pytest.mark.parametrize(
    ("space", "columns"),
    [
        (Dict(board=Discrete(3), action_mask=BITS), slice(3, 7)),
        (Dict(z=Dict(mask=MultiBinary(4)), b=Box(0, 9, (2, 2), np.int64)), slice(0, 4)),
        (Dict(a=Tuple([Discrete(3)]), action_masks=Box(0, 1, (4,), np.float32)), slice(3, 7)),
        (Dict(board=Discrete(3), action_mask=MultiBinary(3)), None),  # too short
        (Dict(board=Discrete(3), action_mask=Box(-1, 1, (4,), np.float32)), None),  # no zeros and ones
        (BITS, None),
    ],
)
def test_where_a_mask_lies(space, columns):
    assert observed_mask(space, FOUR) == columns


def test_what_looks_like_a_mask_and_is_none():
    assert unread_masks(Dict(board=Discrete(3), action_mask=MultiBinary(3)), FOUR) == ["action_mask"]
    assert unread_masks(Dict(board=Discrete(3), legal_moves=BITS), FOUR) == ["legal_moves"]
    assert not unread_masks(Dict(board=Discrete(3), legal_moves=BITS, action_mask=BITS), FOUR)
    assert not unread_masks(Dict(board=Discrete(3), mask=MultiBinary(9)), FOUR)  # of something else


@pytest.mark.parametrize("autoreset_mode", ["next_step", "same_step"])
def test_a_mask_in_the_observation_is_kept_to(autoreset_mode, small):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent = classic.PPO(Game, small(autoreset_mode=autoreset_mode)).learn(200)
        assert agent.evaluate(4, deterministic=False)["mean_return"] == 5
    observation = {"board": 0, "action_mask": np.array([0, 0, 1, 0], np.int8)}
    assert {int(agent.predict(observation, deterministic=False)[0]) for _ in range(20)} == {2}
    ignoring = classic.PPO(Game, small(action_masks=False, autoreset_mode=autoreset_mode))
    with pytest.raises(classic.BrokenEnvironmentError, match="is illegal"):
        ignoring.learn(200)


def test_a_mask_under_another_name_is_said(small):
    with pytest.warns(UserWarning, match=r"'legal' of its observations looks like a mask .* infos\['action_mask'\]"):
        classic.PPO(lambda: Game("legal"), small()).learn(10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classic.PPO(lambda: Game("legal"), small(action_masks=False)).learn(10)


def test_running_episodes_saved_before_masks_were_read_there_go_on(small, tmp_path, monkeypatch):
    monkeypatch.setattr("classic.ppo.draw_curve", lambda *_: None)
    agent = classic.PPO(Game, small(output_dir=str(tmp_path))).learn(60)
    tensors, state = agent.envs.state()
    expected = tensors.pop("action_masks")
    agent.envs.action_masks = None
    assert agent.envs.restore(tensors, state) and agent.envs.action_masks.equal(expected)
