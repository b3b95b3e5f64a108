"""Advice: each rule is met by its own symptom and by no healthy run, and every move is one that the settings allow."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import classic
from classic.cli import main as classic_main
from classic.presets.resolve import resolve
from rlhf_ppo import RLHFConfig
from rlhf_ppo.cli import main
from rlhf_ppo.runtime.diagnosis.advice import advise, tuning_page
from rlhf_ppo.runtime.diagnosis.rules import RULES

UPDATES = 40
BF16 = {"precision": "auto", "fingerprints": {"bf16": True}}
SETTINGS = {"num_epochs": 4, "max_grad_norm": 0.5, "ent_coef": 0.01, "kl_coef": 0.1, "learning_rate": 3e-4}
# A run that rises to its plateau by the middle and then wavers by 0.1 around it.
HEALTHY = {
    "policy/loss": lambda t: -0.01,
    "policy/clip_fraction": lambda t: 0.1,
    "policy/approx_kl": lambda t: 0.01,
    "policy/entropy": lambda t: 2.0 - t,
    "policy/first_minibatch_max_abs_log_ratio": lambda t: 1e-6,
    "optim/epochs": lambda t: 4,
    "optim/skipped_steps": lambda t: 0,
    "optim/grad_norm": lambda t: 1.0,
    "value/explained_variance": lambda t: 0.5,
    "value/return_mean": lambda t: 1.0,
    "advantage/std": lambda t: 1.0,
    "score/mean": lambda t: min(2 * t, 1.0) + 0.1 * (round(t * (UPDATES - 1)) % 2),
    "score/std": lambda t: 0.3,
    "kl/reference_nats_per_response": lambda t: 5 * t,
    "response/length_tokens": lambda t: 30.0,
    "response/eos_fraction": lambda t: 0.9,
}
FLAT = {"score/mean": lambda t: 0.1 * (round(t * (UPDATES - 1)) % 2)}
SYMPTOMS = {
    "non-finite numbers": {"optim/skipped_steps": lambda t: int(t == 1)},
    "sampling and training disagree": {"policy/first_minibatch_max_abs_log_ratio": lambda t: 0.3 * (t == 0)},
    "rounding as large as the clip range": {"policy/first_minibatch_max_abs_log_ratio": lambda t: 0.3},
    "no signal": {"score/std": lambda t: 0.0},
    "updates too large": {"policy/clip_fraction": lambda t: 0.5 * (t > 0.4)},
    "updates too small": {"policy/clip_fraction": lambda t: 0.0, "policy/approx_kl": lambda t: 1e-6},
    "updates stopped early": {"optim/epochs": lambda t: 2},
    "a deterministic policy": {"policy/entropy": lambda t: 2.0 if t < 0.2 else 0.05},
    "a policy that stays random": {"policy/entropy": lambda t: 2.0, **FLAT},
    "a critic worse than a constant": {"value/explained_variance": lambda t: -0.2},
    "large returns": {"value/return_mean": lambda t: -1000.0},
    "every gradient is clipped": {"optim/grad_norm": lambda t: 50.0},
    "drift from the reference": {"kl/reference_nats_per_response": lambda t: 30 * t},
    "KL above its target": {"kl/reference_nats_per_response": lambda t: 5.0},
    "KL below zero": {"kl/reference_nats_per_response": lambda t: -5.0},
    "held back by the reference": {"kl/reference_nats_per_response": lambda t: 0.01, **FLAT},
    "responses that no longer end": {"response/eos_fraction": lambda t: 0.9 - 0.9 * t},
    "length that runs away": {"response/length_tokens": lambda t: 30.0 + 60 * t},
    "responses that repeat themselves": {"response/repeated_fraction": lambda t: 0.5 * t},
    "a judge that disagrees": {"judge/score_mean": lambda t: 1 - t},
    "not finished": {"score/mean": lambda t: t},
}


def write_run(folder: Path, changed=None, settings=SETTINGS, updates: int = UPDATES) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(settings))
    curves = {**HEALTHY, **(changed or {})}
    rows = [{name: float(f(i / (updates - 1))) for name, f in curves.items()} for i in range(updates)]
    lines = [json.dumps({"progress/iteration": i, **row}) for i, row in enumerate(rows, start=1)]
    (folder / "metrics.jsonl").write_text(
        "\n".join([*lines, '{"progress/iteration": 40, "eval/score_mean": 9.0}']) + "\n"
    )
    return folder


def test_a_healthy_run_needs_no_advice(tmp_path, capsys):
    assert advise(write_run(tmp_path / "run")) == []
    assert main(["advise", str(tmp_path / "run")]) == 0
    assert "nothing stands out" in capsys.readouterr().out


def test_every_rule_has_a_symptom_here():
    assert list(SYMPTOMS) == [rule.name for rule in RULES]


@pytest.mark.parametrize("name", SYMPTOMS)
def test_a_symptom_meets_its_own_rule_and_no_other(tmp_path, name):
    special = {"rounding as large as the clip range": BF16, "KL above its target": {"kl_target": 2.0}}
    settings = {**SETTINGS, **special.get(name, {})}
    (found,) = advise(write_run(tmp_path / "run", SYMPTOMS[name], settings))
    assert found.rule.name == name


def test_changes_start_from_the_runs_own_settings(tmp_path, capsys):
    run = write_run(tmp_path / "run", SYMPTOMS["updates too large"])
    (found,) = advise(run)
    assert found.changes == {"learning_rate": (3e-4, 1e-4), "num_epochs": (4, 2)}  # no other move's setting is there
    assert main(["advise", str(run)]) == 0
    assert "clip fraction 0.50" in (out := capsys.readouterr().out) and "try learning_rate 0.0003 -> 0.0001" in out


def test_large_returns_are_no_fault_where_the_critic_learns_in_their_units(tmp_path):
    def found(**settings: bool) -> list:
        return advise(write_run(tmp_path / "run", SYMPTOMS["large returns"], {**SETTINGS, **settings}))

    assert not found(normalize_values=True)
    (advice,) = found(normalize_values=False)
    assert advice.changes["normalize_values"] == (False, True)


def test_bf16_rounding_is_no_fault_and_fp32_is_named_where_it_helps(tmp_path):
    def gap(nats: float, settings: dict) -> list:
        changed = {"policy/first_minibatch_max_abs_log_ratio": lambda t: nats}
        return [
            (a.rule.name, a.changes) for a in advise(write_run(tmp_path / "run", changed, {**SETTINGS, **settings}))
        ]

    bf16 = {**BF16, "clip_range": 0.2, "objective": "clip", "recompute_logprobs": False}
    assert gap(0.15, bf16) == [] == gap(0.15, {**bf16, "fingerprints": {}, "precision": "bf16"})
    ((name, changes),) = gap(0.3, bf16)
    assert name.startswith("rounding") and changes["precision"] == ("auto", "fp32")
    ((name, changes),) = gap(0.7, bf16)  # more than rounding
    assert name == "sampling and training disagree" and changes["precision"] == ("auto", "fp32")
    fp32 = {**bf16, "fingerprints": {"bf16": False}}
    ((name, changes),) = gap(0.15, {**fp32, "precision": "fp32"})
    assert name == "sampling and training disagree" and changes == {"recompute_logprobs": (False, True)}


def test_half_a_nat_a_token_is_drift(tmp_path):
    run = {"kl/reference_nats_per_response": lambda t: 24 * t, "response/length_tokens": lambda t: 48.0}
    (found,) = advise(write_run(tmp_path / "run", run))
    assert found.rule.name == "drift from the reference" and "nats from the reference in 48 tokens" in found.seen


def test_where_all_returns_are_alike_no_critic_is_blamed(tmp_path):
    blind = SYMPTOMS["a critic worse than a constant"]
    assert advise(write_run(tmp_path / "run", {**blind, "value/return_mean": lambda t: 90.0})) == []


def test_a_critics_warm_up_is_no_timid_policy(tmp_path):
    still = {"policy/clip_fraction": lambda t: 0.02 * (t > 0.5), "policy/approx_kl": lambda t: 9e-4 * (t > 0.5)}
    (found,) = advise(write_run(tmp_path / "run", {**still, "policy/clip_fraction": lambda t: 0.015 * (t > 0.5)}))
    assert found.rule.name == "updates too small"
    settings = {**SETTINGS, "critic_warmup_rollouts": UPDATES // 2}
    assert advise(write_run(tmp_path / "run", still, settings)) == []


@pytest.mark.parametrize("args", [resolve(classic.PPOArgs(), "Other-v0"), RLHFConfig(output_dir="runs/x")])
def test_every_move_leads_to_settings_that_are_allowed(tmp_path, args):
    """Name by name and one at a time, as the advice says."""
    args = dataclasses.replace(args, **{name: value for name, value in SETTINGS.items() if hasattr(args, name)})
    for name, symptom in SYMPTOMS.items():
        for advice in advise(write_run(tmp_path / name, symptom, dataclasses.asdict(args))):
            for setting, (_, better) in advice.changes.items():
                assert getattr(dataclasses.replace(args, **{setting: better}), setting) == better


def test_every_setting_that_a_rule_names_exists():
    known = {field.name for cls in (classic.PPOArgs, RLHFConfig) for field in dataclasses.fields(cls)}
    assert {move.setting for rule in RULES for move in rule.moves} <= known


@pytest.mark.parametrize("learning_rate", [0.5, 1e-7])  # 20 of 20 seeds each; at 0.05 it is 17
def test_a_real_run_with_a_wrong_learning_rate_is_told_to_move_it(tmp_path, learning_rate, learning_seed):
    small = ["--num-envs", "4", "--num-steps", "16", "--num-minibatches", "4", "--total-timesteps", "640", "--quiet"]
    small += ["--seed", str(learning_seed)]
    words = ["train", "CartPole-v1", "--learning-rate", str(learning_rate), "--output-dir", str(tmp_path / "run")]
    assert classic_main([*words, *small]) == 0
    moves = [found.changes["learning_rate"] for found in advise(tmp_path / "run") if "learning_rate" in found.changes]
    assert moves and all(now == learning_rate and (better < now) == (now > 1e-3) for now, better in moves)


def test_the_steps_that_a_run_was_asked_for_are_the_ones_to_double(tmp_path, monkeypatch):
    """Not those of the preset, which learn was told to leave aside."""
    settings = classic.PPOArgs(num_envs=2, num_steps=16, num_minibatches=2, output_dir=str(tmp_path), quiet=True)
    classic.PPO("CartPole-v1", settings).learn(320)
    made = write_run(tmp_path, SYMPTOMS["not finished"], json.loads((tmp_path / "run.json").read_text()))
    (found,) = [advice for advice in advise(made) if advice.rule.name == "not finished"]
    assert found.changes == {"total_timesteps": (320, 640)}


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["advise", str(tmp_path / "nowhere")]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err
    assert classic_main(["advise", str(write_run(tmp_path / "run", updates=5))]) == 2
    assert "has 5 updates, too few" in capsys.readouterr().err


def test_the_page_is_made_from_the_rules():
    page = Path(__file__).parents[2] / "docs" / "tuning.md"
    assert page.read_text(encoding="utf-8") == tuning_page(), "run `make docs`"
