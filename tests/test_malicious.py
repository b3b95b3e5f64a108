"""Planted files: pickles and code beside models, checkpoints and data are never opened, let alone run."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

import classic
from rlhf_ppo.cli import main

ROOT = Path(__file__).parents[1]
CODE = [f for part in ("rlhf_ppo", "classic", "examples", "benchmarks") for f in sorted((ROOT / part).rglob("*.py"))]

PICKLES = ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "state.pkl", "random_states_0.pkl"]
WEIGHTS = ["pytorch_model.bin", "adapter_model.bin", "model.pt", "pytorch_model.pt", "value_head.bin"]
OPENED: list[str] = []
_watching = False


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event == "pickle.find_class":
        OPENED.append(f"pickle: {args}")
    if event in ("open", "exec"):
        name = str(args[0]) if event == "open" else getattr(args[0], "co_filename", "")
        if Path(name).name in {*PICKLES, *WEIGHTS, "evil.py", "trap.py"}:
            OPENED.append(name)


sys.addaudithook(_hook)  # Python has no way to take one off again; it does nothing while nobody watches


@contextmanager
def watching() -> Iterator[list[str]]:
    """Records every planted file that is opened meanwhile, and every class that a pickle looks up."""
    global _watching
    OPENED.clear()
    _watching = True
    try:
        yield OPENED
    finally:
        _watching = False


@contextmanager
def nothing_opened(marker: Path) -> Iterator[None]:
    with watching() as opened:
        yield
    assert not opened and not marker.exists()


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def plant(folder: Path, marker: Path, *, weights: bool = True) -> None:
    """Pickles under the names that other libraries open, and code that a config points to."""
    for name in [*PICKLES, *(WEIGHTS if weights else [])]:
        (folder / name).write_bytes(pickle.dumps(Trap(marker)))
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    for name, auto in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        if (file := folder / name).is_file():
            content = json.loads(file.read_text())
            content["auto_map"] = {auto: "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoModel": "evil.Evil"}
            file.write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a model, prompts, preferences and a reward."""
    monkeypatch.chdir(tmp_path)
    letters = {c: i for i, c in enumerate(["<eos>", "?", " ", *"abcdefghijklmnopqrstuvwxyz"])}
    core = Tokenizer(models.WordLevel(letters, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", bos_token="<eos>")
    config = GPT2Config(vocab_size=29, n_positions=32, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    tokenizer.save_pretrained("model")
    rows = [{"prompt": w, "chosen": " yes", "rejected": " no"} for w in ("cat", "dog", "cow", "hen", "owl", "bee")]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("reward.py").write_text(
        "def size(prompts, completions, **columns):\n    return [len(t) for t in completions]\n"
    )
    return tmp_path


TRAIN = (
    "train --model model --reward reward.py:size --dataset rows.jsonl --output-dir run --total-episodes 8 "
    "--rollout-batch-size 4 --num-minibatches 1 --max-new-tokens 3 --eval-size 0 --save-every 1 --device cpu --quiet"
)
COMMANDS = {
    "train": TRAIN,
    "generate": "generate --model model --prompt cat --max-new-tokens 2 --device cpu",
    "evaluate": "evaluate --model model --ref-model model --dataset rows.jsonl --reward reward.py:size "
    "--max-new-tokens 2 --output-dir out --device cpu --quiet",
    "sft": "sft --model model --dataset rows.jsonl --text-column prompt --output-dir out --num-epochs 1",
    "reward": "reward --model model --dataset rows.jsonl --output-dir out --device cpu --eval-fraction 0.4 --quiet",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_fault_28_pickles_and_code_beside_a_model_are_never_opened(folder, command):
    plant(folder / "model", folder / "marker")
    with nothing_opened(folder / "marker"):
        assert main(COMMANDS[command].split()) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_fault_28_weights_that_are_a_pickle_are_refused_unopened(folder, command, capsys):
    (folder / "model/model.safetensors").unlink()
    plant(folder / "model", folder / "marker")
    with nothing_opened(folder / "marker"):
        assert main(COMMANDS[command].split()) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "pytorch_model.bin, a pickle" in error and "save_pretrained" in error


@pytest.mark.parametrize("flag", ["--ref-model", "--value-model", "--reward"])
def test_fault_28_nor_are_the_other_models_of_a_run(folder, flag, capsys):
    shutil.copytree("model", "other")
    (folder / "other/model.safetensors").unlink()
    plant(folder / "other", folder / "marker")
    with nothing_opened(folder / "marker"):
        assert main([*TRAIN.split(), flag, "other"]) == 2
        assert "a pickle" in capsys.readouterr().err


def test_fault_28_an_index_that_names_a_pickle_is_refused(folder, capsys):
    """transformers opens whatever the index of a sharded model names."""
    (folder / "model/model.safetensors").rename(folder / "model/other.safetensors")
    plant(folder / "model", folder / "marker")
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": "pytorch_model.bin"}}
    (folder / "model/model.safetensors.index.json").write_text(json.dumps(index))
    with nothing_opened(folder / "marker"):
        assert main(COMMANDS["generate"].split()) == 2
        assert "model.safetensors.index.json has pytorch_model.bin, a pickle" in capsys.readouterr().err


def test_fault_28_an_adapter_that_is_a_pickle_is_refused(folder, capsys):
    (folder / "adapter").mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(folder / "model"), "task_type": "CAUSAL_LM"}
    (folder / "adapter/adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["c_attn"]}))
    plant(folder / "adapter", folder / "marker")
    with nothing_opened(folder / "marker"):
        for command in ("train", "generate"):
            assert main(COMMANDS[command].replace("--model model", "--model adapter").split()) == 2
            assert "adapter_model.bin, a pickle" in capsys.readouterr().err.replace(
                "pytorch_model.bin", "adapter_model.bin"
            )


def test_fault_33_a_model_that_is_custom_code_alone_is_refused(folder, capsys):
    plant(folder / "model", folder / "marker")
    config = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    with nothing_opened(folder / "marker"):
        for command in COMMANDS:
            assert main(COMMANDS[command].split()) == 2
            assert "which is never run here" in capsys.readouterr().err


def test_fault_28_pickles_in_a_checkpoint_and_in_a_runs_folder_are_never_opened(folder):
    assert main(TRAIN.split()) == 0
    plant(folder / "run/checkpoint-1", folder / "marker")
    plant(folder / "run", folder / "marker")
    with nothing_opened(folder / "marker"):
        assert main([*TRAIN.split(), "--resume-from-checkpoint", "run/checkpoint-1"]) == 0


def test_fault_28_pickles_in_an_agents_folder_are_never_opened(tmp_path):
    agent = classic.PPO("CartPole-v1", classic.PPOArgs(num_envs=2, num_steps=8, num_minibatches=2, quiet=True))
    agent.learn(16).save(tmp_path / "agent")
    plant(tmp_path / "agent", tmp_path / "marker")
    with nothing_opened(tmp_path / "marker"):
        assert classic.PPO.load(tmp_path / "agent").counters == agent.counters


def test_fault_28_a_data_sets_folder_runs_no_script(folder, capsys):
    (folder / "trap").mkdir()
    shutil.copy("rows.jsonl", "trap/rows.jsonl")
    (folder / "trap/trap.py").write_text(f"import pathlib\npathlib.Path({str(folder / 'marker')!r}).touch()\n")
    with nothing_opened(folder / "marker"):
        assert main(TRAIN.replace("--dataset rows.jsonl", "--dataset trap").split()) == 2
        assert "data set trap cannot be read" in capsys.readouterr().err


def test_the_watch_sees_what_it_watches_for(tmp_path):
    """Without this, the tests above could pass because nothing is ever recorded."""
    plant(tmp_path, tmp_path / "marker")
    with watching() as opened, (tmp_path / "state.pkl").open("rb") as file:
        pickle.load(file)
    assert opened[0].endswith("state.pkl") and "pickle: " in opened[1] and (tmp_path / "marker").exists()


BANNED_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
BANNED_CALLS = {"eval", "exec", "compile", "torch.load", "torch.save", "np.load", "numpy.load", "os.system", "os.popen"}
BANNED_CALLS |= {"yaml.load", "yaml.full_load", "yaml.unsafe_load"}


def banned(code: str) -> list[str]:
    """What a file does that could run somebody else's text as code."""
    found: list[str] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in BANNED_MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or ""] if (node.module or "").split(".")[0] in BANNED_MODULES else []
            found += [f"{node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in BANNED_CALLS]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            plain = called in ("np.load", "numpy.load") and given.get("allow_pickle") == "False"
            found += [called] if called in BANNED_CALLS and not plain else []
            found += [
                name for name in ("trust_remote_code", "shell", "allow_pickle") if given.get(name, "False") != "False"
            ]
            if called.endswith("from_pretrained") and "Auto" in called and given.get("trust_remote_code") != "False":
                found.append(f"{called} without trust_remote_code=False")
            if called.startswith("AutoModel") and called.endswith("from_pretrained"):
                found.append(f"{called}: read_weights reads safetensors alone")
    return found


COMPARES = {"benchmarks/oracles.py": ["exec"] * 3}
"""Runs lines of the peers' installed code, with which it compares ours."""


def test_faults_17_28_33_no_file_runs_text_as_code_opens_a_pickle_or_trusts_remote_code():
    found = {str(file.relative_to(ROOT)): banned(file.read_text(encoding="utf-8")) for file in CODE}
    assert len(found) > 100 and {name: calls for name, calls in found.items() if calls} == COMPARES


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "eval(x)",
        "from torch import load",
        "torch.load(f)",
        "AutoTokenizer.from_pretrained(x)",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=args.trust)",
        "subprocess.run(x, shell=True)",
        "yaml.load(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=False)",
    ],
)
def test_the_search_finds_what_it_looks_for(code):
    assert banned(code)
