"""Migrating from TRL 1.12: the converter keeps a run's meaning, invalid arguments are named."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from rlhf_ppo.cli import main
from rlhf_ppo.config.arguments.commands import MigrateArgs, join_command_line
from rlhf_ppo.migration import trl
from rlhf_ppo.migration.arguments import FIELDS_FILE, read_flags
from rlhf_ppo.migration.reading import Given, read_given
from rlhf_ppo.migration.shell import read_command

ROOT = Path(__file__).parents[3]
DATA = {"dataset_name": "prompts.jsonl"}

# As documented at the top of TRL's examples/scripts/ppo/ppo_tldr.py.
TLDR = """accelerate launch --config_file examples/accelerate_configs/deepspeed_zero2.yaml \\
    examples/scripts/ppo/ppo_tldr.py \\
    --dataset_name trl-lib/tldr \\
    --dataset_test_split validation \\
    --output_dir pythia-1b-deduped-tldr-preference-sft-trl-style-ppo \\
    --learning_rate 3e-6 \\
    --per_device_train_batch_size 16 \\
    --gradient_accumulation_steps 4 \\
    --total_episodes 1000000 \\
    --model_name_or_path EleutherAI/pythia-1b-deduped \\
    --sft_model_path cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr \\
    --reward_model_path cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr \\
    --local_rollout_forward_batch_size 16 \\
    --missing_eos_penalty 1.0 \\
    --stop_token eos \\
    --eval_strategy steps \\
    --eval_steps 100
"""

YAML = """
env: {TOKENIZERS_PARALLELISM: "false"}
dataset_name: prompts.jsonl
sft_model_path: policy
reward_model_path: reward
output_dir: run
total_episodes: 4
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
num_mini_batches: 2
num_ppo_epochs: 1
learning_rate: 1e-5
lr_scheduler_type: cosine
response_length: 4
temperature: 0.9
stop_token_id: 5
missing_eos_penalty: 1.0
cliprange: 0.1
cliprange_value: 0.3
lam: 0.9
kl_estimator: k3
bf16: false
use_cpu: true
report_to: [tensorboard, mlflow]
whiten_rewards: true
gradient_checkpointing: true
save_strategy: "no"
"""


def convert(given: dict, processes: int = 1, rows: int | None = None) -> dict:
    return trl.convert(Given("trl", given, "", Path(), processes, {}), rows).settings


def read_trl_flags(text: str) -> dict:
    return read_flags("trl", read_command(text, "the command line").flags)


# Reading


def test_flags_of_the_whole_command_are_read_with_their_kinds():
    given = read_trl_flags(TLDR)
    assert len(given) == 15
    assert given["learning_rate"] == 3e-6 and given["total_episodes"] == 1_000_000 and given["stop_token"] == "eos"


def test_switches_lists_and_both_spellings():
    given = read_trl_flags("--bf16 --use_peft=true --no_logging_nan_inf_filter --lora-target-modules q v --lora_r 8")
    expected = {"bf16": True, "use_peft": True, "logging_nan_inf_filter": False, "lora_target_modules": ["q", "v"]}
    assert given == {**expected, "lora_r": 8}
    assert read_trl_flags("--lora_target_modules q --report_to none") == {
        "lora_target_modules": ["q"],
        "report_to": "none",
    }


def test_flags_win_over_a_file_named_among_them(tmp_path):
    (tmp_path / "a.yaml").write_text("lam: 1e-1\ngamma: 0.5\n")
    given = read_given(MigrateArgs(command_line=f"--lam 0.7 --config {tmp_path / 'a.yaml'}"))
    assert (given.source, given.values) == ("trl", {"lam": 0.7, "gamma": 0.5})


def test_words_after_two_dashes_are_trls():
    joined = join_command_line(["migrate", "--config", "a b.yaml", "--", "--lam", "0.7", "--run_name", "x y"])
    assert joined[:3] == ["migrate", "--config", "a b.yaml"]
    assert joined[3:] == ["--command-line=--lam 0.7 --run_name 'x y'"]
    assert join_command_line(["train"]) == ["train"]


# Meaning


# Rows per device, gradient_accumulation_steps, num_mini_batches -> optimizer steps an epoch. Counted in TRL by
# test_trl_takes_the_steps_that_the_converter_says.
STEPS = [
    (2, 8, 1, 1),
    (2, 8, 4, 1),  # 8 microbatches of 2 rows, a step after each 8: num_mini_batches adds none
    (16, 1, 4, 4),  # 4 microbatches of 4 rows, a step after each
    (8, 2, 4, 2),  # 4 microbatches of 4 rows, a step after each 2
]


def trl_batch(rows: int, accumulated: int, parts: int) -> dict[str, int]:
    return {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulated,
        "num_mini_batches": parts,
    }


# The last: 6 microbatches of 2 rows, a step after each 4; one and a half, and 12 rows.
@pytest.mark.parametrize(("rows", "accumulated", "parts", "steps"), [*STEPS, (3, 4, 3, 1)])
def test_minibatches_become_the_optimizer_steps_that_trl_took(rows, accumulated, parts, steps):
    given = {**DATA, **trl_batch(rows, accumulated, parts)}
    ours = convert(given)
    assert (ours["rollout_batch_size"], ours["num_minibatches"]) == (rows * accumulated, steps)
    assert convert(given, 2)["rollout_batch_size"] == 2 * rows * accumulated


def test_trls_own_defaults_hold_where_nothing_is_given():
    ours = convert(DATA)
    assert (ours["max_new_tokens"], ours["temperature"], ours["seed"], ours["learning_rate"]) == (53, 0.7, 42, 3e-6)
    assert (ours["model"], ours["reward"]) == ("EleutherAI/pythia-160m", ["EleutherAI/pythia-160m"])
    assert (ours["eval_size"], ours["save_every"], ours["num_minibatches"]) == (0, 500, 1)
    assert ours["normalize_values"] is False  # cliprange_value is in the reward's units
    assert "total_episodes" not in ours and "lora_rank" not in ours and "precision" not in ours


# 64 episodes in rollouts of 8 are 8 rollouts of 4 epochs and 1 step each.
RUN = {**DATA, "total_episodes": 64, "per_device_train_batch_size": 8}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"warmup_steps": 2.0}, {"warmup_steps": 2 * 4}),
        ({"warmup_steps": 0.25}, {"warmup_steps": 2 * 4}),
        ({"warmup_steps": 2.0, "num_mini_batches": 4, "num_ppo_epochs": 1}, {"warmup_steps": 2 * 4}),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1.0}, {"lr_scheduler_type": "constant"}),
        ({"lr_scheduler_type": "constant", "warmup_steps": 1.0}, {"lr_scheduler_type": "constant", "warmup_steps": 0}),
        ({"weight_decay": 0.01}, {"weight_decay": 0.01}),
        ({"max_grad_norm": 0.0}, {"max_grad_norm": 1e9}),
        ({"max_grad_norm": 0.5}, {"max_grad_norm": 0.5}),
        ({"stop_token_id": 0}, {"stop_token_ids": [0]}),
        ({"bf16": True}, {"precision": "bf16"}),
        ({"bf16": False}, {"precision": "fp32"}),
        ({"dtype": "bfloat16"}, {"precision": "bf16"}),
        ({"use_cpu": True}, {"device": "cpu"}),
        ({"use_peft": True, "lora_r": 4}, {"lora_rank": 4, "lora_alpha": 32}),  # TRL's default, not twice the rank
        ({"use_peft": True, "lora_target_modules": ["q"]}, {"lora_target_modules": ["q"]}),
        ({"use_peft": True, "load_in_4bit": True}, {"lora_rank": 16, "quantization": "4bit"}),
        ({"use_peft": True, "load_in_8bit": True}, {"quantization": "8bit"}),
        ({"reward_model_path": "r"}, {"reward": ["r"], "value_model": "r", "value_head_from": "r"}),
        ({"save_strategy": "no"}, {"save_every": 0}),
        ({"save_strategy": "epoch"}, {"save_every": 0}),
        ({"save_steps": 0.5}, {"save_every": 4}),
        ({"eval_strategy": "steps", "eval_steps": 3.0}, {"eval_every": 3}),
        ({"eval_strategy": "steps", "num_sample_generations": 2}, {"eval_every": 4}),
        ({"eval_strategy": "steps", "num_sample_generations": 100}, {"eval_every": 1}),
    ],
)
def test_units_and_meanings_are_converted(given, expected):
    ours = convert({**RUN, **given})
    assert {name: ours[name] for name in expected} == expected


def test_settings_without_their_switch_are_left_out():
    assert "eval_size" not in convert({**RUN, "eval_strategy": "steps"})
    assert not {"lora_rank", "lora_alpha", "lora_target_modules"} & set(convert({**RUN, "lora_r": 4, "lora_alpha": 8}))


# The command


@pytest.mark.parametrize(
    ("launcher", "ours", "batch"),
    [
        ("accelerate launch --num_processes 8 ppo.py", [], 512),
        ("accelerate launch --num-processes=8 ppo.py", [], 512),
        ("accelerate launch --num_processes 8 ppo.py", ["--num-processes", "2"], 128),
        ("/.pyenv/bin/accelerate launch --config_file a.py.yaml --num_processes '8' ppo.py", [], 512),
        ("torchrun --nproc_per_node 8 ppo.py", [], 512),
        ("accelerate launch --config_file 8.yaml ppo.py", [], 64),
    ],
)
def test_batches_grow_with_the_processes_that_the_launcher_names(launcher, ours, batch, capsys):
    _, flags = TLDR.replace("\\\n", " ").split(".py", 1)
    assert main(["migrate", *ours, "--", *shlex.split(launcher), *flags.split()]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["rollout_batch_size"] == batch


def test_the_tldr_command_becomes_our_yaml(tmp_path, capsys):
    assert main(["migrate", "--num-processes", "8", "--", *TLDR.replace("\\\n", " ").split()]) == 0
    text = capsys.readouterr().out
    ours = yaml.safe_load(text)
    assert ours["model"] == "cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr"
    assert ours["value_model"] == "cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr"
    assert (ours["rollout_batch_size"], ours["num_minibatches"], ours["eval_every"]) == (512, 1, 100)
    assert (ours["learning_rate"], ours["missing_eos_penalty"], ours["max_new_tokens"]) == (3e-6, 1.0, 53)
    # Equal to the defaults here: no line.
    assert not {"kl_coef", "vf_coef", "num_epochs", "clip_range", "max_grad_norm"} & set(ours)
    # Without a line, but with the reason.
    assert "# dataset_test_split: validation. " in text
    assert "# local_rollout_forward_batch_size: 16 (needs no setting). " in text
    page = (ROOT / "docs/migrating-from-trl.md").read_text(encoding="utf-8")
    assert page.partition("```yaml\n")[2].partition("```")[0] in text


@pytest.fixture
def folder(tmp_path, make_model, make_classifier, tokenizer, monkeypatch) -> Path:
    """A policy and a reward model as TRL's scripts take them, prompts, and trl.yaml."""
    for name, model in (("policy", make_model()), ("reward", make_classifier())):
        model.config.pad_token_id = 1
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [{"prompt": f"the cat {word}"} for word in ("sat", "ran", "ate", "saw", "hid")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "trl.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_migrated_yaml_trains(folder, capsys):
    assert main("migrate --config trl.yaml --output ours.yaml -- --vf_coef 0.3".split()) == 0
    text = Path("ours.yaml").read_text()
    ours = yaml.safe_load(text)
    assert ours["report_to"] == ["tensorboard"]
    assert ours["vf_coef"] == 0.3 and ours["learning_rate"] == 1e-5 and ours["precision"] == "fp32"
    for reason in (
        "report_to: [tensorboard, mlflow]",
        "whiten_rewards: true (not supported)",
        "num_mini_batches: 2",
    ):
        assert f"# {reason}. " in text
    assert "gradient_checkpointing" not in text, "true is TRL's default"
    assert main(["train", "--config", "ours.yaml", "--quiet", "True"]) == 0
    run = json.loads(Path("run/run.json").read_text())
    assert (run["clip_range"], run["clip_range_vf"], run["gae_lambda"], run["kl_estimator"]) == (0.1, 0.3, 0.9, "k3")
    assert run["stop_token_ids"] == [5] and run["seed"] == 42
    assert run["value_model"] == run["value_head_from"] == "reward"
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    # One rollout of 4; a step after each 2 microbatches of 2 rows.
    assert [row["progress/optimizer_steps"] for row in metrics if "policy/loss" in row] == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dataset_name x --learning_rat 1e-5", "did you mean 'learning_rate'"),
        ("--dataset_name x --clip_range 0.1", "did you mean 'cliprange'"),
        ("--dataset_name x --lam much", "lam: takes float, got 'much'"),
        ("--dataset_name x --lam 0.9 0.8", "--lam takes one value"),
        ("--dataset_name x --save_strategy sometimes", "'sometimes' is none of"),
        ("--dataset_name x --stop_token eos --stop_token_id 3", "stop_token and stop_token_id"),
        ("--dataset_name x --stop_token eos --stop_token_id 0", "stop_token and stop_token_id"),
        ("--dataset_name x --use_peft --load_in_4bit --load_in_8bit", "load_in_8bit and load_in_4bit"),
        ("--dataset_name x --num_mini_batches 3", "num_mini_batches=3 does not divide"),
        ("--dataset_name x --gradient_accumulation_steps 0", "must be 1 or more"),
        ("--dataset_name x --warmup_steps 0.1", "warmup_steps=0.1 is a share of the run"),
        ("--lam 0.9", "no dataset_name"),
        ("lam 0.9", "flags begin with --"),
        ("--dataset_name x --temperature 0", "temperature must be positive"),
        ("--config nowhere.yaml", "nowhere.yaml does not exist"),
    ],
)
def test_invalid_arguments_are_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(["migrate", "--", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert "error:" in error and message in error and "Traceback" not in error


def test_a_typo_in_the_yaml_and_an_existing_output(tmp_path, capsys):
    file = tmp_path / "trl.yaml"
    file.write_text("dataset_name: x\nnum_minibatches: 4\n")
    assert main(["migrate", "--config", str(file)]) == 2
    assert "did you mean 'num_mini_batches'" in capsys.readouterr().err
    file.write_text("dataset_name: x\n")
    assert main(["migrate", "--config", str(file), "--output", str(file)]) == 2
    assert "exists" in capsys.readouterr().err and file.read_text() == "dataset_name: x\n"
    file.write_text("- a list\n")
    with pytest.raises(ValueError, match="`name: value` lines"):
        read_given(MigrateArgs(file=str(file)))


def test_nothing_to_migrate(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["migrate"])
    assert ended.value.code == 2


def test_an_unknown_number_of_episodes_is_left_to_fill_in(capsys):
    assert main(["migrate", "--", "--dataset_name", "x", "--num_train_epochs", "2"]) == 0
    text = capsys.readouterr().out
    assert "# stop_token: null. Without it" in text
    assert "# total_episodes: N" in text and "# num_train_epochs: 2.0. " in text


# The real classes


@pytest.fixture
def peer() -> str:
    """An interpreter that has trl 1.12.0, or a skip."""
    python = Path(os.environ.get("RLHF_PPO_PEER") or ROOT / "build/peer/bin/python")
    if not python.exists():
        pytest.skip("trl 1.12.0 is not here; set RLHF_PPO_PEER to an interpreter that has it")
    return str(python)


@pytest.mark.slow
def test_the_field_list_is_the_real_one(peer):
    script = Path(__file__).with_name("dump_trl_fields.py")
    answer = subprocess.run([peer, str(script)], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == json.loads(FIELDS_FILE.read_text())["trl"]


@pytest.mark.slow
def test_trl_takes_the_steps_that_the_converter_says(peer):
    """And neither clips, nor computes in bf16, nor checkpoints, whatever its arguments say; warm-up is by rollouts."""
    script = Path(__file__).with_name("count_trl_steps.py")
    batches = json.dumps([trl_batch(*case[:3]) for case in STEPS])
    answer = subprocess.run([peer, str(script), batches], capture_output=True, text=True, check=True)
    for rates, (*_, steps) in zip(json.loads(answer.stdout.splitlines()[-1]), STEPS, strict=True):
        # Two rollouts of two epochs; the first rollout is the warm-up.
        assert rates == [0.0] * 2 * steps + [1e-3] * 2 * steps
