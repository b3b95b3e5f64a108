"""Removed settings: each way of giving one names the remedy, and checkpoints that hold them at their default resume."""

from __future__ import annotations

import hashlib
import json

import pytest

from rlhf_ppo import RLHFConfig
from rlhf_ppo.config.name_hints import REMOVED
from rlhf_ppo.runtime.checkpoints.checkpoint import CheckpointError
from rlhf_ppo.runtime.command_line.settings import parse_settings, read_yaml

GIVEN = [
    ("score_scale", 0.5, "has been removed; multiply in the reward function, or use reward_weights"),
    ("length_penalty", 0.1, "has been removed; add a reward function that subtracts it"),
    ("length_penalty_from", 40, "has been removed; add a reward function that subtracts it"),
    ("share_reward_base", True, "has been removed; leave it out"),
    ("generation", "continuous", "=.continuous. has been removed: use generation=.auto., .dynamic."),
]


@pytest.mark.parametrize(("name", "value", "message"), GIVEN)
def test_a_removed_setting_names_the_remedy_in_python_in_a_file_and_as_a_flag(tmp_path, name, value, message):
    with pytest.raises(ValueError, match=f"^{name}.*{message}"):
        RLHFConfig(output_dir="o", **{name: value})
    file = tmp_path / "config.yaml"
    file.write_text(f"output_dir: o\n{name}: {value}\n")
    with pytest.raises(ValueError, match=rf"config\.yaml: {name}.*{message}"):
        read_yaml(file, RLHFConfig)
    flag = f"--{name.replace('_', '-')}"
    for words in ([flag, str(value)], [f"{flag}={value}"]):
        with pytest.raises(ValueError, match=f"^{name}.*{message}"):
            parse_settings(RLHFConfig, ["--output-dir", "o", *words], prog="test")


def test_a_checkpoint_of_before_resumes_unless_it_used_a_removed_setting(make_trainer):
    trainer = make_trainer(total_episodes=16, save_every=1)
    trainer.train()
    manifest = trainer.run.path / "checkpoint-1" / "manifest.json"
    before = json.loads(manifest.read_text())
    before.pop("sha256")  # the manifest's own

    def write(**settings) -> None:
        body = {**before, "settings": {**before["settings"], **settings}}
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        manifest.write_text(json.dumps({**body, "sha256": digest}, indent=1) + "\n")

    write(**{name: default for name, (default, _) in REMOVED.items()})
    again = make_trainer(total_episodes=16, save_every=1, output_dir=trainer.args.output_dir)
    again.train(resume_from_checkpoint=manifest.parent)
    write(score_scale=0.5, length_penalty=0.0)
    other = make_trainer(total_episodes=16, save_every=1, output_dir=trainer.args.output_dir)
    with pytest.raises(CheckpointError, match=r"score_scale: 0\.5 -> removed; multiply in the reward") as error:
        other.train(resume_from_checkpoint=manifest.parent)
    assert "length_penalty" not in str(error.value)
