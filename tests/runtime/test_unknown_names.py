"""Names that are not here: the nearest one, what other libraries' names are called here, and why some are refused."""

from __future__ import annotations

import dataclasses
import re

import pytest

import classic
import rlhf_ppo
from classic.config import OTHER_NAMES
from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.cli import TrainArgs
from rlhf_ppo.cli import main as rlhf_main
from rlhf_ppo.config.name_hints import SETTINGS
from rlhf_ppo.runtime.command_line.settings import read_yaml


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RLHFConfig(output_dir="o", batch_size=8), "no setting 'batch_size': here it is rollout_batch_size"),
        (lambda: RLHFConfig(output_dir="o", lam=0.9), "no setting 'lam': here it is gae_lambda"),
        (lambda: RLHFConfig(output_dir="o", per_device_train_batch_size=8), "here it is rollout_batch_size"),
        (lambda: RLHFConfig(output_dir="o", n_epochs=8), "here it is num_epochs"),
        (lambda: RLHFConfig(output_dir="o", learning_rat=1), "'learning_rat'; did you mean 'learning_rate'"),
        (lambda: RLHFConfig(output_dir="o", xyz=1), "no setting 'xyz'$"),
        (lambda: PPOTrainer(reward_model="x"), "PPOTrainer has no argument 'reward_model': here it is reward_funcs"),
        (lambda: PPOTrainer(tokenizer="x"), "'tokenizer': here it is processing_class"),
        (lambda: PPOTrainer(train_datasets=[]), "'train_datasets'; did you mean 'train_dataset'"),
        (lambda: classic.PPOArgs(n_steps=8), "PPOArgs has no setting 'n_steps': here it is num_steps"),
        (lambda: classic.PPOArgs(num_step=8), "did you mean 'num_steps'"),
        (lambda: classic.PPO("CartPole-v1", n_steps=8), "PPO has no argument 'n_steps': here it is num_steps"),
        (
            lambda: classic.PPO("CartPole-v1", gamma=1.0),
            r"'gamma': it is a setting: PPO\(env, PPOArgs\(gamma=\.\.\.\)\)",
        ),
    ],
)
def test_an_unknown_name_in_python_is_a_type_error_with_what_it_is_here(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_files_and_flags_say_the_same(tmp_path, capsys):
    (tmp_path / "trl.yaml").write_text("output_dir: o\ncliprange: 0.1\n")
    with pytest.raises(ValueError, match=r"trl\.yaml: cliprange is no setting: here it is clip_range"):
        read_yaml(tmp_path / "trl.yaml", RLHFConfig)
    assert rlhf_main("train --model x --response-length 5".split()) == 2
    assert capsys.readouterr().err == "error: response_length is no setting: here it is max_new_tokens\n"


def test_what_others_call_our_settings_leads_to_settings_that_exist():
    ours = {field.name for field in dataclasses.fields(TrainArgs)}
    settings = {field.name for field in dataclasses.fields(classic.PPOArgs)}
    for table, known in ((SETTINGS, ours), (OTHER_NAMES, settings)):
        for name, text in table.items():
            named = re.match(r"here (?:it is|they are) (\w+)", text)
            assert named is None or named[1] in known, (name, text)
    assert sum(text.startswith("here it is") for text in SETTINGS.values()) > 50


def test_the_lazy_package_lists_its_public_names():
    assert set(dir(rlhf_ppo)) == set(rlhf_ppo.__all__) >= {"PPOTrainer", "RLHFConfig", "RewardModel"}
    assert all(getattr(rlhf_ppo, name) is not None for name in dir(rlhf_ppo))
    assert {"PPO", "PPOArgs"} <= set(dir(classic))
    with pytest.raises(AttributeError, match="no attribute 'PPOTraine'"):
        rlhf_ppo.PPOTraine  # noqa: B018
