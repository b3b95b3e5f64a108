"""Compare adapters on one base to separate models: memory saved, quality lost.

Run:  python benchmarks/one_trunk.py memory      (Linux; two minutes on two CPU cores)
      python benchmarks/one_trunk.py quality     (three critics, three seeds, about six minutes)
Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from speed_workloads import WORKLOADS, config, make_prompts, make_tokenizer
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedModel
from transformers.utils import logging

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.data.files import load_rows
from rlhf_ppo.models.adapters.lora import lora_config
from rlhf_ppo.pipeline.demo import HELD_OUT, OPENINGS

WORK = WORKLOADS["M"]  # GPT-2, 6 layers x 384, vocabulary 50257, random weights
ARRANGEMENTS = {
    "four models: policy, reference, critic, reward": {"value_model": "value"},
    "three: LoRA policy, critic, reward": {"value_model": "value", "lora": True},
    "two: LoRA policy with a shared trunk, reward": {"lora": True},
    "two: LoRA policy with a value adapter, reward": {"critic": "adapter", "lora": True},
}
CRITICS = {
    "shared trunk": {"critic": "shared"},
    "value adapter": {"critic": "adapter"},
    "separate critic": {"value_model": "embedded", "value_learning_rate": 1e-4},
}


def write_models(folder: Path) -> None:
    """Save the base, a separate critic's trunk and a reward model."""
    tokenizer = make_tokenizer(WORK)

    def save(model: PreTrainedModel, name: str) -> None:
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    torch.manual_seed(0)
    save(GPT2LMHeadModel(config(WORK)), "base")
    save(GPT2ForSequenceClassification(config(WORK)), "value")
    save(GPT2ForSequenceClassification(config(WORK)), "classifier")


def memory_of(name: str, folder: Path, episodes: int) -> dict[str, float]:
    """Run one iteration in this process; return its static bytes and its peak."""
    plan = ARRANGEMENTS[name]
    before = _peak()
    trainer = PPOTrainer(
        model=str(folder / "base"),
        reward_funcs=str(folder / "classifier"),
        value_model=str(folder / plan["value_model"]) if "value_model" in plan else None,
        peft_config=lora_config(8) if plan.get("lora") else None,
        args=RLHFConfig(
            output_dir=str(folder / "run"),
            critic=plan.get("critic", "auto"),
            rollout_batch_size=episodes,
            max_new_tokens=WORK.new_tokens,
            num_epochs=1,
            precision="fp32",
            device="cpu",
            quiet=True,
        ),
    )
    trainer.step(trainer.rollout(make_prompts(WORK)[:episodes]))
    held = {id(p): p for p in trainer.model.parameters()}
    for model in (trainer.reference.model, *(getattr(f, "model", None) for f, _ in trainer.fixed.rewards.values())):
        held.update({} if model is None else {id(p): p for p in model.parameters()})
    trained = sum(p.numel() * p.element_size() for p in trainer.model.trainable_parameters())
    weights = sum(p.numel() * p.element_size() for p in held.values())
    # A gradient and Adam's two moments for each trained weight.
    return {"weights": weights, "static": weights + 3 * trained, "peak": _peak(), "start": before}


def _peak() -> float:
    # Not getrusage, which reports the parent's peak if that was larger.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * float(status.partition("VmHWM:")[2].split()[0])


def memory(episodes: int) -> None:
    """Measure each arrangement in a new process, because a process's peak never falls."""
    print("| models | weights, MB | with gradients and optimizer, MB | peak of the process, MB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        for name in ARRANGEMENTS:
            command = [sys.executable, __file__, "memory", "--only", name, "--folder", folder]
            done = subprocess.run(
                [*command, "--episodes", str(episodes)], capture_output=True, text=True, check=True, timeout=600
            )
            row = json.loads(done.stdout.splitlines()[-1])
            megabytes = [f"{row[key] / 1e6:.0f}" for key in ("weights", "static", "peak")]
            print(f"| {name} | " + " | ".join(megabytes) + " |", flush=True)
            start = row["start"]
    print(f"A process that has only imported the libraries peaks at {start / 1e6:.0f} MB.")


def quality_of(critic: str, seed: int, episodes: int) -> dict[str, float]:
    """Train the embedded model toward positive stories; the policy is always a LoRA adapter."""
    openings = load_rows(OPENINGS)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            model="embedded",
            reward_funcs="rlhf_ppo.rewards.toy:positive_sentiment",
            value_model=CRITICS[critic].get("value_model"),
            peft_config=lora_config(8, target_modules=("all-linear",)),
            args=RLHFConfig(
                output_dir=folder,
                critic=CRITICS[critic].get("critic", "auto"),
                value_learning_rate=CRITICS[critic].get("value_learning_rate"),
                total_episodes=episodes,
                learning_rate=1e-3,
                num_epochs=2,
                num_threads=1,
                precision="fp32",
                device="cpu",
                seed=seed,
                quiet=True,
            ),
            train_dataset=openings.select(range(HELD_OUT, len(openings))),
            eval_dataset=openings.select(range(HELD_OUT)),
        )
        last = trainer.train()
        rows = [row for row in trainer.run.read() if "value/explained_variance" in row]
        first = next(row for row in trainer.run.read() if "eval/score_mean" in row)
    return {
        "before": first["eval/score_mean"],
        "score": last["eval/score_mean"],
        "kl": last["eval/kl_nats_per_response"],
        "explained": statistics.fmean(row["value/explained_variance"] for row in rows[-8:]),
    }


def quality(seeds: int, episodes: int) -> None:
    """Print mean and standard deviation over seeds."""
    print("| critic | score before | score after | KL, nats/response | explained variance |")
    print("|---|---|---|---|---|")
    for critic in CRITICS:
        runs = [quality_of(critic, seed, episodes) for seed in range(seeds)]
        cells = []
        for key, digits in (("before", 3), ("score", 3), ("kl", 2), ("explained", 2)):
            values = [run[key] for run in runs]
            cells.append(f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}")
        print(f"| {critic} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "quality"))
    parser.add_argument("--episodes", type=int, default=None, help="responses: 16 in the one iteration, 768 in a run")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the quality runs, 2 or more")
    parser.add_argument("--only", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if flags.only is not None:
        print(json.dumps(memory_of(flags.only, flags.folder, flags.episodes)))
    elif flags.what == "memory":
        memory(flags.episodes or 16)
    else:
        quality(flags.seeds, flags.episodes or 768)


if __name__ == "__main__":
    main()
