"""Environments: unsupported ones are refused before training; faults name the environment and the step."""

from __future__ import annotations

import pytest
import torch

import classic
from classic.envs.environments import Environments, to_env_actions


def test_unknown_environment_keeps_gymnasiums_suggestion():
    with pytest.raises(ValueError, match=r"cannot make environment 'CartPol-v1'.*Did you mean.*CartPole"):
        classic.PPO("CartPol-v1")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("TextObservation", "Text observations are not supported; Box, Discrete"),
        ("TupleAction", "Tuple actions are not supported; Discrete, MultiDiscrete"),
        ("WholeNumbersAction", r"Box\(2,\) actions are not supported"),
    ],
)
def test_unsupported_spaces_are_refused_by_name_before_training(name, words):
    with pytest.raises(ValueError, match=f"environment 'tests/{name}-v0': {words}"):
        classic.PPO(f"tests/{name}-v0")


@pytest.mark.parametrize("name", ["NoMetadata", "Disabled"])
def test_missing_or_unsupported_autoreset_metadata_is_an_error(name):
    with pytest.raises(ValueError, match=f"'tests/{name}-v0'.*autoreset_mode.*NEXT_STEP or SAME_STEP"):
        classic.PPO(f"tests/{name}-v0")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("nan_observation", r"copy 0, step 3: observation is non-finite: \[nan\]"),
        ("inf_observation", r"copy 0, step 3: observation is non-finite: \[inf\]"),
        ("nan_reward", "copy 0, step 3: reward is non-finite: nan"),
        ("crash", "failed at step 3: ZeroDivisionError: the simulator exploded"),
        ("wrong_shape", "failed at step 3"),
    ],
)
@pytest.mark.parametrize("mode", ["next_step", "same_step"])
def test_faults_name_environment_and_step(fault, words, mode, small):
    agent = classic.PPO(f"tests/Faulty_{fault}-v0", small(autoreset_mode=mode))
    with pytest.raises(
        classic.BrokenEnvironmentError, match=f"environment 'tests/Faulty_{fault}-v0'.*{words}"
    ) as caught:
        agent.learn(1000)
    if fault == "crash":
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("nan", r"copy 0, step 3: observation is non-finite: \[.*nan.*\]"),
        ("outside", r"step 3: observation cannot be read: an observation is outside Discrete\(3\)"),
        ("crash", "failed at step 3: ZeroDivisionError: the simulator exploded"),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"recurrent": "gru"}, {"vectorization": "async"}])
@pytest.mark.filterwarnings("ignore:.*(ERROR|closing).*")
def test_fault_35_names_environment_and_step_for_composed_spaces_memories_and_processes(fault, words, settings, small):
    agent = classic.PPO(f"tests/FaultyParts_{fault}-v0", small(num_envs=2, **settings))
    with pytest.raises(classic.BrokenEnvironmentError, match=f"'tests/FaultyParts_{fault}-v0'.*{words}"):
        agent.learn(100)


def test_cartpole_has_the_given_autoreset_mode():
    for mode, next_step in ((None, True), ("next_step", True), ("same_step", False)):
        envs = Environments("CartPole-v1", 2, mode)
        assert envs.next_step_autoreset is next_step
        envs.close()


def test_indices_are_shifted_to_the_spaces_start_and_numbers_clipped_to_its_bounds():
    match, aim = Environments("tests/Match-v0", 1), Environments("tests/Aim-v0", 1)
    assert to_env_actions(torch.tensor([0, 1]), match.action_space).tolist() == [3, 4]
    assert to_env_actions(torch.tensor([[-7.0], [0.25]]), aim.action_space).tolist() == [[-1.0], [0.25]]
