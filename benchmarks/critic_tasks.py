"""Tasks on which the critic is measured: make a trainer for one, or train it once and print a line of JSON.

Run:  python benchmarks/critic_tasks.py run sentiment --seed 0 --episodes 1024 --set value_learning_rate=1e-3
      python benchmarks/critic_tasks.py list
Every setting that no task and no --set names is the toolkit's default. Prompts are story openings, of which the first
96 are held out (`late` has a single prompt; see late_reward.py). Score and KL are over one response to each of these
(--draws: more), drawn alike before and after training. 512 episodes with both evaluations take a quarter of a CPU
minute on the GPT-2, two fifths on the small Llama or with LoRA, and four fifths on the Llama of 15 M (2026-11-28, one
AMD EPYC core with AVX512-BF16, busy machine).
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from late_reward import late_task, opening_score

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.data.files import load_rows
from rlhf_ppo.pipeline.demo import HELD_OUT, OPENINGS

LATE_MODEL = Path(__file__).resolve().parents[1] / "build/late-first-word"
STORIES_260K = "models/stories260K-hf-fp32"
STORIES_15M = "models/stories15M-hf-fp16"
MINILM = "models/minilm-sst2-reward-fp16"


def vowels(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Score 10 times the share of vowels in a text: mean 2.8, spread .3, far from 0 for its size."""
    return [10 * sum(c in "aeiou" for c in text.lower()) / max(len(text), 1) for text in completions]


def openings() -> tuple[Any, Any]:
    """Return the rows to train on, and held-out ones."""
    rows = load_rows(OPENINGS)
    return rows.select(range(HELD_OUT, len(rows))), rows.select(range(HELD_OUT))


def late_prompts() -> tuple[Any, Any]:
    """Return the late reward's prompt, as often as there are held-out openings, twice."""
    (prompt,) = late_task(LATE_MODEL).prompts
    rows = Dataset.from_list([{"prompt": prompt}] * HELD_OUT)
    return rows, rows


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


@dataclass(frozen=True)
class Task:
    """What a run learns; models that begin with ``models/`` are in the data folder."""

    says: str
    """One line for tables and pictures."""
    reward: Any
    kl_coef: float
    """The unit in which benchmarks vary kl_coef: about a tenth of the score's standard deviation before training."""
    model: str = "embedded"
    settings: dict[str, Any] = field(default_factory=lambda: {"num_epochs": 2})
    """What differs from the defaults, here as in the demo."""
    peft: Callable[[], Any] | None = None
    prompts: Callable[[], tuple[Any, Any]] = openings

    def sources(self) -> tuple[str, ...]:
        """Return the folders that it reads, relative to the data folder."""
        return tuple(s for s in (self.model, self.reward) if isinstance(s, str) and s.startswith("models/"))


TOY = "rlhf_ppo.rewards.toy:"
TASKS: dict[str, Task] = {
    "sentiment": Task("positive words (VADER), GPT-2 of 2 M", TOY + "positive_sentiment", 0.05),
    "no_e": Task("words without the letter e, GPT-2 of 2 M", TOY + "no_letter_e", 0.01),
    "dialogue": Task("text inside quotes, GPT-2 of 2 M", TOY + "dialogue", 0.01),
    "vowels": Task("10 x share of vowels, Llama of 260 k", vowels, 0.025, STORIES_260K, settings={}),
    "stories15m": Task(
        "sentiment model, Llama of 15 M", MINILM, 0.25, STORIES_15M, settings={"num_epochs": 2, "max_new_tokens": 24}
    ),
    "lora": Task("positive words (VADER), LoRA on GPT-2 of 2 M", TOY + "positive_sentiment", 0.05, peft=_lora),
    "late": Task(
        "the first word decides, paid after 256, GPT-2 of 38 k",
        opening_score,
        0.05,
        str(LATE_MODEL),
        settings={"num_epochs": 2, "max_new_tokens": 256, "min_new_tokens": 256},
        prompts=late_prompts,
    ),
}


def data_folder() -> Path:
    """Return the folder of models that are not in the package."""
    return Path(os.environ.get("RLHF_PPO_DATA") or "../shared/data").resolve()


def missing(task: str) -> str | None:
    """Return why a task cannot run here; None: it can."""
    absent = [source for source in TASKS[task].sources() if not (data_folder() / source).is_dir()]
    return f"{task} needs {data_folder() / absent[0]}: name its data folder by RLHF_PPO_DATA" if absent else None


def make_trainer(
    task: str,
    seed: int,
    output_dir: str | Path,
    episodes: int,
    *,
    draws: int = 1,
    callbacks: Any = None,
    **settings: Any,
) -> PPOTrainer:
    """Make a quiet trainer of a task that evaluates on held-out prompts.

    Args:
        task: a name of TASKS.
        draws: responses to each held-out prompt in an evaluation.
        settings: of :class:`rlhf_ppo.RLHFConfig`; they come before the task's own.
    Raises:
        ValueError: the task's models are not here, or settings are wrong.
    """
    if (reason := missing(task)) is not None:
        raise ValueError(reason)
    chosen = TASKS[task]
    place = {source: str(data_folder() / source) for source in chosen.sources()}
    reward = chosen.reward
    train, held_out = chosen.prompts()
    return PPOTrainer(
        model=place.get(chosen.model, chosen.model),
        reward_funcs=place.get(reward, reward) if isinstance(reward, str) else reward,
        args=RLHFConfig(
            **{"quiet": True, **chosen.settings, **settings},
            output_dir=str(output_dir),
            total_episodes=episodes,
            seed=seed,
        ),
        train_dataset=train,
        eval_dataset=held_out.select(list(range(len(held_out))) * draws),
        peft_config=chosen.peft() if chosen.peft is not None else None,
        callbacks=callbacks,
    )


def run_once(
    task: str, seed: int, episodes: int, output_dir: str | Path, *, draws: int = 1, **settings: Any
) -> dict[str, Any]:
    """Train once and measure.

    Returns:
        score_before, score (held out), kl (nats per response, held out), explained_variance (mean over the second
        half of the run) and explained_variance_all (None without a critic), cpu_seconds of train() with its
        evaluations, and the curve of evaluations: [episodes, score, KL] each.
    """
    trainer = make_trainer(task, seed, output_dir, episodes, draws=draws, **settings)
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    lines = trainer.run.read()
    curve = [
        [row["progress/episodes"], row["eval/score_mean"], row["eval/kl_nats_per_response"]]
        for row in lines
        if "eval/score_mean" in row
    ]
    name = "value/explained_variance"
    updates = [row for row in lines if "score/mean" in row]
    half = [row[name] for row in updates[len(updates) // 2 :] if name in row]
    whole = [row[name] for row in updates if name in row]
    return {
        "task": task,
        "seed": seed,
        "episodes": episodes,
        "draws": draws,
        "settings": settings,
        "score_before": curve[0][1],
        "score": curve[-1][1],
        "kl": curve[-1][2],
        "explained_variance": statistics.fmean(half) if half else None,
        "explained_variance_all": statistics.fmean(whole) if whole else None,
        "cpu_seconds": seconds,
        "curve": curve,
    }


def read_setting(text: str) -> tuple[str, Any]:
    """Read ``name=value``; the value as Python where it is one (1e-3, None, True, (1, 2)), else as text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="print the tasks, and which cannot run here")
    run = commands.add_parser("run", help="train once; print a line of JSON")
    run.add_argument("task", choices=TASKS)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--episodes", type=int, default=1536)
    run.add_argument("--draws", type=int, default=1, help="responses to each held-out prompt in an evaluation")
    run.add_argument("--set", type=read_setting, action="append", default=[], metavar="NAME=VALUE")
    run.add_argument("--out", type=Path, default=None, help="folder of the run (also gets result.json); default: none")
    flags = parser.parse_args()
    if flags.command == "list":
        for name, task in TASKS.items():
            print(f"{name}: {task.says}. {missing(name) or ''}")
        return
    with tempfile.TemporaryDirectory() as folder:
        place = flags.out or folder
        result = run_once(flags.task, flags.seed, flags.episodes, place, draws=flags.draws, **dict(flags.set))
    line = json.dumps(result)
    if flags.out is not None:
        (flags.out / "result.json").write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
