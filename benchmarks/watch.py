"""Watch runs of which some are broken on purpose: which symptoms are warned of, and does any healthy run alarm?

Run:  python benchmarks/watch.py                      (about 20 minutes on one idle CPU core; finished runs are kept)
      python benchmarks/watch.py --again              (judge the recorded curves by today's rules: a second)
      python benchmarks/watch.py --only length        (runs whose name begins like this)
Writes a line for each run into benchmarks/results/watch.jsonl, and prints the confusion table of docs/watch.md. Healthy
runs differ in reward, estimator, controller and seed; each broken run has one thing wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.data.files import load_rows
from rlhf_ppo.pipeline.demo import OPENINGS
from rlhf_ppo.rewards.toy import dialogue, no_letter_e, positive_sentiment
from rlhf_ppo.runtime.diagnosis.run_watch import RunWatch
from rlhf_ppo.runtime.logs.panel import LANGUAGE_MODEL, RunPanel
from rlhf_ppo.runtime.logs.progress import ProgressDisplay

RESULTS = Path(__file__).parent / "results" / "watch.jsonl"
ROLLOUTS = 26
SMALL: dict[str, Any] = {
    "total_episodes": 32 * ROLLOUTS,
    "max_new_tokens": 32,
    "num_epochs": 2,
    "precision": "fp32",
    "kl_coef": 0.05,
    "num_threads": 1,
    "quiet": True,
}
KEPT = (
    *("progress/iteration", "progress/episodes", "policy/loss", "score/mean", "score/std", "advantage/std"),
    *("policy/clip_fraction", "policy/approx_kl", "policy/entropy", "value/explained_variance", "value/return_mean"),
    *("kl/reference_nats_per_response", "kl/coef", "response/length_tokens", "response/eos_fraction"),
    *("response/repeated_fraction", "judge/score_mean", "optim/skipped_steps"),
)
"""Metrics that the watched rules read."""


def constant(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    return [1.0 for _ in completions]


def words(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """Number of short words: the shorter they are, the better."""
    return [float(sum(len(word) <= 2 for word in text.split())) for text in completions]


def one_word(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """How often one word is said."""
    return [float(text.lower().count(" happy")) for text in completions]


def brief(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    return [-len(text) / 10 for text in completions]


def variety(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """Share of words that are said once: what a judge might like."""
    return [len(set(text.split())) / max(1, len(text.split())) for text in completions]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run, and the symptoms that it may show; none: it is healthy."""

    name: str
    reward: Callable[..., list[float]]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    expected: tuple[str, ...] = ()
    judge: Callable[..., list[float]] | None = None


RLOO = {"advantage_estimator": "rloo", "num_generations": 4}
GRPO = {"advantage_estimator": "grpo", "num_generations": 4}
HEALTHY = [
    *(Trial(f"sentiment {seed}", positive_sentiment, {"seed": seed}) for seed in range(5)),
    *(Trial(f"sentiment {seed}, judge", positive_sentiment, {"seed": seed}, judge=variety) for seed in (5, 6)),
    *(Trial(f"dialogue {seed}", dialogue, {"seed": seed}) for seed in range(3)),
    *(Trial(f"no letter e {seed}", no_letter_e, {"seed": seed}) for seed in range(3)),
    *(Trial(f"RLOO {seed}", positive_sentiment, {"seed": seed, **RLOO}) for seed in range(2)),
    *(Trial(f"GRPO {seed}", positive_sentiment, {"seed": seed, **GRPO}) for seed in range(2)),
    Trial("kl_target 0", positive_sentiment, {"kl_target": 3.0, "kl_horizon": 100}),
    Trial("kl_coef 0.2", dialogue, {"kl_coef": 0.2}),
    Trial("penalty", positive_sentiment, {"objective": "penalty"}),
]
LOOSE = {"kl_coef": 0.0, "learning_rate": 3e-4}
BROKEN = [
    *(Trial(f"constant reward {seed}", constant, {"seed": seed}, ("no_signal",)) for seed in range(2)),
    *(
        Trial(f"learning rate x 100 {seed}", positive_sentiment, {"learning_rate": 1e-2, "seed": seed}, BIG)
        for seed in range(2)
        for BIG in [("too_fast", "kl", "collapse", "repetition")]
    ),
    *(
        Trial(f"exploitable, no KL {seed}", one_word, {**LOOSE, "seed": seed}, ("repetition", "kl", "collapse"))
        for seed in range(2)
    ),
    *(
        Trial(f"critic's rate {seed}", positive_sentiment, {"value_learning_rate": 0.3, "seed": seed}, ("critic",))
        for seed in range(2)
    ),
    *(Trial(f"pays for brevity {seed}", brief, {**LOOSE, "seed": seed}, ("length", "kl")) for seed in range(2)),
    *(
        Trial(f"a judge is deceived {seed}", one_word, {**LOOSE, "seed": seed}, ("judge",), judge=variety)
        for seed in range(2)
    ),
    Trial("kl_target missed", one_word, {**LOOSE, "kl_coef": 1e-4, "kl_target": 0.3, "kl_horizon": 4096}, ("kl",)),
]


def train(trial: Trial) -> dict[str, Any]:
    """Run a trial; returns its curves."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            model="embedded",
            reward_funcs=trial.reward,
            args=RLHFConfig(output_dir=folder, watch="off", **{**SMALL, **trial.settings}),
            train_dataset=load_rows(OPENINGS),
            judge_funcs=() if trial.judge is None else trial.judge,
        )
        trainer.train()
        rows = trainer.run.read()
        settings = dataclasses.asdict(trainer.args)
    curves = {key: [_short(row[key]) for row in rows] for key in KEPT if key in rows[0]}
    kept = {
        name: settings[name]
        for name in sorted({*SMALL, *trial.settings, "learning_rate", "kl_target", "rollout_batch_size"})
    }
    return {"run": trial.name, "minutes": (time.perf_counter() - started) / 60, "settings": kept, "curves": curves}


def _short(number: float) -> float:
    return number if isinstance(number, int) or number == 0 else float(f"{number:.4g}")


def warned(row: dict[str, Any]) -> dict[str, int]:
    """Return symptom -> update at which a run's watch warned of it."""
    watch, found = RunWatch(row["settings"]), dict[str, int]()
    length = len(row["curves"]["progress/iteration"])
    for i in range(length):
        metrics = {key: values[i] for key, values in row["curves"].items() if math.isfinite(values[i])}
        for advice in watch.add(metrics):
            found.setdefault(str(advice.rule.watched), i + 1)
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the confusion table of the runs so far."""
    lines = ["| runs | | warned of | at update |", "|---|---|---|---|"]
    healthy = [warned(rows[trial.name]) for trial in HEALTHY if trial.name in rows]
    alarms = [found for found in healthy if found]
    said = "; ".join(", ".join(f"{s} at {i}" for s, i in found.items()) for found in alarms)
    lines.append(f"| {len(healthy)} healthy | {len(alarms)} with a false alarm | {said or 'nothing'} | |")
    caught = 0
    for trial in BROKEN:
        if trial.name in rows:
            found = warned(rows[trial.name])
            hit = any(symptom in trial.expected for symptom in found)
            caught += hit
            shown, when = ", ".join(found) or "nothing", ", ".join(map(str, found.values()))
            lines.append(f"| {trial.name} | {'caught' if hit else 'missed'} | {shown} | {when} |")
    count = sum(trial.name in rows for trial in BROKEN)
    summary = f"{caught} of {count} broken runs caught, {len(alarms)} of {len(healthy)} healthy ones alarmed"
    return "\n".join([*lines, "", summary])


def draw_panel(row: dict[str, Any], file: Path) -> None:
    """Draw what a terminal shows at the end of a recorded run; the sample is one of the untrained model's."""
    progress = ProgressDisplay("episodes", 1536, panel=RunPanel(LANGUAGE_MODEL, {"kl_target": 6.0}))
    progress.console = progress._bar.live.console = Console(file=io.StringIO(), force_terminal=True)
    prompt, said = "One day, Timmy's friend Billy", "came over to play. They had lots of fun with the toy car."
    length = len(row["curves"]["progress/iteration"])
    with progress:
        progress.phase("update")
        for i in range(length):
            numbers = {key: values[i] for key, values in row["curves"].items()}
            progress.show({**numbers, "speed": 950.0 + 10 * math.sin(i)}, (prompt, said, 0.946))
        progress._bar.update(progress._task, completed=32 * length, left="0:00:37 left  1.0 s/iteration")
        screen = Console(record=True, file=io.StringIO(), width=84, force_terminal=True)
        screen.print(*progress._bar.get_renderables())
    file.write_text(screen.export_svg(title="rlhf-ppo train"), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="train nothing: judge the recorded curves")
    parser.add_argument("--only", default="", help="train runs whose name begins like this")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the curves are kept")
    parser.add_argument("--panel", type=Path, default=None, help="draw the terminal's panel of the first run (SVG)")
    flags = parser.parse_args()
    lines = flags.results.read_text().splitlines() if flags.results.is_file() else []
    rows = {row["run"]: row for row in map(json.loads, lines)}
    for trial in () if flags.again else [*HEALTHY, *BROKEN]:
        if trial.name.startswith(flags.only) and trial.name not in rows:
            rows[trial.name] = train(trial)
            print(f"{trial.name}: {rows[trial.name]['minutes']:.1f} min, {warned(rows[trial.name])}", flush=True)
            with flags.results.open("a") as file:
                file.write(json.dumps(rows[trial.name]) + "\n")
    print(table(rows))
    if flags.panel is not None:
        draw_panel(rows[HEALTHY[0].name], flags.panel)


if __name__ == "__main__":
    main()
