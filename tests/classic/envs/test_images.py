"""Images: every order of axes and scale becomes channels first from 0 to 1; arrays that look like images warn."""

from __future__ import annotations

import json
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from safetensors.torch import load_file, save_file

import classic
from classic.envs.images import unscaled
from classic.envs.spaces import batch_of_one, observation_encoder, observation_shape
from classic.networks.layers import Pixels

H, W = 36, 40


class Shown(gymnasium.Env):
    """Any observations at all, one step an episode."""

    action_space = Discrete(2)

    def __init__(self, observation_space):
        self.observation_space = observation_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 1.0, True, False, {}


def seen(space, image):
    """One image as the first convolution gets it."""
    return Pixels()(torch.from_numpy(observation_encoder(space)(image[None])))[0]


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((H, W), None),
        ((H, W, 3), (2, 0, 1)),
        ((3, H, W), (0, 1, 2)),
        ((4, H, W), (0, 1, 2)),  # a stack of grayscale frames
        ((4, H, W, 3), (0, 3, 1, 2)),
        ((4, 3, H, W), (0, 1, 2, 3)),
    ],
)
@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.float32, 1), (np.float32, 255), (np.int64, 255)])
def test_images_of_every_order_and_scale(shape, order, dtype, white):
    space = Box(0, white, shape, dtype)
    image = (np.random.default_rng(0).random(shape) * white).astype(dtype)
    expected = image[None] if order is None else image.transpose(order).reshape(-1, H, W)
    assert observation_shape(space, "") == expected.shape
    assert np.allclose(seen(space, image).numpy(), expected / white, atol=1e-6)


def test_other_arrays_are_not_scaled_and_large_values_warn():
    for space, words in (
        (Box(0, 255, (7, 7, 3), np.uint8), "normalize_observations=True"),  # too small
        (Box(0, 255, (128,), np.uint8), "normalize_observations=True"),  # memory of a console
        (Box(-np.inf, np.inf, (H, W, 3), np.float32), "declare 0 to 255 or 0 to 1"),
        (Box(0, 1, (H, W, 3), np.uint8), "multiply them by 255"),
    ):
        assert words in unscaled(space)
    for space in (
        Box(0, 255, (H, W, 3), np.uint8),
        Box(0, 1, (H, W), np.float32),
        Box(-1, 1, (3,), np.float32),
        Box(-np.inf, np.inf, (4,), np.float32),
        Box(0, 5, (H, W), np.uint8),
        Discrete(300),
    ):
        assert unscaled(space) is None


@pytest.mark.slow
def test_an_image_beside_numbers_is_learned_from(small):
    settings = {"num_envs": 8, "num_steps": 32, "learning_rate": 1e-3, "gamma": 0.5, "normalize_observations": True}
    agent = classic.PPO("tests/SideInDict-v0", small(**settings)).learn(3_000)
    assert agent.evaluate(20)["mean_return"] > 4.5  # 2.5 is luck, 5 the best


def test_each_image_inside_a_dict_gets_convolutions_of_its_own_and_numbers_pass_beside_them(small):
    agent = classic.PPO("tests/ImageInDictObservation-v0", small(normalize_observations=True)).learn(64)
    mixed = agent.network.bodies[0].image
    assert len(mixed.images) == 1 and agent.network.policy[0].in_features == 512 + 2
    space = agent.envs.observation_space
    space.seed(1)
    sample = space.sample()
    row = agent.normalizer.normalize(torch.from_numpy(agent.envs.encode(batch_of_one(space, sample))))
    pixels = torch.from_numpy(sample["camera"]).permute(2, 0, 1)  # pixels are not normalised; the speed is
    expected = mixed.images[0](pixels.unsqueeze(0))
    with torch.no_grad():
        torch.testing.assert_close(mixed(row), torch.cat([expected, row[:, -2:]], dim=-1))
    assert not np.allclose(row[0, -2:], sample["speed"])


def test_an_image_of_floats_inside_a_dict_is_scaled():
    space = Dict(a=Box(0, 255, (H, W, 1), np.float32), n=Discrete(2))
    encoded = observation_encoder(space)({"a": np.full((1, H, W, 1), 255, np.float32), "n": np.array([1])})
    assert encoded.shape == (1, *observation_shape(space, "")) and encoded.max() == 1


def test_training_warns_once_and_learns_from_float_images(small):
    def env(space):
        return lambda: Shown(space)

    with pytest.warns(UserWarning, match=r"its observations Box\(7, 7, 3\) of uint8 are numbers up to 255"):
        classic.PPO(env(Box(0, 255, (7, 7, 3), np.uint8)), small()).learn(16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classic.PPO(env(Box(0, 255, (7, 7, 3), np.uint8)), small(normalize_observations=True)).learn(16)
        agent = classic.PPO(env(Box(0, 1, (H, W), np.float32)), small(num_envs=2, num_steps=4)).learn(8)
    assert agent.predict(np.ones((H, W)))[0].shape == ()


def test_a_saved_agent_that_flattened_images_is_refused(small, tmp_path):
    space = Box(0, 1, (H, W), np.float32)
    classic.PPO(lambda: Shown(space), small()).save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({n: x for n, x in weights.items() if ".image." not in n}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"that flattened the observations .* which are read as images now"):
        classic.PPO.load(tmp_path, env=lambda: Shown(space))


def test_a_saved_agent_that_left_images_in_a_dict_unscaled_is_refused(small, tmp_path):
    space = Dict(cam=Box(0, 255, (H, W, 3), np.float32), v=Box(-1, 1, (2,)))
    classic.PPO(lambda: Shown(space), small()).save(tmp_path)
    content = json.loads((tmp_path / "agent.json").read_text())
    del content["layers"]
    (tmp_path / "agent.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"earlier version, which gave the network the images .* unscaled"):
        classic.PPO.load(tmp_path, env=lambda: Shown(space))


def test_an_agent_saved_without_the_newer_settings_is_loaded(small, tmp_path):
    agent = classic.PPO("CartPole-v1", small()).learn(64)
    agent.save(tmp_path)
    content = json.loads((tmp_path / "agent.json").read_text())
    for name in ("eval_envs", "eval_max_steps"):
        del content["args"][name]
    (tmp_path / "agent.json").write_text(json.dumps(content))
    assert classic.PPO.load(tmp_path).evaluate(3) == agent.evaluate(3)
