"""Sentiment control of a pretrained model, with the adaptive controller holding 6 nats (lm-human-preferences).

Run:  python benchmarks/kl_control.py --picture docs/images/kl-control.png        (three CPU minutes a seed)
A Llama of 15 million parameters that writes children's stories is rewarded by a sentiment classifier's logit. The
controller of Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019), moves the KL coefficient so
that the policy stays 6 nats per response from its start. The models are read from the folder that RLHF_PPO_DATA names.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from critic_tasks import make_trainer, missing
from reproduction import Band, draw, reproduce

TARGET, EPISODES, WINDOW = 6.0, 3072, 4
HELD = Band("kl_last_quarter", 0.8 * TARGET, 1.2 * TARGET)
RISE = Band("score_rise", 0.5, 5.0)


def run(seed: int, folder: str) -> dict[str, Any]:
    """Train once; return score, KL and coefficient, averaged over windows of rollouts."""
    trainer = make_trainer(
        "stories15m",
        seed,
        folder,
        EPISODES,
        kl_coef=0.5,
        kl_target=TARGET,
        kl_horizon=600.0,
        learning_rate=1e-5,
        rollout_batch_size=64,
        lr_scheduler_type="constant",
    )
    trainer.train()
    rows = [row for row in trainer.run.read() if "score/mean" in row]
    columns = {
        "x": "progress/episodes",
        "score": "score/mean",
        "kl": "kl/reference_nats_per_response",
        "coefficient": "kl/coef",
    }
    curve = [
        {key: statistics.fmean(row[metric] for row in part) for key, metric in columns.items()}
        for part in (rows[i : i + WINDOW] for i in range(0, len(rows), WINDOW))
    ]
    last = curve[-len(curve) // 4 :]
    return {
        "kl_last_quarter": statistics.fmean(point["kl"] for point in last),
        "score_rise": statistics.fmean(point["score"] for point in last) - curve[0]["score"],
        "coefficient": curve[-1]["coefficient"],
        "curve": curve,
    }


def picture(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw KL, coefficient and score against responses, and score against KL."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.2))
    panels = {
        "kl": ("KL, nats per response", "tab:blue"),
        "coefficient": ("KL coefficient", "tab:gray"),
        "score": ("score", "tab:orange"),
    }
    for axis, (name, (title, color)) in zip(axes, panels.items(), strict=False):
        draw(axis, rows, name, name, color)
        axis.set(xlabel="responses", title=title)
    axes[0].axhline(TARGET, color="black", linestyle="dashed", linewidth=1)
    draw(axes[3], rows, "score", "score", "tab:green", x="kl")
    axes[3].set(xlabel="KL, nats per response", title="score against KL")
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    if (reason := missing("stories15m")) is not None:
        raise SystemExit(reason)
    reproduce(__doc__, "kl-control", run, picture, HELD, RISE)


if __name__ == "__main__":
    main()
