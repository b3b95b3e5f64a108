"""Tiny environments whose right answers are known, registered for the tests of classic."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple
from gymnasium.vector import AutoresetMode, VectorEnv

import classic


class Clock(gymnasium.Env):
    """Ignores the action: four steps per episode, which terminates and is truncated by turns."""

    observation_space = Box(-10, 10, (3,), np.float32)
    action_space = Discrete(2)
    episode = -1

    def _observation(self):
        return np.array([self.t / 4, self.episode / 5, (self.t * self.episode) % 3], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.episode = 0, self.episode + 1
        return self._observation(), {}

    def step(self, action):
        self.t += 1
        over = self.t == 4
        reward = 0.5 * self.t + self.episode
        return self._observation(), reward, over and self.episode % 2 == 0, over and self.episode % 2 == 1, {}


class Chain(gymnasium.Env):
    """One state, reward 1 for ever; the registered time limit cuts it at 8 steps."""

    observation_space = Box(0, 1, (1,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, dtype=np.float32), {}

    def step(self, action):
        return np.ones(1, dtype=np.float32), 1.0, False, False, {}


class Match(gymnasium.Env):
    """Reward 1 for naming the sign that is shown, five signs per episode. Actions are 3 and 4, not 0 and 1."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Discrete(2, start=3)

    def _show(self):
        self.sign = int(self.np_random.integers(2))
        return np.array([2.0 * self.sign - 1], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._show(), {}

    def step(self, action):
        assert action in (3, 4), f"action {action} is outside the space"
        reward = float(action - 3 == self.sign)
        self.t += 1
        return self._show(), reward, self.t == 5, False, {}


class Side(Match):
    """Match whose sign is the bright half of an image."""

    observation_space = Box(0, 255, (36, 36, 1), np.uint8)

    def _show(self):
        image = np.zeros((36, 36, 1), dtype=np.uint8)
        image[:, 18:] = 100 * (super()._show() + 1)
        image[:, :18] = 200 - image[:, 18:]
        return image


class SideInDict(Side):
    """Side whose image is a part beside numbers, which say nothing."""

    observation_space = Dict({"camera": Side.observation_space, "speed": Box(-9, 9, (2,), np.float32)})

    def _show(self):
        return {"camera": super()._show(), "speed": np.array([5, -5], dtype=np.float32)}


class Far(Match):
    """Match with numbers on bad scales: signs are +- 1e-3 around 5, rewards 1e4."""

    observation_space = Box(0, 10, (1,), np.float32)

    def _show(self):
        return 5 + 1e-3 * super()._show()

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, 1e4 * reward, terminated, truncated, info


class Aim(gymnasium.Env):
    """Continuous: the reward is minus the squared distance to 0.5, and an action outside [-1, 1] is an error."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is outside the space"
        self.t += 1
        return np.zeros(1, dtype=np.float32), -float((action[0] - 0.5) ** 2), self.t == 5, False, {}


class Recall(gymnasium.Env):
    """A sign is shown once and asked for three steps later: without recurrence half of the reward is luck."""

    observation_space = Box(-1, 1, (2,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.sign = 0, int(self.np_random.integers(2))
        return np.array([2.0 * self.sign - 1, 0], dtype=np.float32), {}

    def step(self, action):
        self.t += 1
        asked = self.t == 3
        observation = np.array([0, float(self.t == 2)], dtype=np.float32)
        return observation, float(asked and action == self.sign), asked, False, {}


class Allowed(Chain):
    """Of five options the masks allow two, which change with every step; another one is an error."""

    action_space = Discrete(5)

    def __init__(self, source: str = "info"):
        self.source, self.t = source, 0

    def action_masks(self):
        mask = np.zeros(5, dtype=np.int8)
        mask[[self.t % 5, (self.t + 2) % 5]] = 1
        return mask * (self.source != "nothing")

    def has_wrapper_attr(self, name):
        return super().has_wrapper_attr(name) and (name != "action_masks" or self.source == "method")

    def _info(self):
        return {} if self.source == "method" else {"action_mask": self.action_masks()}

    def reset(self, *, seed=None, options=None):
        observation, _ = super().reset(seed=seed)
        self.t = 0
        return observation, self._info()

    def step(self, action):
        assert self.action_masks()[action], f"{action} is not allowed now"
        self.t += 1
        return np.ones(1, dtype=np.float32), 1.0, self.t % 3 == 0, False, self._info()


class Faulty(Chain):
    """Breaks in a given way at its third step, or another one."""

    def __init__(self, fault: str = "crash", at: int = 3):
        self.fault, self.at, self.t = fault, at, 0

    def step(self, action):
        self.t += 1
        observation, reward = np.ones(1, dtype=np.float32), 1.0
        if self.t == self.at:
            if self.fault == "crash":
                raise ZeroDivisionError("the simulator exploded")
            if self.fault == "nan_observation":
                observation[0] = np.nan
            if self.fault == "inf_observation":
                observation[0] = np.inf
            if self.fault == "nan_reward":
                reward = np.nan
            if self.fault == "wrong_shape":
                observation = np.ones(2, dtype=np.float32)
        return observation, reward, False, False, {}


class FaultyParts(gymnasium.Env):
    """Dict observations and several choices; the third step's observation has a fault."""

    observation_space = Dict({"x": Box(-1, 1, (2,), np.float32), "n": Discrete(3)})
    action_space = MultiDiscrete([2, 2])

    def __init__(self, fault: str = "nan"):
        self.fault, self.t = fault, 0

    def _observation(self):
        x = np.zeros(2, dtype=np.float32)
        if self.t == 3 and self.fault == "nan":
            x[1] = np.nan
        return {"x": x, "n": 7 if self.t == 3 and self.fault == "outside" else 0}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observation(), {}

    def step(self, action):
        self.t += 1
        if self.t == 3 and self.fault == "crash":
            raise ZeroDivisionError("the simulator exploded")
        return self._observation(), 1.0, False, False, {}


class Spaces(Chain):
    """Any spaces at all: observations are drawn from theirs, and an action outside its own is an error."""

    def __init__(self, observation_space=None, action_space=None):
        self.observation_space = observation_space or Chain.observation_space
        self.action_space = action_space or Chain.action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is outside the space"
        return self.observation_space.sample(), 1.0, False, False, {}


class ReusedBuffer(VectorEnv):
    """Counts its steps, writes every observation into one buffer, and ends episodes after step 2 of each."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012
    single_observation_space = Box(0, 1000, (1,), np.float32)
    single_action_space = Discrete(2)

    def __init__(self, num_envs=1, mode=AutoresetMode.NEXT_STEP, **kwargs):
        self.num_envs = num_envs
        self.metadata = {} if mode is None else {"autoreset_mode": mode}
        self.buffer = np.zeros((num_envs, 1), dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        self.buffer[:] = 0
        return self.buffer, {}

    def step(self, actions):
        self.buffer += 1
        false = np.zeros(self.num_envs, dtype=bool)
        return self.buffer, np.ones(self.num_envs), false, false, {}


def _register(name, entry_point, **kwargs):
    gymnasium.register(f"tests/{name}-v0", entry_point=entry_point, disable_env_checker=True, **kwargs)


_register("Clock", Clock)
_register("Chain", Chain, max_episode_steps=8)
_register("Match", Match)
_register("Side", Side)
_register("SideInDict", SideInDict)
_register("Far", Far)
_register("Aim", Aim)
for _fault in ("nan", "outside", "crash"):
    _register(f"FaultyParts_{_fault}", FaultyParts, kwargs={"fault": _fault})
_register("Recall", Recall)
for _source in ("info", "method", "nothing"):
    _register(f"Allowed_{_source}", Allowed, kwargs={"source": _source})
for _fault in ("crash", "nan_observation", "inf_observation", "nan_reward", "wrong_shape"):
    _register(f"Faulty_{_fault}", Faulty, kwargs={"fault": _fault})
OBSERVATIONS = {
    "Matrix": Box(-1, 1, (2, 3), np.float32),
    "Pixels": Box(0, 255, (36, 40, 3), np.uint8),
    "Discrete": Discrete(5, start=2),
    "MultiDiscrete": MultiDiscrete([2, 4]),
    "MultiBinary": MultiBinary(3),
    "Dict": Dict(
        {"x": Box(0, 1, (2,), np.float32), "inner": Dict({"n": Discrete(3)}), "pair": Tuple([Discrete(2)] * 2)}
    ),
}
OBSERVATIONS["ImageInDict"] = Dict({"camera": OBSERVATIONS["Pixels"], "speed": Box(-9, 9, (2,), np.float32)})
ACTIONS = {
    "MultiDiscrete": MultiDiscrete([2, 3], start=[5, 0]),
    "MultiBinary": MultiBinary([2, 2]),
    "Matrix": Box(-1, 1, (2, 2), np.float32),
}
REFUSED = {
    "TextObservation": {"observation_space": Text(5)},
    "TupleAction": {"action_space": Tuple([Discrete(2)])},
    "WholeNumbersAction": {"action_space": Box(0, 5, (2,), np.int64)},
}
for _name, _space in OBSERVATIONS.items():
    _register(f"{_name}Observation", Spaces, kwargs={"observation_space": _space}, max_episode_steps=8)
for _name, _space in ACTIONS.items():
    _register(f"{_name}Action", Spaces, kwargs={"action_space": _space}, max_episode_steps=8)
for _name, _spaces in REFUSED.items():
    _register(_name, Spaces, kwargs=_spaces)
_register("ReusedBuffer", None, vector_entry_point=ReusedBuffer)
_register("NoMetadata", None, vector_entry_point=ReusedBuffer, kwargs={"mode": None})
_register("Disabled", None, vector_entry_point=ReusedBuffer, kwargs={"mode": AutoresetMode.DISABLED})


@pytest.fixture
def small():
    """Settings for runs of a second: small rollouts, small networks, no output."""

    def make(**overrides):
        settings = {
            "num_envs": 4,
            "num_steps": 16,
            "num_minibatches": 2,
            "num_epochs": 2,
            "hidden_sizes": (16,),
            "learning_rate": 3e-3,
            "quiet": True,
        }
        return classic.PPOArgs(**{**settings, **overrides})

    return make
