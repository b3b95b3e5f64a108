"""Action masks from both sources, under both autoreset modes: the environment asserts that they are kept to."""

from __future__ import annotations

import numpy as np
import pytest

import classic
from classic.envs import Environments
from rlhf_ppo.runtime.run_directory import RunDirectory

MODES = ["next_step", "same_step"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", ["info", "method"])
def test_training_and_evaluating_keep_to_the_masks(source, mode, small, tmp_path):
    """Two options at equal probability: entropy log 2 = 0.69, where five would have 1.61."""
    agent = classic.PPO(f"tests/Allowed_{source}-v0", small(autoreset_mode=mode, output_dir=str(tmp_path))).learn(200)
    rows = RunDirectory(tmp_path).read()
    assert rows[0]["policy/entropy"] == pytest.approx(np.log(2), abs=0.01)
    assert rows[0]["policy/first_minibatch_max_abs_log_ratio"] < 1e-5
    agent.evaluate(episodes=5)


def test_masks_can_be_ignored_or_insisted_on(small):
    ignoring = classic.PPO("tests/Allowed_info-v0", small(action_masks=False))
    with pytest.raises(classic.BrokenEnvironmentError, match="is not allowed now"):
        ignoring.learn(200)
    with pytest.raises(classic.BrokenEnvironmentError, match="action_masks=True, but there is neither"):
        classic.PPO("tests/Match-v0", small(action_masks=True)).learn(10)
    with pytest.raises(ValueError, match="action_masks=True, but its actions are numbers"):
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
    with pytest.raises(ValueError, match="5 options to mask, got 2"):
        agent.predict([1.0], action_masks=[1, 1])
