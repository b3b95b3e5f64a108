"""Make environments from ids, instances and functions, with every vectorization, wrappers, and Gymnasium's warnings."""

from __future__ import annotations

import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit

import classic
from classic.envs.make_env import env_name, make_vector_env
from classic.presets.resolve import resolve
from classic.video import record_video


class Walk(gymnasium.Env):
    """Three steps; the reward is how often this object was made."""

    observation_space = Box(0, 3, (1,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(1, self.t, dtype=np.float32), 1.0, self.t == 3, False, {}


class NoTuple(Walk):
    """Breaks Gymnasium's API: reset returns the observation alone."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0]


class NoSpace(gymnasium.Env):
    """Breaks Gymnasium's API: no action space."""

    observation_space = Walk.observation_space


def test_one_instance_is_one_copy_that_evaluation_uses_too(small):
    env = TimeLimit(Walk(), 2)
    args = classic.PPOArgs(quiet=True, num_steps=12, num_minibatches=2, num_epochs=1, hidden_sizes=(8,))
    agent = classic.PPO(env, args).learn(20)
    assert agent.env_id == "Walk" and agent.envs.num_envs == 1
    assert agent.evaluate(episodes=3) == {"mean_return": 2, "std_return": 0, "mean_length": 2}
    agent.learn(20)
    with pytest.raises(ValueError, match="num_envs=4, but 'Walk' is one instance: pass its id or a function"):
        classic.PPO(env, small(num_envs=4))
    # What the preset's copies do side by side, one copy does one after another.
    resolved = resolve(classic.PPOArgs(), "Walk", single=True)
    many = resolve(classic.PPOArgs(), "Walk")
    assert resolved.num_envs == 1 and resolved.num_steps == many.num_envs * many.num_steps


def test_a_factory_makes_the_copies_and_is_needed_again_to_load(small, tmp_path):
    agent = classic.PPO(Walk, small()).learn(60)
    assert agent.envs.num_envs == 4 and agent.evaluate(episodes=2)["mean_return"] == 3
    agent.save(tmp_path)
    with pytest.raises(ValueError, match="was made from an environment object, 'Walk': pass one as env"):
        classic.PPO.load(tmp_path)
    loaded = classic.PPO.load(tmp_path, env=Walk)
    assert np.array_equal(loaded.predict([1.0])[0], agent.predict([1.0])[0])


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (3, "env must be an id, a gymnasium.Env or a function that makes one, got int"),
        (lambda: "walk", "'<lambda>' made a str, not a gymnasium.Env"),
        (NoSpace, "'NoSpace'.*must specify an action space"),
    ],
)
def test_other_objects_are_refused_before_training(env, words, small):
    with pytest.raises((ValueError, classic.BrokenEnvironmentError), match=words):
        classic.PPO(env, small())


def test_an_environment_that_breaks_the_api_shows_the_checkers_warnings(small):
    words = r"'NoTuple' failed at step 0: ValueError: not enough values(.|\n)*`env.reset\(\)` was not a tuple"
    with pytest.raises(classic.BrokenEnvironmentError, match=words):
        classic.PPO(NoTuple, small()).learn(10)


class Leaves(Walk):
    """Calls sys.exit() at the given place."""

    def __init__(self, where):
        self.where = where
        self._at("__init__")

    def _at(self, place):
        if place == self.where:
            sys.exit()

    def reset(self, *, seed=None, options=None):
        self._at("reset")
        return super().reset(seed=seed)

    def step(self, action):
        self._at("step")
        return super().step(action)

    def action_masks(self):
        self._at("action_masks")
        return np.ones(2, dtype=bool)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("__init__", "failed while it was made"),
        ("reset", "failed at step 0"),
        ("step", "failed at step 1"),
        ("action_masks", "failed at step 0"),
    ],
)
def test_an_environment_that_exits_has_crashed(where, words, small):
    with pytest.raises(classic.BrokenEnvironmentError, match=f"environment '<lambda>' {words}: SystemExit"):
        classic.PPO(lambda: Leaves(where), small()).learn(100)


@pytest.mark.parametrize("autoreset", ["next_step", "same_step"])
@pytest.mark.parametrize(("vectorization", "kind"), [("sync", SyncVectorEnv), ("async", AsyncVectorEnv)])
def test_copies_in_one_process_or_each_in_its_own(vectorization, kind, autoreset, small):
    """The same environments either way, so the same run; async processes are made by fork or spawn alike."""
    results = []
    for how in (vectorization, "sync"):
        agent = classic.PPO("CartPole-v1", small(vectorization=how, autoreset_mode=autoreset, num_envs=2)).learn(60)
        assert isinstance(agent.envs.envs.unwrapped, kind if how == vectorization else SyncVectorEnv)
        results.append(agent.network.policy[0].weight.detach().clone())
        agent.envs.close()
    assert (results[0] == results[1]).all()


def test_auto_takes_the_environments_own_vector_version_where_it_fits():
    own = make_vector_env("CartPole-v1", 2, None)
    named = make_vector_env("CartPole-v1", 2, "next_step", vectorization="vector_entry_point")
    assert type(own) is type(named) and not isinstance(own, SyncVectorEnv)
    # It has no SAME_STEP mode and cannot be wrapped.
    assert make_vector_env("CartPole-v1", 2, "same_step").metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert isinstance(make_vector_env("CartPole-v1", 2, None, wrappers=["FlattenObservation"]), SyncVectorEnv)
    with pytest.raises(ValueError, match="autoreset_mode='same_step' but vectorization='vector_entry_point'"):
        make_vector_env("CartPole-v1", 2, "same_step", vectorization="vector_entry_point")
    for env, how in ((Walk(), "async"), (Walk, "vector_entry_point")):
        with pytest.raises(ValueError, match=f"vectorization='{how}' needs an id"):
            make_vector_env(env, 1, None, vectorization=how)


def test_arguments_and_wrappers_reach_each_copy(small):
    args = small(
        env_kwargs={"max_episode_steps": 5}, wrappers=["FlattenObservation", "gymnasium.wrappers:TimeAwareObservation"]
    )
    agent = classic.PPO("CartPole-v1", args)
    assert agent.envs.observation_shape == (5,)  # four, and the time
    assert agent.evaluate(episodes=3)["mean_length"] == 5
    with pytest.raises(ValueError, match="wrapper 'NoSuch' of environment 'CartPole-v1' cannot be loaded"):
        classic.PPO("CartPole-v1", small(wrappers=["NoSuch"]))
    with pytest.raises(ValueError, match=r"env_kwargs=.* are for an id"):
        classic.PPO(Walk, small(env_kwargs={"x": 1}))


def test_arguments_and_wrappers_are_saved_with_the_agent(small, tmp_path):
    args = small(env_kwargs={"max_episode_steps": 5}, wrappers=["TimeAwareObservation"])
    classic.PPO("CartPole-v1", args).save(tmp_path)
    loaded = classic.PPO.load(tmp_path)
    assert loaded.envs.observation_shape == (5,) and loaded.args.env_kwargs == {"max_episode_steps": 5}


def test_names():
    assert env_name("CartPole-v1") == "CartPole-v1" and env_name(gymnasium.make("CartPole-v1")) == "CartPole-v1"
    assert env_name(Walk) == "Walk" and env_name(Walk()) == "Walk"


def test_a_missing_package_says_which_extra_installs_it():
    for env_id, extra in (("HalfCheetah-v5", "mujoco"), ("LunarLander-v3", "box2d")):
        try:
            gymnasium.make(env_id).close()
        except gymnasium.error.DependencyNotInstalled:
            with pytest.raises(
                ValueError, match=rf"cannot make environment '{env_id}'.*pip install 'rlhf-ppo\[{extra}\]'"
            ):
                make_vector_env(env_id, 1, None)


class Once(Walk):
    """Cannot be used any more once it is closed; counts where a new episode begins."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self):
        self.closed, self.began = False, 0
        self.render_mode = "rgb_array"

    def close(self):
        self.closed = True

    def render(self):
        return np.zeros((8, 8, 3), dtype=np.uint8)

    def reset(self, *, seed=None, options=None):
        assert not self.closed
        self.began += 1
        return super().reset(seed=seed)

    def step(self, action):
        assert self.t < 3, "this episode is over"
        return super().step(action)


@pytest.mark.parametrize("play", ["evaluate", "video"])
def test_training_goes_on_with_an_instance_after_something_else_played_on_it(play, tmp_path):
    env = Once()
    args = classic.PPOArgs(quiet=True, num_steps=4, num_minibatches=1, num_epochs=1, hidden_sizes=(8,))
    agent = classic.PPO(env, args).learn(4)
    if play == "evaluate":
        agent.evaluate(episodes=2)
    else:
        record_video(agent, tmp_path / "a.gif")
    before = env.began
    agent.learn(2)
    assert env.began > before and not env.closed


def test_a_function_that_makes_one_environment_twice_is_refused(small):
    env = Walk()
    with pytest.raises(ValueError, match="made one environment twice: a function must make a new one at each call"):
        classic.PPO(lambda: env, small())


def test_arguments_that_an_environment_does_not_take_are_named(small):
    for wrong in ({"env_kwargs": {"nope": 3}}, {"wrappers": ("TimeLimit",)}):
        with pytest.raises(ValueError, match=r"cannot make .*'CartPole-v1' with env_kwargs=.*(nope|max_episode)"):
            classic.PPO("CartPole-v1", small(**wrong))


def test_the_preset_is_found_by_module_and_id_too():
    assert resolve(classic.PPOArgs(), "gymnasium:CartPole-v1") == resolve(classic.PPOArgs(), "CartPole-v1")


def test_wrappers_take_arguments(small):
    args = small(wrappers=["FrameStackObservation(stack_size=3)", "gymnasium.wrappers:FlattenObservation"])
    agent = classic.PPO("tests/Match-v0", args).learn(64)
    assert agent.envs.observation_shape == (3,)
    for text, words in (
        ("FrameStackObservation(3)", "arguments are name=value"),
        ("FrameStackObservation(stack_size=os)", "malformed node"),
        ("FrameStackObservation(stack_size=3", "never closed"),
        ("FrameStackObservation(stack=3)", "unexpected keyword argument 'stack'"),
        ("subprocess:run(shell=True)", "only a gymnasium.Wrapper takes arguments"),
    ):
        with pytest.raises(ValueError, match=words):
            classic.PPO("tests/Match-v0", small(wrappers=[text]))
