"""Recipes of papers: what they set, with its source; listed, shown, overridden, and refused with what contradicts."""

from __future__ import annotations

import dataclasses
import re

import pytest

from rlhf_ppo import RLHFConfig
from rlhf_ppo.cli import main
from rlhf_ppo.config.arguments.train import TrainArgs
from rlhf_ppo.config.presets import PRESETS, preset_settings
from rlhf_ppo.runtime.command_line.presets import preset_names
from rlhf_ppo.runtime.command_line.settings import parse_settings

NAMES = ["open-reasoner-zero", "sao", "vapo", "vc-ppo"]
NEEDED = "--model m --reward r --dataset d --output-dir o".split()


def parse(*flags):
    return parse_settings(TrainArgs, [*NEEDED, *flags], prog="rlhf-ppo train")


def test_the_papers():
    assert preset_names(PRESETS) == NAMES
    dis = {"objective": "dis", "clip_range": 0.3, "clip_range_high": 5.0}
    critic = {"critic": "separate", "critic_frozen": "attention", "critic_epochs": 2, "gae_lambda_value": 1.0}
    # Section 4.1 of SAO.
    sao = preset_settings("sao")
    assert sao.items() >= {**dis, **critic, "num_generations": 1, "adaptive_lambda_alpha": 1.5}.items()
    # Section 5.1 of VAPO.
    vapo = {"positive_loss_coef": 0.1, "adaptive_lambda_alpha": 0.05, "clip_range": 0.2, "clip_range_high": 0.28}
    assert preset_settings("vapo").items() >= {**vapo, "num_generations": 16, "critic_warmup_rollouts": 50}.items()
    lambdas = {"gae_lambda": 0.95, "gae_lambda_value": 1.0}
    assert preset_settings("vc-ppo").items() >= lambdas.items()
    orz = RLHFConfig.from_preset("open-reasoner-zero", output_dir="o")
    assert (orz.gae_lambda, orz.gamma, orz.kl_coef, orz.num_epochs * orz.num_minibatches) == (1.0, 1.0, 0.0, 1)
    assert orz.critic_only_epochs * orz.critic_only_minibatches == 12


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_has_its_source(name):
    text = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")
    assert re.match(r"# .*arXiv \d{4}\.\d{5}\)\n", text)
    comment = ""
    for line in text.splitlines():
        if line.startswith("#"):
            comment += line
        elif line:
            said = comment + line.partition("#")[2]
            assert "(" in said and re.search(r"[sS]ection|Appendix|\.py|[oO]urs", said), line
            comment = ""


@pytest.mark.parametrize("name", NAMES)
def test_python_and_the_command_line_agree(name):
    made = RLHFConfig.from_preset(name, output_dir="o", seed=3)
    parsed = parse("--preset", name, "--seed", "3")
    assert parsed.preset == name
    for field in dataclasses.fields(RLHFConfig):
        assert getattr(made, field.name) == getattr(parsed, field.name), field.name
    for key, value in preset_settings(name).items():
        assert getattr(made, key) == value
    # It fits the default batch, and leaves scale to the machine.
    assert made.num_rollouts > made.critic_warmup_rollouts
    assert not {"learning_rate", "rollout_batch_size", "output_dir"} & preset_settings(name).keys()


def test_files_override_presets_and_flags_override_both(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("preset: sao\ncritic_epochs: 3\nclip_range: 0.5\n")
    args = parse("--config", str(file), "--clip-range=0.7")
    assert (args.preset, args.clip_range, args.critic_epochs, args.clip_range_high) == ("sao", 0.7, 3, 5.0)
    assert parse("--preset=vapo", "--config", str(file)).num_generations == 16  # the flag names another
    assert parse("--preset", "vc-ppo", "--critic-warmup-rollouts", "0").critic_warmup_rollouts == 0
    assert parse("--preset", "sao", "--clip-range-vf", "0.3").clip_range_vf == 0.3
    assert parse("--preset", "sao").clip_range_vf is None
    assert parse().preset is None and parse().clip_range == 0.2


@pytest.mark.parametrize(
    ("name", "setting", "value", "words"),
    [
        (
            "sao",
            "advantage_estimator",
            "grpo",
            ("preset 'sao' sets gae_lambda_value=1.0", "you set advantage_estimator: "),
        ),
        ("sao", "critic", "shared", ("preset 'sao' sets critic_frozen='attention'", "you set critic: ")),
        ("vapo", "vf_coef", 0.0, ("preset 'vapo' sets", "critic_warmup_rollouts=50", "you set vf_coef")),
        ("vapo", "rollout_batch_size", 8, ("preset 'vapo' sets num_generations=16", "you set rollout_batch_size")),
        ("vc-ppo", "total_episodes", 64, ("preset 'vc-ppo' sets critic_warmup_rollouts=50", "you set total_episodes")),
    ],
)
def test_a_contradiction_names_the_preset_its_setting_and_the_flag(name, setting, value, words, capsys):
    flag = f"--{setting.replace('_', '-')}={value}"
    with pytest.raises(ValueError) as refusal:
        RLHFConfig.from_preset(name, output_dir="o", **{setting: value})
    assert all(word in str(refusal.value) for word in words), refusal.value
    with pytest.raises(SystemExit, match="2"):
        parse("--preset", name, flag)
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert all(word in said for word in words), said


def test_what_a_preset_has_no_part_in_is_said_as_ever():
    with pytest.raises(ValueError, match=r"^temperature must be positive, got -1"):
        RLHFConfig.from_preset("sao", output_dir="o", temperature=-1.0)


def test_the_command_lists_and_shows(capsys):
    assert main(["presets"]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{name} .*arXiv", listed, re.M) for name in NAMES)
    assert main(["presets", "sao"]) == 0
    assert capsys.readouterr().out == (PRESETS / "sao.yaml").read_text(encoding="utf-8")
    for words in (["presets", "soa"], ["train", *NEEDED, "--preset", "soa"]):
        assert main(words) == 2
        assert "unknown preset 'soa' (did you mean 'sao'?); known: open-reasoner-zero, " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["train", *NEEDED, "--preset"])
    assert "Missing value for argument '--preset'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown preset 'tulu'; known: "):
        RLHFConfig.from_preset("tulu", output_dir="o")


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_trains(make_trainer, make_model, name):
    small = {"critic_warmup_rollouts": 1} if preset_settings(name).get("critic_warmup_rollouts") else {}
    trainer = make_trainer(
        value_model=make_model(seed=3),
        **{"num_epochs": 1, "rollout_batch_size": 16, "total_episodes": 32, **preset_settings(name), **small},
    )
    metrics = trainer.train()
    assert metrics["progress/optimizer_steps"] == trainer.args.num_optimizer_steps
