"""Explain a rollout: everything PPO computes about each action (a step or a token), as text, rows and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.core import Experience, PolicyOutput, PPOConfig, pool_old_logprobs, ppo_loss, probability_ratio

COLUMNS = (
    "sequence",
    "step",
    "label",
    "reward",
    "kl",
    "value",
    "delta",
    "advantage",
    "weight",
    "ended",
    "ratio",
    "clipped",
    "gradient_alive",
)


@dataclass(frozen=True)
class Explanation:
    """One row per action.

    sequence, step (place in the rollout), label (what was done), reward, kl (to the reference, in nats), value (V
    before the action), delta (``r + gamma V' - V``), advantage, weight (the advantage as it is trained on, usually
    whitened), ended (terminated, truncated or empty), ratio (new / old probability), clipped (above, below or empty: on
    which side of the clip range the ratio is, whatever the sign of the advantage), gradient_alive (whether the policy's
    loss has a gradient for this action). kl is None without a reference, value and delta without a critic, and the last
    three without a policy to compare with.
    """

    rows: list[dict[str, Any]]

    @property
    def columns(self) -> list[str]:
        """The columns that hold something."""
        return [column for column in COLUMNS if any(row[column] is not None for row in self.rows)]

    def of(self, sequence: int) -> Explanation:
        """Return the rows of one sequence."""
        return Explanation([row for row in self.rows if row["sequence"] == sequence])

    def text(self, max_rows: int | None = 60) -> str:
        """Format the rows as a plain-text table of at most ``max_rows`` rows; says how many are left out.

        Columns that hold nothing are left out.
        """
        shown, columns = self.rows[:max_rows], self.columns
        table = [[cell(row[column]) for column in columns] for row in shown]
        widths = [max(len(column), *(len(line[i]) for line in table)) for i, column in enumerate(columns)]
        lines = [
            "  ".join(said.rjust(width) for said, width in zip(line, widths, strict=True)) for line in [columns, *table]
        ]
        if len(shown) < len(self.rows):
            lines.append(f"... and {len(self.rows) - len(shown)} more rows")
        return "\n".join(lines)

    def to_dataframe(self) -> Any:
        """Return the rows as a pandas DataFrame, or as a list of dicts if pandas is not installed."""
        try:
            import pandas
        except ImportError:
            return self.rows
        return pandas.DataFrame(self.rows, columns=list(COLUMNS))

    def plot(self, path: str | Path, *, sequence: int | None = None) -> Path:
        """Draw one sequence and write a PNG: rewards and values, deltas and advantages, ratios and what the clip did.

        Args:
            path: the PNG to write.
            sequence: which; default: the first.
        Raises:
            ValueError: there is no such sequence.
        """
        known = sorted({row["sequence"] for row in self.rows})
        chosen = known[0] if sequence is None and known else sequence
        if chosen is None or chosen not in known:
            raise ValueError(f"there is no sequence {chosen}; known: {', '.join(map(str, known))}")
        return _draw(self.of(chosen).rows, Path(path), f"sequence {chosen}")


def explain_actions(
    *,
    rewards: Tensor,
    values: Tensor | None,
    next_values: Tensor | None,
    terminated: Tensor,
    truncated: Tensor,
    advantages: Tensor,
    old: Experience,
    new_logprobs: Tensor | None,
    config: PPOConfig,
    gamma: float,
    labels: Sequence[Sequence[str]],
    kl: Tensor | None = None,
) -> Explanation:
    """Tabulate what an update sees of each action, and the ratio and gradient under the current policy.

    Args:
        rewards: [B, T].
        values: [B, T] V(s_t), or None without a critic.
        next_values: [B, T] V at the next decision, ignored where terminated; None without a critic.
        terminated: [B, T] bool, the episode ended.
        truncated: [B, T] bool, the episode was cut.
        advantages: [B, T] before whitening.
        old: [B, T] the update's facts: recorded log-probs, the advantages to train on, the mask of real decisions.
        new_logprobs: [B, T] of the same actions under the policy now, or None without one.
        config: objective, clip ranges, ratio level.
        gamma: discount that ``delta`` takes.
        labels: [B][T] what each action was.
        kl: [B, T] in nats, to a reference.
    """
    moved = None if new_logprobs is None else _moved(new_logprobs, old, config)
    delta = None
    if values is not None and next_values is not None:
        delta = rewards + gamma * torch.where(terminated, torch.zeros_like(next_values), next_values) - values
    rows = []
    for b, t in old.mask.nonzero().tolist():
        numbers = (
            labels[b][t],
            float(rewards[b, t]),
            *(None if x is None else float(x[b, t]) for x in (kl, values, delta)),
            float(advantages[b, t]),
            float(old.advantages[b, t]),
            "terminated" if terminated[b, t] else "truncated" if truncated[b, t] else "",
            *((None, None, None) if moved is None else moved(b, t)),
        )
        rows.append(dict(zip(COLUMNS, (b, t, *numbers), strict=True)))
    return Explanation(rows)


def _moved(new_logprobs: Tensor, old: Experience, config: PPOConfig) -> Callable[[int, int], tuple[float, str, bool]]:
    """Compare the policy with the old one; returns what the last three columns say of the action at (b, t)."""
    alive = _gradient(new_logprobs, old, config) != 0
    compared = old.compared_logprobs(config)
    pooled = pool_old_logprobs(new_logprobs, compared, old.mask, level=config.ratio_level, turns=old.turns)
    ratio = probability_ratio(new_logprobs, pooled)
    above, below = _outside(ratio, config)

    def columns(b: int, t: int) -> tuple[float, str, bool]:
        side = "above" if above[b, t] else "below" if below[b, t] else ""
        return float(ratio[b, t]), side, bool(alive[b, t])

    return columns


def _gradient(new_logprobs: Tensor, old: Experience, config: PPOConfig) -> Tensor:
    """Compute the gradient [B, T] of the core's policy loss alone with respect to each log-prob."""
    leaf = new_logprobs.detach().clone().requires_grad_()
    alone = {"ent_coef": 0.0, "kl_loss_coef": 0.0, "kl_loss": "k2", "positive_loss_coef": 0.0}
    # Of the core's settings: a frontend's may be refused beside those that are switched off here.
    policy_alone = PPOConfig(**{field.name: getattr(config, field.name) for field in fields(PPOConfig)} | alone)
    with torch.enable_grad():
        loss = ppo_loss(PolicyOutput(leaf), replace(old, values=None, returns=None), policy_alone)
        (gradient,) = torch.autograd.grad(loss.policy, leaf)
    return gradient


def _outside(ratio: Tensor, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """Return [B, T] bool each: above, and below, the clip range; all False if the objective has none."""
    nowhere = torch.zeros_like(ratio, dtype=torch.bool)
    if config.objective in ("penalty", "a2c", "reinforce"):
        return nowhere, nowhere
    high = config.clip_range if config.clip_range_high is None else config.clip_range_high
    below = nowhere if config.objective == "cispo" else ratio < 1 - config.clip_range
    return ratio > 1 + high, below


def cell(value: Any) -> str:
    """Return a value as tables show it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _draw(rows: list[dict[str, Any]], path: Path, title: str) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(max(7.0, min(16.0, 0.22 * len(rows))), 7), layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    top.bar(steps, [row["reward"] for row in rows], color="C7", alpha=0.6, label="reward")
    middle.axhline(0, color="black", linewidth=0.8)
    middle.plot(steps, [row["advantage"] for row in rows], color="C0", linewidth=1.6, label="advantage")
    if rows[0]["value"] is not None:
        top.plot(steps, [row["value"] for row in rows], color="C1", linewidth=1.6, label="value")
        middle.bar(steps, [row["delta"] for row in rows], color="C1", alpha=0.5, label="delta")
    bottom.axhline(1, color="black", linewidth=0.8)
    for alive, color, label in ((True, "C2", "gradient alive"), (False, "C3", "no gradient")):
        chosen = [row for row in rows if row["gradient_alive"] is alive]
        if chosen:
            bottom.plot(
                [row["step"] for row in chosen], [row["ratio"] for row in chosen], "o", ms=4, c=color, label=label
            )
    for row in rows:
        if row["ended"]:
            for axes in (top, middle, bottom):
                axes.axvline(row["step"] + 0.5, color="C3" if row["ended"] == "terminated" else "C4", linestyle="--")
            top.annotate(
                row["ended"], (row["step"] + 0.5, 1), xycoords=("data", "axes fraction"), fontsize=8, ha="right"
            )
    bottom.set_ylabel("ratio new / old")
    if len(rows) <= 80:
        bottom.set_xticks(steps, [row["label"] for row in rows], rotation=90, fontsize=7)
    else:
        bottom.set_xlabel("step")
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="best")
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
