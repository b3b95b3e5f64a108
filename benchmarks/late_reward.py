"""A late reward: the first 8 of 256 tokens decide it, and it is paid at the last one. Which settings still learn?

Run:  python benchmarks/late_reward.py --seeds 0 1 2 3 4 --picture docs/images/late-reward.png
(about a CPU minute per arm and seed). All arms are PPO with a separate critic, the same rates and the same number of
rollouts, those of the value pretraining included. Prints one row per arm: means over seeds and their 95 % intervals
(Student's t). With --json FILE the curves are kept, and seeds that are in the file are not run again.

The task, for other benchmarks: ``late_task(folder)`` writes the model and returns it with its prompts, reward and
settings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf_ppo import PPOTrainer, RLHFConfig

LENGTH, OPENING = 256, 8
ROLLOUTS, PRETRAINING = 40, 8
ARMS: dict[str, dict[str, Any]] = {
    "lambda 0.95, cold critic": {"gae_lambda": 0.95},
    "value pretraining": {"gae_lambda": 0.95, "critic_warmup_rollouts": PRETRAINING},
    "separate lambdas": {"gae_lambda": 0.95, "gae_lambda_value": 1.0},
    "both (VC-PPO)": {"gae_lambda": 0.95, "gae_lambda_value": 1.0, "critic_warmup_rollouts": PRETRAINING},
    "lambda 1, cold critic": {"gae_lambda": 1.0},
}
COLUMNS = {
    "score/mean": "score, last 8 rollouts",
    "value/explained_variance": "explained variance, last 8 rollouts",
    "kl/reference_nats_per_response": "KL to the start, nats",
}
STUDENT_T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
ASKED = [f"ask{i}" for i in range(8)]
BRIGHT, DARK = ([f"{kind}{i}" for i in range(8)] for kind in ("bright", "dark"))
WORDS = ["<end>", *ASKED, "yes", "no", *BRIGHT, *DARK]
YES, NO = WORDS.index("yes"), WORDS.index("no")


class LateTask(NamedTuple):
    """What a trainer needs: a tiny language model, its prompts, the reward and settings that the task asks for."""

    model: str
    prompts: list[str]
    reward: Any
    settings: dict[str, Any]


def opening_score(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Score the share of "yes" among the first 8 words; what follows does not count."""
    return [text.split()[:OPENING].count("yes") / OPENING for text in completions]


def late_task(folder: str | Path) -> LateTask:
    """Train the task's language model (some seconds, once per folder) and return the task.

    Its texts open with 8 words, each "yes" or "no" at even odds; the more "yes", the more of the 248 words after them
    are bright. So the model's states tell at any place how the text began, and a critic can learn to read it.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        _tokenizer().save_pretrained(folder)
        _language_model().save_pretrained(folder)
    settings = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "gamma": 1.0, "precision": "fp32", "device": "cpu"}
    return LateTask(str(folder), ASKED, opening_score, settings)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>", unk_token="<end>")


def _texts(count: int, generator: torch.Generator) -> torch.Tensor:
    """Sample texts [count, 1 + LENGTH]: a question, the opening, the rest."""

    def draw(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator)

    asked, opening = draw(1, 1 + len(ASKED), count, 1), draw(0, 2, count, OPENING)
    share = (opening == 0).float().mean(dim=1, keepdim=True)
    bright = torch.rand(count, LENGTH - OPENING, generator=generator) < 0.1 + 0.8 * share
    body = NO + 1 + draw(0, 8, count, LENGTH - OPENING) + torch.where(bright, 0, len(BRIGHT))
    return torch.cat([asked, YES + opening, body], dim=1)


def _language_model(steps: int = 150) -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"n_positions": 1 + LENGTH, "n_embd": 48, "n_layer": 2, "n_head": 4}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), bos_token_id=0, eos_token_id=0, **sizes))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        ids = _texts(16, generator)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def run_arm(task: LateTask, arm: str, seed: int) -> dict[str, list[float]]:
    """Train once; return metric -> its value at every rollout."""
    curves: dict[str, list[float]] = {name: [] for name in COLUMNS}

    def note(_: PPOTrainer, metrics: dict[str, float]) -> None:
        for name, curve in curves.items():
            curve.append(metrics[name])

    with tempfile.TemporaryDirectory() as folder:
        args = RLHFConfig(
            output_dir=folder,
            seed=seed,
            total_episodes=32 * ROLLOUTS,
            kl_coef=0.0,
            learning_rate=1e-3,
            value_learning_rate=1e-3,
            vf_coef=0.5,
            clip_range_vf=None,
            num_epochs=2,
            quiet=True,
            **task.settings,
            **ARMS[arm],
        )
        rows = [{"prompt": prompt} for prompt in task.prompts]
        trainer = PPOTrainer(task.model, task.reward, args, rows, value_model=task.model, callbacks=[note])
        trainer.train()
    return curves


def show(found: dict[str, dict[str, dict[str, list[float]]]]) -> None:
    """Print the table."""
    print(f"| arm | seeds | {' | '.join(COLUMNS.values())} |")
    print("|---" * (2 + len(COLUMNS)) + "|")
    for arm, runs in found.items():
        cells = []
        for name in COLUMNS:
            values = [statistics.fmean(curves[name][-8:]) for curves in runs.values()]
            cells.append(f"{statistics.fmean(values):.3f}" + (f" ± {half_width(values):.3f}" if values[1:] else ""))
        print(f"| {arm} | {len(runs)} | {' | '.join(cells)} |")


def half_width(values: list[float]) -> float:
    return STUDENT_T[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def draw(found: dict[str, dict[str, dict[str, list[float]]]], path: Path) -> None:
    """Plot score and explained variance over rollouts, mean over seeds and 95 % interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {"score/mean": "score (0.5 by chance, at most 1)", "value/explained_variance": "explained variance"}
    for place, (name, label) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, 2, place)
        for arm, runs in found.items():
            at = list(zip(*(curves[name] for curves in runs.values()), strict=True))
            mean = [statistics.fmean(values) for values in at]
            half = [half_width(list(values)) if values[1:] else 0.0 for values in at]
            axes.plot(range(1, len(at) + 1), mean, label=arm, linewidth=1.8)
            low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
            axes.fill_between(range(1, len(at) + 1), low, high, alpha=0.15)
        axes.axvline(PRETRAINING + 0.5, color="gray", linestyle=":", linewidth=1)
        axes.set_xlabel("rollouts of 32 responses; left of the dotted line, pretraining is on the critic alone")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
        if name == "value/explained_variance":
            axes.set_ylim(-1, 1)
        else:
            axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--json", type=Path, default=None, help="keep the curves here, and add to what is there")
    parser.add_argument("--model", type=Path, default=Path("build/late-reward"), help="folder of the task's model")
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
