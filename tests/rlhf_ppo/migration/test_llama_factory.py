"""Migrating from LLaMA-Factory: its arithmetic, data and reward models are carried over; a migrated file trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from rlhf_ppo.cli import main
from rlhf_ppo.config.arguments.commands import MigrateArgs
from rlhf_ppo.migration import llama_factory
from rlhf_ppo.migration.reading import Given, read_given

PPO = """
stage: ppo
do_train: true
model_name_or_path: policy
reward_model: scored
reward_model_type: full
finetuning_type: full
dataset: alpaca, talks
template: llama3
cutoff_len: 512
output_dir: run
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
ppo_buffer_size: 2
ppo_epochs: 1
num_train_epochs: 1
learning_rate: 1.0e-5
lr_scheduler_type: cosine
warmup_ratio: 0.5
max_new_tokens: 4
temperature: 1.0
report_to: none
save_steps: 500
"""
BASE = {
    "stage": "ppo",
    "model_name_or_path": "policy",
    "reward_model": "reward",
    "reward_model_type": "full",
    "dataset": "some",
    "output_dir": "run",
}


def convert(given: dict, processes: int = 1, rows: int | None = None) -> dict:
    return llama_factory.convert(Given("llama-factory", BASE | given, "", Path(), processes, {}), rows).settings


def test_its_defaults_hold_where_nothing_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = convert({})
    assert (ours["kl_coef"], ours["kl_target"], ours["kl_horizon"], ours["gae_lambda"]) == (0.2, 6.0, 10_000, 0.95)
    assert (ours["lora_rank"], ours["lora_alpha"], ours["lora_target_modules"]) == (8, 16, ["all-linear"])
    assert (ours["max_new_tokens"], ours["temperature"], ours["num_epochs"]) == (1024, 0.95, 4)
    assert (ours["clip_range_vf"], ours["normalize_values"], ours["eval_size"]) == (0.2, False, 0)
    assert ours["learning_rate"] == ours["value_learning_rate"] == 5e-5
    assert "dataset" not in ours and "total_episodes" not in ours


def test_batches_length_and_warm_up_are_counted_as_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batches = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "ppo_buffer_size": 3,
        "ppo_epochs": 2,
    }
    # 2 x 4 x 3 = 24 responses a process; 100 rows are 4 whole rollouts of 24, and two passes 8.
    ours = convert({**batches, "num_train_epochs": 2.0, "warmup_ratio": 0.25}, rows=100)
    assert (ours["rollout_batch_size"], ours["num_minibatches"], ours["total_episodes"]) == (24, 3, 8 * 24)
    assert ours["warmup_steps"] == 2 * 2 * 3  # 2 rollouts of 2 epochs of 3 steps
    ours = convert({**batches, "max_steps": 5}, processes=4)
    assert (ours["rollout_batch_size"], ours["num_minibatches"], ours["total_episodes"]) == (96, 3, 5 * 96)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"ppo_score_norm": True}, {"normalize_scores": True}),
        ({"ppo_target": 3.0}, {"kl_target": 3.0}),
        ({"finetuning_type": "full"}, {"lora_rank": None}),
        (
            {"lora_target": "q_proj, v_proj", "lora_rank": 4},
            {"lora_target_modules": ["q_proj", "v_proj"], "lora_alpha": 8},
        ),
        ({"adapter_name_or_path": "sft"}, {"model": "sft", "ref_model": "policy"}),
        ({"adapter_name_or_path": "sft", "create_new_adapter": True}, {"model": "sft", "ref_model": None}),
        ({"ref_model": "ref"}, {"ref_model": "ref"}),
        ({"quantization_bit": 4}, {"quantization": "4bit"}),
        ({"flash_attn": "fa2"}, {"attn_implementation": "flash_attention_2"}),
        ({"flash_attn": "auto"}, {"attn_implementation": None}),
        ({"bf16": True}, {"precision": "bf16"}),
        ({"max_grad_norm": 0.0}, {"max_grad_norm": 1e9}),
        ({"max_new_tokens": -1, "max_length": 30}, {"max_new_tokens": 30}),
        ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}),
        ({"report_to": ["wandb"]}, {"report_to": ["wandb"]}),
        ({"reward_model_type": "api", "reward_model": "http://h:1/s"}, {"reward": ["http://h:1/s"]}),
    ],
)
def test_meanings_are_converted(given, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = convert(given)
    assert {name: ours.get(name) for name in expected} == expected


def test_a_migrated_file_trains_and_its_prompts_are_chats(place, capsys):
    Path("ppo.yaml").write_text(PPO)
    assert main("migrate ppo.yaml --output ours.yaml".split()) == 0
    text = Path("ours.yaml").read_text()
    assert text.startswith("# For `rlhf-ppo train --config THIS_FILE`, from LLaMA-Factory 0.9's arguments in ppo.yaml.")
    assert "rollout_batch_size: 4  # 1 per device x 2 accumulated x 2 buffered x 1 process" in text
    assert "# top_p: 0.7 (not supported). " in text and "# template: llama3 (needs no setting). " in text
    rows = [json.loads(line) for line in Path("ours-prompts.jsonl").read_text().splitlines()]
    assert rows[0] == {"prompt": [{"role": "user", "content": "say\na word"}], "reference": "cat"}
    assert rows[1] == {"prompt": [{"role": "user", "content": "say no"}]}
    calm, question = {"role": "system", "content": "be calm"}, {"role": "user", "content": "good day"}
    assert rows[6] == {"prompt": [calm, question], "reference": "hello"}
    assert [m["role"] for m in rows[7]["prompt"]] == ["user", "assistant", "user"] and "reference" not in rows[7]
    # 8 rows are 2 rollouts of 4: the first half is the warm-up.
    ours = yaml.safe_load(text)
    assert (ours["total_episodes"], ours["num_minibatches"], ours["warmup_steps"]) == (8, 2, 2)
    assert main(["train", "--config", "ours.yaml", "--quiet", "True", "--report", "False"]) == 0
    run = json.loads(Path("run/run.json").read_text())
    assert (run["kl_target"], run["gae_lambda"], run["clip_range_vf"]) == (6.0, 0.95, 0.2)
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["progress/optimizer_steps"] for row in metrics if "policy/loss" in row] == [2, 4]


def test_rows_are_cut_as_max_samples_says(place):
    Path("ppo.yaml").write_text(PPO + "max_samples: 1\n")
    assert main("migrate ppo.yaml --output ours.yaml".split()) == 0
    assert len(Path("ours-prompts.jsonl").read_text().splitlines()) == 2


def test_the_policys_own_value_head_is_found(place):
    Path("ppo.yaml").write_text(PPO.replace("model_name_or_path: policy", "model_name_or_path: scored"))
    assert main("migrate ppo.yaml --output ours.yaml".split()) == 0
    assert yaml.safe_load(Path("ours.yaml").read_text())["value_head_from"] == "scored"


def test_flags_overrides_and_scripts_say_the_same(place, capsys):
    flags = " ".join(f"--{k} {v}" for k, v in yaml.safe_load(PPO).items() if k != "dataset") + " --dataset alpaca,talks"
    Path("ppo.yaml").write_text(PPO)
    Path("ppo.sh").write_text(f"export CUDA_VISIBLE_DEVICES=0,1\nllamafactory-cli train \\\n  {flags}\n")
    given = [
        read_given(MigrateArgs(**words))
        for words in (
            {"file": "ppo.yaml"},
            {"command_line": f"llamafactory-cli train {flags}"},
            {"command_line": "llamafactory-cli train ppo.yaml"},
            {"file": "ppo.sh"},
        )
    ]
    sets = [{**g.values, "report_to": None, "dataset": g.values["dataset"].replace(" ", "")} for g in given]
    assert [g.source for g in given] == ["llama-factory"] * 4 and sets[1:] == sets[:-1]
    assert [g.processes for g in given] == [1, 1, 1, 2]
    other = read_given(MigrateArgs(command_line="llamafactory-cli train ppo.yaml ppo_epochs=3 learning_rate=1e-6"))
    assert (other.values["ppo_epochs"], other.values["learning_rate"]) == (3, 1e-6)


def test_what_is_not_here_is_left_to_fill_in(place, capsys):
    Path("ppo.yaml").write_text(PPO.replace("alpaca, talks", "elsewhere"))
    assert main("migrate ppo.yaml --rows 40".split()) == 0
    text = capsys.readouterr().out
    assert "# dataset: FILE   (fill it in: chat prompts of elsewhere" in text and "someone/prompts" in text
    assert "total_episodes: 40  # 1 epochs x 40 rows in whole rollouts of 4" in text
    Path("data/dataset_info.json").unlink()
    assert main("migrate ppo.yaml --rows 40".split()) == 0
    assert "whose files dataset_info.json names" in capsys.readouterr().out.replace("\n#   ", " ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--stage sft", "stage is 'sft', but only PPO runs are migrated"),
        ("--stage ppo --dataset d", "no model_name_or_path"),
        ("--stage ppo --model_name_or_path m --dataset d", "no reward_model"),
        ("--stage ppo --model_name_or_path m --reward_model r", "no dataset"),
        ("--stage ppo --ppo_epoch 3", "did you mean 'ppo_epochs'"),
        ("--stage ppo --ppo_epochs many", "ppo_epochs: takes int, got 'many'"),
        ("OK --finetuning_type freeze", "finetuning_type is 'freeze'"),
        ("OK --finetuning_type full", "reward_model_type is 'lora' (its default)"),
        ("OK --reward_model_type api", "no http(s) address"),
        ("OK --reward_model_adapters a", "reward_model_adapters='a' has no counterpart: merge it first"),
        ("OK --adapter_name_or_path a,b", "names several adapters"),
        ("OK --warmup_ratio 0.1", "warmup_ratio=0.1 is a share of the run"),
        ("OK --ppo_buffer_size 0", "must be 1 or more"),
    ],
)
def test_what_has_no_counterpart_is_one_line_and_exit_code_2(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = flags.replace("OK", "--stage ppo --model_name_or_path m --reward_model r --dataset d").split()
    assert main(["migrate", "--", "llamafactory-cli", "train", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_a_data_set_that_is_not_described(place, capsys):
    Path("ppo.yaml").write_text(PPO.replace("alpaca, talks", "unknown"))
    assert main("migrate ppo.yaml".split()) == 2
    assert "'unknown' is not in data/dataset_info.json" in capsys.readouterr().err
    rows = json.loads(Path("data/alpaca.json").read_text())
    Path("data/alpaca.json").write_text(json.dumps([*rows, {"instruction": "", "output": "x"}]))
    Path("ppo.yaml").write_text(PPO)
    assert main("migrate ppo.yaml".split()) == 2
    assert "data set alpaca row 7 has no instruction" in capsys.readouterr().err


def test_the_projects_arguments_can_be_taken_for_another_ones_only_by_force(place, capsys):
    Path("ppo.yaml").write_text(PPO)
    assert main("migrate ppo.yaml --source trl".split()) == 2
    assert "stage: not an argument of TRL 1.12's PPO" in capsys.readouterr().err


# Reward models


def test_a_language_model_with_a_value_head_scores_as_there(place):
    """Its head reads the last hidden state of the last token, and has a bias."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf_ppo import RewardModel

    reward = RewardModel("scored")
    policy, tokenizer = AutoModelForCausalLM.from_pretrained("scored"), AutoTokenizer.from_pretrained("scored")
    from safetensors.torch import load_file

    head = load_file("scored/value_head.safetensors")
    for prompt, completion in (("the cat", " sat"), ("a", "b")):
        ids = torch.tensor([tokenizer(prompt + completion)["input_ids"]])
        last = policy(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        expected = last @ head["v_head.summary.weight"][0] + head["v_head.summary.bias"]
        torch.testing.assert_close(torch.tensor(reward([prompt], [completion])), expected.detach())


def test_a_pickled_head_is_refused_and_converted_as_the_page_says(place, monkeypatch):
    from safetensors.torch import load_file

    from rlhf_ppo import RewardModel

    whole = RewardModel("scored")(["the cat"], [" sat"])
    monkeypatch.chdir(place / "scored")
    torch.save(load_file("value_head.safetensors"), "value_head.bin")
    Path("value_head.safetensors").unlink()
    with pytest.raises(ValueError, match=r"value_head\.bin is a pickle.*save the tensors as value_head\.safetensors"):
        RewardModel(str(place / "scored"))
    page = (Path(__file__).parents[3] / "docs/coming-from/llama-factory.md").read_text(encoding="utf-8")
    exec(page.rpartition("```python\n")[2].partition("```")[0], {})
    assert RewardModel(str(place / "scored"))(["the cat"], [" sat"]) == whole


def test_an_adapter_with_a_value_head_scores_as_its_merged_model(place, make_model):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from rlhf_ppo import RewardModel

    config = LoraConfig(
        r=2, task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["c_attn"], fan_in_fan_out=True
    )
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained("policy"), config)
    adapted.save_pretrained("adapter")
    Path("adapter/value_head.safetensors").write_bytes(Path("scored/value_head.safetensors").read_bytes())
    merged = adapted.merge_and_unload()
    merged.save_pretrained("merged")
    for file in Path("policy").glob("tokenizer*"):
        Path("merged", file.name).write_bytes(file.read_bytes())
    Path("merged/value_head.safetensors").write_bytes(Path("scored/value_head.safetensors").read_bytes())
    texts = (["the cat", "a"], [" sat", "b"])
    assert RewardModel("adapter")(*texts) == pytest.approx(RewardModel("merged")(*texts), rel=1e-5)
