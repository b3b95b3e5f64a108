"""Migrating from ms-swift: a shell script is read without a shell, and a migrated file trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rlhf_ppo.cli import main
from rlhf_ppo.config.arguments.commands import MigrateArgs
from rlhf_ppo.migration.reading import read_given

SCRIPT = """
# 4 GPUs
nproc_per_node=4

NPROC_PER_NODE=$nproc_per_node \\
swift rlhf \\
    --rlhf_type ppo \\
    --model policy \\
    --reward_model classifier \\
    --train_type lora \\
    --dataset 'a/one#200' 'a/two#200' \\
    --split_dataset_ratio 0.1 \\
    --torch_dtype bfloat16 \\
    --num_train_epochs 1 \\
    --gradient_accumulation_steps $(expr 16 / $nproc_per_node) \\
    --eval_steps 5 \\
    --warmup_ratio 0.5 \\
    --output_dir run \\
    --response_length 4 \\
    --temperature 0.7
"""


def test_a_script_is_read_with_its_variables_sums_and_processes(place, capsys):
    Path("ppo.sh").write_text(SCRIPT)
    assert main(["migrate", "ppo.sh"]) == 0
    text = capsys.readouterr().out
    ours = yaml.safe_load(text)
    assert "from ms-swift 4's arguments in ppo.sh" in text
    # 16 / 4 accumulated of 1 on 4 processes; 400 rows, a tenth of them held out; 22.5 rollouts, half of them warm-up.
    assert ours["rollout_batch_size"] == 16 and "1 per device x 4 accumulated x 4 processes" in text
    assert (ours["total_episodes"], ours["eval_size"], ours["eval_every"]) == (360, 40, 5)
    assert ours["warmup_steps"] == 12 * 4
    assert (ours["lora_rank"], ours["lora_alpha"], ours["lora_target_modules"]) == (8, 32, ["all-linear"])
    assert (ours["model"], ours["reward"], ours["value_model"]) == ("policy", ["classifier"], "classifier")
    assert (ours["max_new_tokens"], ours["temperature"], ours["precision"]) == (4, 0.7, "bf16")
    assert (ours["learning_rate"], ours["overlong_prompts"], ours["dataset"]) == (1e-4, "drop", ["a/one", "a/two"])


def test_a_migrated_file_trains(place):
    rows = [
        {"messages": [{"role": "user", "content": f"the {w}"}, {"role": "assistant", "content": "so"}]} for w in "abcd"
    ]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = SCRIPT.replace("'a/one#200' 'a/two#200'", "chats.jsonl 'data/alpaca.json#2'").replace(
        "bfloat16", "float32"
    )
    script = script.replace("--split_dataset_ratio 0.1", "--tuner_type full").replace("--train_type lora", "")
    Path("ppo.sh").write_text(script.replace("=4\n", "=1\n").replace("expr 16", "expr 2"))
    assert main("migrate ppo.sh --output ours.yaml".split()) == 0
    prompts = [json.loads(line) for line in Path("ours-prompts.jsonl").read_text().splitlines()]
    assert prompts[0] == {"prompt": [{"role": "user", "content": "the a"}], "reference": "so"} and len(prompts) == 6
    assert main(["train", "--config", "ours.yaml", "--quiet", "True", "--report", "False"]) == 0
    run = json.loads(Path("run/run.json").read_text())
    assert (run["value_model"], run["learning_rate"], run["gae_lambda"]) == ("classifier", 1e-5, 0.95)


def test_yaml_saved_arguments_and_flags_say_the_same(place):
    values = {"rlhf_type": "ppo", "model": "policy", "reward_model": ["classifier"], "dataset": ["d"], "kl_coef": 0.1}
    Path("ppo.yaml").write_text(yaml.safe_dump(values))
    Path("args.json").write_text(json.dumps({**values, "swift_version": "4.6.0", "rank": -1}))
    flags = "--rlhf_type ppo --model policy --reward_model classifier --dataset d --kl_coef 0.1"
    words = [{"file": "ppo.yaml"}, {"file": "args.json"}, {"command_line": f"swift rlhf {flags}"}]
    for given in (read_given(MigrateArgs(**word)) for word in words):
        assert given.source == "ms-swift" and given.values == values


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rlhf_type grpo --model m", "rlhf_type is 'grpo', but only PPO runs are migrated"),
        ("--model m", "rlhf_type is 'dpo' (ms-swift's default)"),
        ("--rlhf_type ppo --model m --dataset d", "no reward_model"),
        ("--rlhf_type ppo --model m --reward_model r", "no dataset"),
        ("OK --kl_coeff 0.1", "did you mean 'kl_coef'"),
        ("OK --tuner_type boft", "tuner_type is 'boft'"),
        ("OK --reward_model r s", "reward_model names several models (r, s)"),
        ("OK --ref_adapters a", "ref_adapters has no counterpart"),
        ("OK --warmup_ratio 0.1", "is a share of the run"),
    ],
)
def test_what_has_no_counterpart_is_one_line_and_exit_code_2(flags, message, place, capsys):
    words = flags.replace("OK", "--rlhf_type ppo --model m --reward_model r --dataset d").split()
    assert main(["migrate", "--", "swift", "rlhf", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_what_only_a_shell_knows_is_asked_for(place, capsys):
    Path("ppo.sh").write_text("swift rlhf --rlhf_type ppo --model $MODEL\n")
    assert main(["migrate", "ppo.sh"]) == 2
    assert "the value $MODEL is known to the shell alone" in capsys.readouterr().err
    Path("ppo.sh").write_text("echo hello\n")
    assert main(["migrate", "ppo.sh"]) == 2
    assert "ppo.sh has no command that starts a run" in capsys.readouterr().err
