"""The command line: help for every flag, YAML under flags, bad input as one clear line, runs end to end."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from classic.cli import main as classic_main
from rlhf_ppo import __version__
from rlhf_ppo.cli import COMMANDS, main
from rlhf_ppo.pipeline.demo import DemoArgs, demo_trainer, print_paths
from rlhf_ppo.runtime.command_line.settings_help import positional, sentences
from rlhf_ppo.settings_page import settings_page

REWARD = (
    "def vowels(prompts, completions, **columns):\n    return [sum(c in 'aeiou' for c in t) for t in completions]\n"
)


@pytest.fixture
def folder(tmp_path, make_model, tokenizer, monkeypatch) -> Path:
    """A working folder with a model, a reward file and prompts."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [{"question": f"the cat {word}"} for word in ("sat", "ran", "ate", "saw", "hid", "won", "lay", "met")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN = (
    "train --model model --reward reward.py:vowels --dataset prompts.jsonl --prompt-column question --output-dir run "
    "--total-episodes 8 --rollout-batch-size 4 --num-minibatches 2 --max-new-tokens 4 --eval-size 2 --device cpu"
).split()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_sentence_for_every_flag(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    names = {field.name for field in fields(COMMANDS[command][0])}
    assert names <= set(sentences(COMMANDS[command][0]))
    names -= set(positional(COMMANDS[command][0]))  # words without a flag
    assert all(f"--{name.replace('_', '-')}" in text for name in names)


def test_critic_record_takes_the_flags_of_train_and_trains_nothing(folder, capsys):
    Path("train.yaml").write_text("learning_rate: 1e-3\nnum_epochs: 2\nsave_rollouts_gb: 0.5\nquiet: true\n")
    assert main(["critic", "record", "--config", "train.yaml", *TRAIN[1:]]) == 0
    assert "2 rollouts, 8 responses, " in (said := capsys.readouterr().out) and "recorded in run/rollouts" in said
    lines = Path("run/rollouts/rollout-000001.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    assert len(lines) == 4 and row["prompt"].startswith("the cat ") and row["score"] == row["score_parts"]["vowels"]
    assert not Path("run/metrics.jsonl").exists() and not Path("run/model.safetensors").exists()
    other = [*TRAIN, "--output-dir", "replayed"]
    other.remove("--output-dir"), other.remove("run")
    assert main([*other, "--replay", "run", "--num-epochs", "2"]) == 0
    assert "replay/kl_nats_per_response" in Path("replayed/metrics.jsonl").read_text()
    assert main([*other, "--replay", "run", "--temperature", "0.5"]) == 2
    assert "sampled with temperature=1.0, this run has temperature=0.5: set it so" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["critic", "record", *TRAIN[1:], "--resume", "run"])
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "resume_from_checkpoint='run', but `critic record` samples from model as it is: drop it" in said
    with pytest.raises(SystemExit):
        main(["critic", "record", *TRAIN[1:], "--replay", "run"])
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "replay='run' trains on rollouts that are recorded already, but `critic record` samples new ones" in said
    one = " ".join(TRAIN[1:]).replace("--output-dir run --total-episodes 8", "--output-dir one --total-episodes 4")
    assert main(["critic", "record", *one.split(), "--quiet"]) == 0
    assert "1 rollout, 4 responses, " in capsys.readouterr().out
    assert main(["critic", "recrod", *TRAIN[1:]]) == 2
    assert "unknown command 'recrod'; did you mean 'record'?" in capsys.readouterr().err


GAME = """
asked = []

def reply(messages):
    asked.append(len(messages))
    return " and" if len(messages) < 4 else None

def calls(prompts, completions, **columns):
    return [float(len(asked) + len(text)) for text in completions]
"""


def test_train_with_a_hook_from_a_file_shares_the_files_state_with_its_reward(folder, capsys):
    Path("game.py").write_text(GAME)
    flags = ["--reward", "game.py:calls", "--respond", "game.py:reply", "--max-turns", "3"]
    assert main([*TRAIN, *flags]) == 0
    rows = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert {row["turns"] for row in rows} == {2}
    # Of one file, run once: the reward saw the hook's calls.
    assert all(row["score"] > len(row["completion"]) for row in rows)
    assert main([*TRAIN, "--respond", "game.py:reply"]) == 2
    assert "max_turns=1" in capsys.readouterr().err
    assert main([*TRAIN, "--respond", "game.py:gone", "--max-turns", "2"]) == 2
    assert "respond 'game.py:gone': game.py has no function 'gone'" in capsys.readouterr().err


LETTERS = """
class Letters:
    def reset(self, row):
        return f"say {row['letter']}"

    def step(self, messages):
        return " again", float("e" in messages[-1]["content"]), False

def longer(prompts, completions, **columns):
    return [float(len(text)) for text in completions]
"""


def test_train_and_evaluate_with_an_environment_from_a_file(folder, capsys):
    """The rows have no prompts; the environment's reward alone, then beside another; evaluate finds it in run.json."""
    Path("letters.py").write_text(LETTERS)
    Path("letters.jsonl").write_text("".join(json.dumps({"letter": x}) + "\n" for x in "abcdefghij"))
    bare = " ".join(TRAIN).replace("--reward reward.py:vowels --dataset prompts.jsonl --prompt-column question ", "")
    bare += " --dataset letters.jsonl"
    flags = [*bare.split(), "--environment", "letters.py:Letters"]
    assert main([*flags, "--max-turns", "2"]) == 0
    row = json.loads(Path("run/samples.jsonl").read_text().splitlines()[0])
    assert row["prompt"].startswith("say ") and row["turns"] == 2
    assert json.loads(Path("run/run.json").read_text())["environment"] == "letters.py:Letters"
    asked = ["evaluate", "--model", "run", "--dataset", "letters.jsonl", "--reward", "letters.py:longer", "--quiet"]
    assert main([*asked, "--output-dir", "found"]) == 0
    report = json.loads(Path("found/evaluation.json").read_text())
    assert {"reward: environment", "reward: longer", "turns"} <= set(report["model"])
    assert report["judge_was_trained_on"]
    capsys.readouterr()
    assert main([*flags[:-1], "letters.py:Gone", "--max-turns", "2"]) == 2
    assert "environment 'letters.py:Gone': letters.py has no function 'Gone'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(bare.split())
    assert "nothing scores the responses" in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_a_hook_that_fails_is_one_line_and_its_traceback(folder, capsys):
    Path("game.py").write_text("def reply(messages):\n    return 1 / 0\n")
    assert main([*TRAIN, "--respond", "game.py:reply", "--max-turns", "2"]) == 1
    shown = capsys.readouterr().err
    assert "error: respond raised ZeroDivisionError" in shown and "return 1 / 0" in shown


def test_train_runs_end_to_end_and_the_result_generates(folder, capsys, pictures):
    assert main(TRAIN) == 0
    shown = capsys.readouterr().out
    assert "2 held-out prompts, before and after" in shown
    assert {"model.safetensors", "metrics.jsonl", "curve.png", "run.json"} <= {f.name for f in Path("run").iterdir()}
    assert main(["generate", "--model", "run", "--prompt", "a cat", "--max-new-tokens", "3", "--num-samples", "2"]) == 0
    assert capsys.readouterr().out.count("a cat|") == 2


def test_flags_win_over_yaml_and_yaml_over_defaults(folder):
    Path("c.yaml").write_text("learning_rate: 1e-3\nnum_epochs: 3\nkl_target: null\nreward: [reward.py:vowels]\n")
    assert main([*TRAIN, "--config", "c.yaml", "--num-epochs", "2"]) == 0
    settings = json.loads(Path("run/run.json").read_text())
    assert (settings["learning_rate"], settings["num_epochs"], settings["kl_target"]) == (1e-3, 2, None)
    assert settings["gae_lambda"] == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--dataset", "promts.jsonl"], "promts.jsonl does not exist"),
        (["--prompt-column", "qestion"], "did you mean 'question'"),
        (["--reward", "reward.py:vowel"], "has no function 'vowel'"),
        (["--reward", "rewards.py:vowels"], "rewards.py does not exist"),
        (["--eval-size", "8"], "leaves nothing of the 8 prompts"),
        (["--max-new-tokens", "64"], "leaves no room for a prompt"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(folder, capsys, change, message):
    flags = list(TRAIN)
    position = flags.index(change[0]) if change[0] in flags else None
    if position is None:
        flags += change
    else:
        flags[position + 1] = change[1]
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert "error:" in error and message in error and "Traceback" not in error


def test_a_bad_prompt_has_its_number_in_the_file_whatever_is_set_aside(folder, capsys):
    Path("prompts.jsonl").write_text("".join(json.dumps({"question": "" if i == 3 else "a"}) + "\n" for i in range(8)))
    for seed in ("0", "1", "2"):
        assert main([*TRAIN, "--seed", seed]) == 2
        assert "prompts.jsonl row 3: the prompt is empty" in capsys.readouterr().err


def test_contradicting_flags_name_both(folder, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*TRAIN, "--merge-adapter", "True"])
    assert ended.value.code == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "merge_adapter" in error and "lora_rank" in error


def test_a_typo_in_a_flag_gets_a_suggestion(folder, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*TRAIN, "--learning-rat", "1e-3"])
    assert ended.value.code != 0
    assert "--learning-rate" in capsys.readouterr().err


def test_a_failing_reward_ends_with_its_traceback_and_exit_code_1(folder, capsys):
    Path("reward.py").write_text("def vowels(prompts, completions, **columns):\n    return 1 / 0\n")
    assert main(TRAIN) == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error and "return 1 / 0" in error and "failed_rollout.jsonl" in error
    assert Path("run/model.safetensors").exists()


@pytest.mark.parametrize("answer", ["[0.0]", "['1'] * len(prompts)", "[float('nan')] * len(prompts)"])
def test_a_reward_that_answers_wrongly_ends_with_what_it_said_alone(folder, capsys, answer):
    Path("reward.py").write_text(f"def vowels(prompts, completions, **columns):\n    return {answer}\n")
    assert main(TRAIN) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.count("reward function 'vowels'") == 1 and "failed_rollout.jsonl" in error


def test_lora_from_the_command_line_saves_adapter_and_merged_model(folder):
    assert main([*TRAIN, "--lora-rank", "2", "--merge-adapter", "True"]) == 0
    assert Path("run/adapter_model.safetensors").exists() and Path("run/merged/model.safetensors").exists()


def test_one_trunk_from_yaml_and_flags(folder):
    """Policy adapter, value adapter and the rest of what models can be told, without a line of Python."""
    Path("one_trunk.yaml").write_text(
        "lora_rank: 2\nlora_alpha: 6\nlora_target_modules: all-linear\ncritic: adapter\n"
        "value_learning_rate: 1e-3\ngradient_checkpointing: true\n"
    )
    assert main([*TRAIN, "--config", "one_trunk.yaml", "--critic-warmup-rollouts", "1"]) == 0
    policy, value = (json.loads(Path(p, "adapter_config.json").read_text()) for p in ("run", "run/value"))
    assert (policy["r"], policy["lora_alpha"], policy["lora_dropout"]) == (2, 6, 0.0)
    assert any("c_fc" in name for name in policy["target_modules"])
    assert sorted(value["target_modules"]) == sorted(policy["target_modules"])
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [m["optim/value_learning_rate"] for m in metrics if "policy/loss" in m] == pytest.approx([5e-4, 0.0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--split test", "split='test': prompts.jsonl is a single file, which has no splits: leave split out"),
        ("--eval-split test", "eval_split='test' is a split of eval_dataset, which is not given"),
        (
            "--eval-dataset prompts.jsonl",
            "eval_size=2 sets rows of dataset aside, but the evaluation reads",
        ),
        ("--resume-override True", "resume_override=True has no effect without a checkpoint to resume from"),
    ],
)
def test_flags_that_would_change_nothing_are_one_line(folder, capsys, flags, message):
    assert exit_code([*TRAIN, *flags.split()]) == 2
    assert message.replace(" ", "") in re.sub(r"[\s│]", "", capsys.readouterr().err)


def exit_code(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as ended:  # found while the flags were read
        return int(ended.code or 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lora-alpha 4", "lora_alpha=4 is about a LoRA adapter: set lora_rank"),
        ("--lora-target-modules c_attn", "lora_target_modules=('c_attn',) is about a LoRA adapter"),
        ("--quantization 4bit", "quantization='4bit' freezes the policy's weights, so an adapter must be trained"),
        ("--quantization 4bit --lora-rank 2", "needs a CUDA GPU, but device is 'cpu'"),
        (
            "--reference-dtype bfloat16 --lora-rank 2",
            "reference_dtype='bfloat16' sets the precision of a reference",
        ),
        ("--critic adapter", "critic='adapter' is a second adapter on the policy's base"),
        ("--offload-activations True", "offload_activations=True moves activations from a GPU"),
        (
            "--value-head-from nowhere",
            "value_head_from='nowhere' (no such folder here; read as a hub id): found neither value_head.safetensors "
            "nor model.safetensors; name the folder of a run, of `critic fit` or of a reward model",
        ),
    ],
)
def test_models_that_contradict_each_other_are_one_line(folder, capsys, flags, message):
    assert exit_code([*TRAIN, *flags.split()]) == 2
    assert message.replace(" ", "") in re.sub(r"[\s│]", "", capsys.readouterr().err)


def test_sft_continues_from_a_model(folder, capsys):
    Path("text.jsonl").write_text("".join(json.dumps({"text": "the cat sat. the dog ran."}) + "\n" for _ in range(20)))
    flags = "sft --model model --dataset text.jsonl --output-dir tuned --max-length 32 --eval-fraction 0.1"
    assert main(flags.split()) == 0
    assert "perplexity" in capsys.readouterr().out and Path("tuned/model.safetensors").exists()


def test_unknown_command(capsys):
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


def test_ctrl_c_saves_the_model_and_says_so(folder, capsys):
    Path("reward.py").write_text(
        "calls = []\n"
        "def vowels(prompts, completions, **columns):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3:\n"
        "        raise KeyboardInterrupt\n"
        "    return [float(i) for i in range(len(completions))]\n"
    )
    assert main(TRAIN) == 130
    assert "interrupted" in capsys.readouterr().err and Path("run/model.safetensors").exists()


def test_an_evaluation_may_read_another_split(folder, capsys):
    (folder / "data").mkdir()
    for split in ("train", "test"):
        (folder / f"data/{split}.jsonl").write_text(json.dumps({"question": f"a {split}"}) + "\n")
    flags = list(TRAIN)
    place = flags.index("--eval-size")
    del flags[place : place + 2]
    flags[flags.index("prompts.jsonl")] = "data"
    assert main([*flags, "--eval-dataset", "data", "--eval-split", "test"]) == 0
    rows = [json.loads(line) for line in Path("run/eval_samples.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in rows} == {"a test"}


@pytest.mark.parametrize("on_path", [True, False])
def test_the_hint_names_the_command_whatever_program_asks(monkeypatch, tmp_path, capsys, on_path):
    """An example is no command: what it prints at its end must be."""
    monkeypatch.setattr("sys.argv", ["examples/toy_reward.py"])
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/rlhf-ppo" if on_path else None)
    monkeypatch.setattr("sys.executable", str(tmp_path / "my env/bin/python"))
    monkeypatch.chdir(tmp_path)

    def hint() -> str:
        print_paths(Path("run"))
        return capsys.readouterr().out.splitlines()[-1].removeprefix("try it   ").removesuffix('--prompt "One day"')

    if on_path:
        assert hint() == "rlhf-ppo generate --model run "
        print_paths(Path("my runs/it's"))
        words = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("try it   "))
        assert words == ["rlhf-ppo", "generate", "--model", "my runs/it's", "--prompt", "One day"]
        return
    assert hint() == f"'{tmp_path}/my env/bin/python' -m rlhf_ppo.cli generate --model run "
    (tmp_path / "my env/bin").mkdir(parents=True)
    (tmp_path / "my env/bin/rlhf-ppo").touch()
    assert hint() == "'my env/bin/rlhf-ppo' generate --model run "


def test_the_page_of_settings_is_made_from_the_commands():
    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert page.read_text(encoding="utf-8") == settings_page(), "run `make docs`"
    assert "| `kl_coef` | `0.05` | " in page.read_text(encoding="utf-8")


def test_version_of_either_command(capsys):
    assert main(["--version"]) == 0
    assert classic_main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlhf-ppo {__version__}\nclassic-ppo {__version__}\n"
    # Only alone: a command's own flags are the command's.
    with pytest.raises(SystemExit):
        main(["check", "--version"])


def test_the_demo_takes_a_precision(monkeypatch):
    asked = {}
    monkeypatch.setattr("rlhf_ppo.pipeline.demo.PPOTrainer", lambda **arguments: asked.update(arguments))
    demo_trainer(DemoArgs(precision="bf16", num_threads=3))
    assert (asked["args"].precision, asked["args"].num_threads) == ("bf16", 3)
