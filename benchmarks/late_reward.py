"""A late reward: the first of 256 tokens decides it, and it is paid at the last one. Which settings still learn?

Run:  python benchmarks/late_reward.py --seeds 0 1 2 3 4 --picture docs/images/late-reward.png
(a quarter of a CPU minute per arm and seed). All arms are PPO with a value head on the policy's own trunk, the same
rates and the same number of rollouts, those of the value pretraining included. Prints one row per arm: means over seeds
and their 95 % intervals (Student's t). With --json FILE the curves are kept, and seeds that are in the file are not run
again.

The task, for other benchmarks: ``late_task(folder)`` writes the model and returns it with its prompts, reward and
settings.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf_ppo import PPOTrainer, RLHFConfig

LENGTH, STAGES, SYNONYMS = 256, 8, 4
ROLLOUTS, PRETRAINING = 24, 8
ARMS: dict[str, dict[str, Any]] = {
    "lambda 0.95, cold critic": {"gae_lambda": 0.95},
    "value pretraining": {"gae_lambda": 0.95, "critic_warmup_rollouts": PRETRAINING},
    "separate lambdas": {"gae_lambda": 0.95, "gae_lambda_value": 1.0},
    "both (VC-PPO)": {"gae_lambda": 0.95, "gae_lambda_value": 1.0, "critic_warmup_rollouts": PRETRAINING},
    "lambda 1, cold critic": {"gae_lambda": 1.0},
}
GAP, EXPLAINED, SCORE, KL = "gap", "value/explained_variance", "score/mean", "kl/reference_nats_per_response"
AT = PRETRAINING + 1
COLUMNS = [
    ("score, rollouts 13 to 16", SCORE, slice(12, 16)),
    ("score, 17 to 24", SCORE, slice(16, 24)),
    (f"gap of values, {AT}", GAP, slice(AT - 1, AT)),
    (f"explained variance, {AT}", EXPLAINED, slice(AT - 1, AT)),
    ("KL to the start, nats, 17 to 24", KL, slice(16, 24)),
]
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
# Eight words a stage: four bright, then four dark ones.
WORDS = ["<end>", "ask"] + [
    f"{kind}{stage}{letter}"
    for stage in range(1, STAGES + 1)
    for kind in ("bright", "dark")
    for letter in "abcd"[:SYNONYMS]
]
ASK, FIRST = WORDS.index("ask"), WORDS.index("bright1a")


class LateTask(NamedTuple):
    """What a trainer needs: a tiny language model, its prompts, the reward and settings that the task asks for."""

    model: str
    prompts: list[str]
    reward: Any
    settings: dict[str, Any]


def opening_score(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Score 1 if the first word is bright, else 0; what follows does not count."""
    return [float(text.lstrip().startswith("bright")) for text in completions]


def late_task(folder: str | Path) -> LateTask:
    """Train the task's language model (some seconds, once per folder) and return the task.

    A text passes through eight stages, each with four bright and four dark words of its own. Its first word is any of
    the first stage at even odds, and all after it are of the same kind. So what the policy chooses later is irrelevant,
    and a critic can read at any place how the text began; but each stage says it by other words, so that what the
    critic has learned about the end tells it little about the beginning.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        _tokenizer().save_pretrained(folder)
        _language_model().save_pretrained(folder)
    settings = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "gamma": 1.0, "precision": "fp32", "device": "cpu"}
    return LateTask(str(folder), ["ask"], opening_score, settings)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>", unk_token="<end>")


def _texts(count: int, generator: torch.Generator) -> torch.Tensor:
    """Sample texts [count, 1 + LENGTH]: the prompt, then words of one kind, stage by stage."""
    dark = torch.randint(0, 2, (count, 1), generator=generator)
    stage = torch.arange(LENGTH) * STAGES // LENGTH
    word = torch.randint(0, SYNONYMS, (count, LENGTH), generator=generator)
    return torch.cat([torch.full((count, 1), ASK), FIRST + SYNONYMS * (2 * stage + dark) + word], dim=1)


def _language_model(steps: int = 200) -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"n_positions": 1 + LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 2, "tie_word_embeddings": False}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), bos_token_id=0, eos_token_id=0, **sizes))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        ids = _texts(8, generator)
        # The first word is one of 256: it gets a weight of its own, so that its odds are even.
        loss = model(input_ids=ids, labels=ids).loss + 0.1 * model(input_ids=ids[:, :2], labels=ids[:, :2]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def run_arm(task: LateTask, arm: str, seed: int) -> dict[str, list[float]]:
    """Train once; return metric -> its value at every rollout."""
    curves: dict[str, list[float]] = {name: [] for name in (SCORE, EXPLAINED, KL)}

    def note(_: PPOTrainer, metrics: dict[str, float]) -> None:
        for name, curve in curves.items():
            curve.append(metrics[name])

    with tempfile.TemporaryDirectory() as folder:
        args = RLHFConfig(
            output_dir=folder,
            seed=seed,
            total_episodes=32 * ROLLOUTS,
            kl_coef=1e-3,
            learning_rate=3e-4,
            value_learning_rate=1e-3,
            num_epochs=2,
            save_rollouts=True,
            quiet=True,
            **task.settings,
            **ARMS[arm],
        )
        rows = [{"prompt": prompt} for prompt in task.prompts * 32]
        trainer = PPOTrainer(task.model, task.reward, args, rows, callbacks=[note])
        trainer.train()
        curves[GAP] = [_gap(load_file(path)) for path in sorted(Path(folder).glob("rollouts/*.safetensors"))]
    return curves


def _gap(rollout: dict[str, torch.Tensor]) -> float:
    """Return how much more the critic expects after a bright first word than after a dark one; NaN: one is absent."""
    bright = rollout["scores"] > 0.5
    after = rollout["values"][:, 1]
    return float(after[bright].mean() - after[~bright].mean())


def show(found: dict[str, dict[str, dict[str, list[float]]]]) -> None:
    """Print the table."""
    print(f"| arm | seeds | {' | '.join(label for label, _, _ in COLUMNS)} |")
    print("|---" * (2 + len(COLUMNS)) + "|")
    for arm, runs in found.items():
        cells = []
        for _, name, part in COLUMNS:
            mean, half = summary([statistics.fmean(curves[name][part]) for curves in runs.values()])
            cells.append(f"{mean:.2f}" + (f" ± {half:.2f}" if half else ""))
        print(f"| {arm} | {len(runs)} | {' | '.join(cells)} |")


def summary(values: Iterable[float]) -> tuple[float, float]:
    """Return mean and half the 95 % interval over runs; a gap that a run could not measure (NaN) is left out."""
    known = [value for value in values if not math.isnan(value)]
    half = STUDENT_T[len(known)] * statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else 0.0
    return (statistics.fmean(known) if known else math.nan), half


def draw(found: dict[str, dict[str, dict[str, list[float]]]], path: Path) -> None:
    """Plot score and what the critic knows after the first word, mean over seeds and 95 % interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {
        SCORE: "score: share of texts that begin with a bright word",
        GAP: "V after a bright first word less V after a dark one (the truth: 1)",
    }
    for place, (name, label) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, 2, place)
        for arm, runs in found.items():
            at = [summary(values) for values in zip(*(curves[name] for curves in runs.values()), strict=True)]
            mean, half = zip(*at, strict=True)
            axes.plot(range(1, len(at) + 1), mean, label=arm, linewidth=1.8)
            low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
            axes.fill_between(range(1, len(at) + 1), low, high, alpha=0.15)
        axes.axvline(PRETRAINING + 0.5, color="gray", linestyle=":", linewidth=1)
        axes.set_xlabel("rollouts of 32 responses (dotted: end of the value pretraining)")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
        axes.set_ylim(-0.1, 1.1)
        if name == SCORE:
            axes.legend(fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--json", type=Path, default=None, help="keep the curves here, and add to what is there")
    parser.add_argument("--model", type=Path, default=Path("build/late-first-word"), help="folder of the task's model")
    parser.add_argument("--picture", type=Path, default=None, help="PNG to write")
    flags = parser.parse_args()
    task = late_task(flags.model)
    found = json.loads(flags.json.read_text()) if flags.json is not None and flags.json.is_file() else {}
    for seed in flags.seeds:
        for arm in flags.arms:
            runs = found.setdefault(arm, {})
            if str(seed) in runs:
                continue
            started = time.process_time()
            runs[str(seed)] = run_arm(task, arm, seed)
            print(f"seed {seed}, {arm}: {time.process_time() - started:.0f} CPU seconds", flush=True)
            if flags.json is not None:
                flags.json.write_text(json.dumps(found) + "\n")
    show(found)
    if flags.picture is not None:
        draw(found, flags.picture)


if __name__ == "__main__":
    main()
