"""Action masks from infos, a method or observations, in both autoreset modes; environments assert that they hold."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

import classic
from classic.envs.environments import Environments
from classic.envs.masks import observed_mask, unread_masks
from classic.envs.spaces import ActionLayout
from rlhf_ppo.runtime.logs.run_directory import RunDirectory

MODES = ["next_step", "same_step"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", ["info", "method"])
def test_training_and_evaluation_respect_masks(source, mode, small, tmp_path):
    """Two options at equal probability: entropy log 2 = 0.69, where five would have 1.61."""
    agent = classic.PPO(f"tests/Allowed_{source}-v0", small(autoreset_mode=mode, output_dir=str(tmp_path))).learn(200)
    rows = RunDirectory(tmp_path).read()
    assert rows[0]["policy/entropy"] == pytest.approx(np.log(2), abs=0.01)
    assert rows[0]["policy/first_minibatch_max_abs_log_ratio"] < 1e-5
    agent.evaluate(episodes=5)


def test_masks_can_be_ignored_or_required(small):
    ignoring = classic.PPO("tests/Allowed_info-v0", small(action_masks=False))
    with pytest.raises(classic.BrokenEnvironmentError, match="is not allowed now"):
        ignoring.learn(200)
    with pytest.raises(classic.BrokenEnvironmentError, match="action_masks=True, but there is neither"):
        classic.PPO("tests/Match-v0", small(action_masks=True)).learn(10)
    with pytest.raises(ValueError, match="action_masks=True, but its actions are continuous"):
        classic.PPO("tests/Aim-v0", small(action_masks=True))


def test_a_mask_that_allows_nothing_names_environment_copy_and_step(small):
    words = "'tests/Allowed_nothing-v0', step 0: the action mask of copy 0 allows nothing"
    with pytest.raises(classic.BrokenEnvironmentError, match=words):
        classic.PPO("tests/Allowed_nothing-v0", small()).learn(10)


def test_a_step_that_only_resets_allows_everything():
    envs = Environments("tests/Allowed_info-v0", 1, "next_step")
    envs.reset(seed=0)
    for _ in range(3):
        envs.step(envs.action_masks.int().argmax(dim=1))
    assert envs.resetting.all() and envs.action_masks.all()
    envs.step(envs.action_masks.int().argmax(dim=1))
    assert envs.action_masks.sum() == 2
    envs.close()


def test_predict_takes_masks(small):
    agent = classic.PPO("tests/Allowed_info-v0", small())
    assert agent.predict([1.0], action_masks=[0, 0, 0, 1, 0])[0] == 3
    many = agent.predict([[1.0], [1.0]], False, action_masks=[[0, 1, 0, 0, 0], [0, 0, 0, 0, 1]])[0]
    assert many.tolist() == [1, 4]
    with pytest.raises(ValueError, match="an action mask must have 5 entries, got 2"):
        agent.predict([1.0], action_masks=[1, 1])
    with pytest.raises(ValueError, match="2 observations need as many action masks, got 5"):
        agent.predict([[1.0], [1.0]], action_masks=[0, 0, 0, 1, 0])
    with pytest.raises(ValueError, match="an action mask allows nothing"):
        agent.predict([1.0], action_masks=[0, 0, 0, 0, 0])


class Sometimes(gymnasium.Env):
    """Five steps; gives a mask, which allows everything, at the given times of an episode."""

    observation_space = Box(0, 5, (1,), np.float32)
    action_space = Discrete(2)

    def __init__(self, times):
        self.times = times

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._seen()

    def step(self, action):
        self.t += 1
        observation, info = self._seen()
        return observation, 1.0, self.t == 5, False, info

    def _seen(self):
        info = {"action_mask": np.ones(2, dtype=np.int8)} if self.t in self.times else {}
        return np.full(1, self.t, dtype=np.float32), info


@pytest.mark.parametrize("wanted", [None, True])
@pytest.mark.parametrize("copies", [1, 2])
def test_a_mask_is_not_needed_where_an_episode_is_over(copies, wanted, small):
    args = small(num_envs=copies, autoreset_mode="next_step", action_masks=wanted)
    agent = classic.PPO(lambda: Sometimes(range(5)), args).learn(100)
    assert agent.last_update.rollout.action_masks.all()


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([0], "step 1: the action mask of copy 0 is missing"),
        ([0, 1, 3, 4], "step 2: the action mask of copy 0 is missing"),
        (range(1, 6), "step 1: there is an action mask, but there was none"),
    ],
)
def test_masks_that_come_and_go_are_refused(times, words, small):
    with pytest.raises(classic.BrokenEnvironmentError, match=f"{words}.*: give one at the reset and at every step"):
        classic.PPO(lambda: Sometimes(times), small(num_envs=1)).learn(100)
    classic.PPO(lambda: Sometimes(times), small(num_envs=1, action_masks=False)).learn(20)


class TwoChoices(gymnasium.Env):
    """Its mask is one array per choice."""

    observation_space = Box(0, 1, (1,), np.float32)
    action_space = MultiDiscrete([2, 3])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, dtype=np.float32), {"action_mask": (np.array([1, 0]), np.array([0, 1, 1]))}

    def step(self, action):
        assert action[0] == 0 and action[1] > 0, f"{action} is not allowed"
        observation, info = self.reset()
        return observation, 1.0, False, True, info


def test_a_mask_may_be_one_array_per_choice(small):
    agent = classic.PPO(TwoChoices, small()).learn(60)
    agent.evaluate(episodes=2)
    mask = ([1, 0], [0, 0, 1])
    assert agent.predict([1.0], action_masks=mask)[0].tolist() == [0, 2]
    assert agent.predict([[1.0]], action_masks=[mask])[0].tolist() == [[0, 2]]


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
def test_columns_of_a_mask(space, columns):
    assert observed_mask(space, FOUR) == columns


def test_keys_that_look_like_a_mask():
    assert unread_masks(Dict(board=Discrete(3), action_mask=MultiBinary(3)), FOUR) == ["action_mask"]
    assert unread_masks(Dict(board=Discrete(3), legal_moves=BITS), FOUR) == ["legal_moves"]
    assert not unread_masks(Dict(board=Discrete(3), legal_moves=BITS, action_mask=BITS), FOUR)
    assert not unread_masks(Dict(board=Discrete(3), mask=MultiBinary(9)), FOUR)  # of something else


@pytest.mark.parametrize("autoreset_mode", ["next_step", "same_step"])
def test_masks_in_observations_are_respected(autoreset_mode, small):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent = classic.PPO(Game, small(autoreset_mode=autoreset_mode)).learn(200)
        assert agent.evaluate(4, deterministic=False)["mean_return"] == 5
    observation = {"board": 0, "action_mask": np.array([0, 0, 1, 0], np.int8)}
    assert {int(agent.predict(observation, deterministic=False)[0]) for _ in range(20)} == {2}
    ignoring = classic.PPO(Game, small(action_masks=False, autoreset_mode=autoreset_mode))
    with pytest.raises(classic.BrokenEnvironmentError, match="is illegal"):
        ignoring.learn(200)


def test_a_mask_under_another_name_warns(small):
    with pytest.warns(UserWarning, match=r"'legal' of its observations looks like a mask .* infos\['action_mask'\]"):
        classic.PPO(lambda: Game("legal"), small()).learn(10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classic.PPO(lambda: Game("legal"), small(action_masks=False)).learn(10)


def test_episodes_saved_before_masks_were_read_there_resume(small, tmp_path):
    agent = classic.PPO(Game, small(output_dir=str(tmp_path))).learn(60)
    tensors, state = agent.envs.state()
    expected = tensors.pop("action_masks")
    agent.envs.action_masks = None
    assert agent.envs.restore(tensors, state) and agent.envs.action_masks.equal(expected)
