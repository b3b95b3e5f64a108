"""Make the pictures of docs/concepts: python docs/concept_images.py [kl value advantage ratio]

Every number comes from the project's own functions: short runs of the model in the package (about two minutes of a CPU
core; --runs keeps them), and the core's estimators on a random walk whose values are known.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.core import clipped_policy_loss, compute_gae, kl_estimate
from rlhf_ppo.data.files import load_rows
from rlhf_ppo.pipeline.demo import OPENINGS
from rlhf_ppo.rewards.toy import positive_sentiment

IMAGES = Path(__file__).parent / "images"
COEFFICIENTS = (0.2, 0.05, 0.0)
STATES = 19
"""Of the random walk between two ends, -1 on the left and +1 on the right (Sutton and Barto, example 6.2)."""


def figure(width: float, height: float) -> Figure:
    """Return an empty figure that can be saved."""
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def save(made: Figure, name: str) -> Path:
    """Write a picture into docs/images."""
    path = IMAGES / f"concept-{name}.png"
    made.savefig(path, dpi=110)
    print(f"{path}  {path.stat().st_size / 1e3:.0f} kB")
    return path


def openings() -> list[str]:
    """Return the story openings in the package."""
    return [str(row["prompt"]) for row in load_rows(OPENINGS)]


def train(folder: Path, kl_coef: float, episodes: int) -> Path:
    """Train the model in the package toward positive stories, unless the folder holds such a run; return the run."""
    path = folder / f"kl-{kl_coef:g}"
    if not (path / "model.safetensors").is_file():
        args = RLHFConfig(
            output_dir=str(path),
            total_episodes=episodes,
            kl_coef=kl_coef,
            num_epochs=2,
            samples_per_rollout=32,
            precision="fp32",
            num_threads=1,
            report=False,
            quiet=True,
        )
        rows = load_rows(OPENINGS)
        PPOTrainer(model="embedded", reward_funcs=positive_sentiment, args=args, train_dataset=rows).train()
    return path


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read a run's updates."""
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "kl/reference_nats_per_response" in row]


def estimates_per_response(model: Path, responses: int) -> dict[str, Tensor]:
    """Sample responses of a trained model, and sum each estimator of the KL to its start over them: [B] each."""
    args = RLHFConfig(output_dir=tempfile.mkdtemp(), precision="fp32", num_threads=1, quiet=True)
    trainer = PPOTrainer(model=str(model), ref_model="embedded", reward_funcs=positive_sentiment, args=args)
    rollout = trainer.rollout(openings()[:responses])
    assert rollout.ref_logprobs is not None
    return {name: kl_estimate(rollout.logprobs, rollout.ref_logprobs, name).sum(dim=1) for name in ("k1", "k2", "k3")}


def draw_kl(runs: Path, episodes: int) -> Path:
    """Draw what three coefficients pay for the score, and how three estimators spread."""
    paths = {coef: train(runs, coef, episodes) for coef in COEFFICIENTS}
    made = figure(10, 4)
    left, right = made.subplots(1, 2)
    for coef, path in paths.items():
        rows = read_metrics(path)
        kl, score = (np.array([row[name] for row in rows]) for name in ("kl/reference_nats_per_response", "score/mean"))
        smooth = max(1, len(rows) // 8)
        window = np.ones(smooth) / smooth
        kl, score = (np.convolve(x, window, mode="valid") for x in (kl, score))
        left.plot(kl, score, "-", linewidth=2, label=f"kl_coef {coef:g}")
        left.plot(kl[-1], score[-1], "o", color=left.lines[-1].get_color())
    left.set(xlabel="KL to the reference, nats per response", ylabel="score (positive sentiment)")
    left.set_title("What the score costs, with three coefficients")
    left.legend()
    sums = estimates_per_response(paths[0.05], 256)
    bins = np.linspace(-5, 25, 61)
    for name, values in sums.items():
        right.hist(values.clamp(-5, 25).numpy(), bins, histtype="step", linewidth=1.8, label=_spread(name, values))
    right.axvline(0, color="black", linewidth=0.8)
    right.set(xlabel="estimate for one response, nats", ylabel="responses")
    right.set_title("256 responses of one policy, three estimators")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return save(made, "kl")


def _spread(name: str, values: Tensor) -> str:
    return f"{name}: mean {float(values.mean()):.1f}, spread {float(values.std()):.1f}"


def draw_value(runs: Path, episodes: int) -> Path:
    """Draw what the critic expected before each token of the best and the worst response of a run's last rollout."""
    path = train(runs, 0.05, episodes)
    tokens, responses = pandas.read_parquet(path / "tokens"), pandas.read_parquet(path / "responses")
    last = tokens["iteration"].max()
    tokens, responses = tokens[tokens["iteration"] == last], responses[responses["iteration"] == last]
    responses = responses.sort_values("score")
    responses = responses[responses["tokens"] >= responses["tokens"].median()]
    made = figure(11, 6.4)
    for axes, (_, row), color in zip(
        made.subplots(2, 1), responses.iloc[[-1, 0]].iterrows(), ("C0", "C3"), strict=True
    ):
        shown = tokens[tokens["response"] == row["response"]].sort_values("position")
        places = range(len(shown))
        axes.plot(places, shown["value"], "o-", color=color, markersize=4, label="value: expected before this token")
        axes.axhline(row["score"], color="black", linestyle="--", linewidth=1, label=f"score, {row['score']:.2f}")
        axes.set_xticks(places, [text.replace("\n", " ").strip() for text in shown["text"]], rotation=60, fontsize=8)
        axes.set_ylabel("score")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="center right")
    made.suptitle("The critic's value along two responses that it has not trained on", fontsize=11)
    return save(made, "value")


def random_walks(count: int, seed: int) -> list[tuple[list[int], float]]:
    """Walk at random from the middle to an end: the states of each walk, and its reward, -1 or 1."""
    draw = np.random.default_rng(seed)
    walks = []
    for _ in range(count):
        states = [(STATES + 1) // 2]
        while 0 < (following := states[-1] + (1 if draw.random() < 0.5 else -1)) <= STATES:
            states.append(following)
        walks.append((states, 1.0 if following > STATES else -1.0))
    return walks


def lambda_errors(lambdas: Sequence[float], walks: int = 4000, seed: int = 0) -> dict[str, list[float]]:
    """Measure how far advantages under each lambda are off, for a critic that is wrong in every state.

    Going right is worth 0.2 more than going left, everywhere. ``bias`` is the error of the measured difference over
    all walks; ``noise`` is the standard deviation of one advantage around the mean of its state and action.
    """
    draw = np.random.default_rng(seed + 1)
    true = np.arange(STATES + 2) / (STATES + 1) * 2 - 1
    critic = torch.tensor(true + draw.normal(0, 0.2, STATES + 2))
    episodes = random_walks(walks, seed)
    longest = max(len(states) for states, _ in episodes)
    states = torch.zeros(walks, longest, dtype=torch.long)
    mask = torch.zeros(walks, longest, dtype=torch.bool)
    rewards = torch.zeros(walks, longest, dtype=torch.float64)
    ended = torch.zeros(walks, longest, dtype=torch.bool)
    for row, (walk, reward) in enumerate(episodes):
        states[row, : len(walk)], mask[row, : len(walk)] = torch.tensor(walk), True
        rewards[row, len(walk) - 1], ended[row, len(walk) - 1] = reward, True
    values = critic[states]
    next_values = torch.cat([values[:, 1:], torch.zeros(walks, 1, dtype=values.dtype)], dim=1)
    right = torch.cat([states[:, 1:] > states[:, :-1], torch.zeros(walks, 1, dtype=torch.bool)], dim=1)
    right = torch.where(ended, rewards > 0, right)
    groups = (2 * states + right)[mask].numpy()
    found: dict[str, list[float]] = {"bias": [], "noise": []}
    for gae_lambda in lambdas:
        advantages, _ = compute_gae(
            rewards, values, next_values, ended, torch.zeros_like(ended), gamma=1.0, gae_lambda=gae_lambda, mask=mask
        )
        table = pandas.DataFrame({"group": groups, "advantage": advantages[mask].numpy()}).groupby("group")["advantage"]
        means = table.mean().to_numpy().reshape(-1, 2)
        found["bias"].append(float(np.sqrt(np.mean((means[:, 1] - means[:, 0] - 0.2) ** 2))))
        found["noise"].append(float(np.sqrt(np.mean(table.var()))))
    return found


def draw_advantage() -> Path:
    """Draw the two errors of an advantage against lambda."""
    lambdas = np.array([0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1])
    found = lambda_errors(lambdas.tolist())
    made = figure(8, 4.2)
    axes = made.subplots()
    axes.plot(lambdas, found["bias"], "o-", linewidth=2, label="bias: what the critic's mistakes add")
    axes.plot(lambdas, found["noise"], "s-", linewidth=2, label="noise of one advantage: what chance adds")
    axes.plot(lambdas, np.array(found["noise"]) / 8, "s--", label="noise of a mean over 64")
    axes.axhline(0.2, color="black", linewidth=0.8, linestyle=":")
    axes.annotate("what going right is really worth more than left", (0.02, 0.21), fontsize=8)
    axes.set(xlabel="gae_lambda", ylabel="error of an advantage", ylim=(0, None))
    axes.set_title("A random walk whose values are known, and a critic that is wrong", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend()
    return save(made, "advantage")


def clip_fraction(num_epochs: int, learning_rate: float) -> float:
    """Make one update of the model in the package, always on one rollout; return the share of clipped tokens."""
    args = RLHFConfig(
        output_dir=tempfile.mkdtemp(),
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        num_epochs=num_epochs,
        precision="fp32",
        num_threads=1,
        quiet=True,
    )
    trainer = PPOTrainer(model="embedded", reward_funcs=positive_sentiment, args=args)
    return trainer.step(trainer.rollout(openings()[:32]))["policy/clip_fraction"]


def draw_ratio() -> Path:
    """Draw the objective's two cases with their gradients, and the clipped share over the epochs of an update."""
    made = figure(12, 4)
    *cases, epochs = made.subplots(1, 3)
    ratio = torch.linspace(0.4, 1.8, 701)
    for axes, advantage, color in zip(cases, (1.0, -1.0), ("C0", "C3"), strict=True):
        logprobs = ratio.log().requires_grad_()
        loss = clipped_policy_loss(logprobs, torch.zeros_like(ratio), torch.full_like(ratio, advantage))
        (slope,) = torch.autograd.grad(-loss.sum(), logprobs)
        axes.plot(ratio, -loss.detach(), linewidth=2, color=color, label="objective")
        axes.plot(ratio, slope / ratio, "--", color="grey", label="its slope: 0 is no gradient")
        axes.axvspan(0.8, 1.2, color="grey", alpha=0.12, linewidth=0)
        axes.set(xlabel="ratio r = new / old probability", ylim=(-2, 2))
        axes.set_title(
            f"A {'>' if advantage > 0 else '<'} 0: a {'good' if advantage > 0 else 'bad'} token", fontsize=11
        )
        axes.legend(fontsize=8, loc="lower left" if advantage > 0 else "upper right")
    counts = (1, 2, 4, 6, 8)
    for learning_rate in (3e-4, 1e-4, 3e-5):
        shares = [clip_fraction(count, learning_rate) for count in counts]
        epochs.plot(counts, shares, "o-", linewidth=2, label=f"learning_rate {learning_rate:g}")
    epochs.axhspan(0.01, 0.3, color="C2", alpha=0.12, linewidth=0, label="healthy")
    epochs.set(xlabel="epochs over one rollout", ylabel="policy/clip_fraction")
    epochs.set_title("The same rollout, trained on for longer", fontsize=11)
    epochs.legend(fontsize=8)
    for axes in (*cases, epochs):
        axes.grid(alpha=0.3)
    return save(made, "ratio")


def main(argv: Sequence[str] | None = None) -> None:
    """Make the pictures that are named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="kl, value, advantage, ratio (default: all of them)")
    parser.add_argument("--runs", type=Path, default=None, help="folder that keeps the runs (default: a temporary one)")
    parser.add_argument("--episodes", type=int, default=1024, help="responses of each run")
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        runs = flags.runs or Path(temporary)
        pictures = {
            "kl": lambda: draw_kl(runs, flags.episodes),
            "value": lambda: draw_value(runs, flags.episodes),
            "advantage": draw_advantage,
            "ratio": draw_ratio,
        }
        if unknown := set(flags.names) - set(pictures):
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(pictures)}")
        for name in flags.names or pictures:
            pictures[name]()


if __name__ == "__main__":
    main()
