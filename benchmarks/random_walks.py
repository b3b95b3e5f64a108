"""Reproduce trlX's random walks: a tiny language model learns the shortest paths of a graph from a reward alone.

Run:  python benchmarks/random_walks.py --picture docs/images/random-walks.png     (about a CPU minute a seed)
The model first imitates 1,000 random walks; PPO then sees one start and is paid, at the end, how short a valid way to
the goal it wrote: 1 for a shortest path, 0 for none within ten nodes. Graph, lengths, batch and PPO settings are trlX's
(examples/randomwalks, 2022); the graph, the walks and the model are drawn here with the same distributions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reproduction import Band, draw, reproduce
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf_ppo import PPOTrainer, RLHFConfig

NODES, LONGEST, GOAL = 21, 10, 0
LETTERS = [chr(ord("a") + node) for node in range(NODES)]
END, PAD = NODES, NODES + 1
BAND = Band("optimality", 0.93, 1.0)


def graph(seed: int = 1002) -> np.ndarray:
    """Draw which nodes lead to which [21, 21]: each pair with probability 0.1; the goal leads to itself alone."""
    random = np.random.RandomState(seed)
    while True:
        edges = random.rand(NODES, NODES) > 0.9
        np.fill_diagonal(edges, False)
        if edges.any(axis=1).all():
            break
    edges[GOAL] = False
    edges[GOAL, GOAL] = True
    return edges


def shortest(edges: np.ndarray) -> list[int]:
    """Return the nodes on the shortest way from each node to the goal, both ends counted; LONGEST if there is none."""
    lengths, reached = [LONGEST] * NODES, {GOAL}
    lengths[GOAL] = 1
    for length in range(2, LONGEST):
        reached |= {node for node in range(NODES) if any(edges[node, other] for other in reached)}
        for node in reached:
            lengths[node] = min(lengths[node], length)
    return lengths


def random_walks(edges: np.ndarray, count: int = 1000, seed: int = 1002) -> list[list[int]]:
    """Draw walks of at most ten nodes that end at the goal."""
    random, walks = np.random.RandomState(seed), []
    for _ in range(count):
        walk = [random.randint(1, NODES)]
        while walk[-1] != GOAL and len(walk) < LONGEST:
            walk.append(int(random.choice(np.nonzero(edges[walk[-1]])[0])))
        walks.append(walk)
    return walks


def optimality(edges: np.ndarray, walk: Sequence[int], best: Sequence[int]) -> float:
    """Score a walk: (10 - its length) / (10 - the shortest); 0 if a step is impossible or the goal is not reached."""
    for i, node in enumerate(walk):
        if not 0 <= node < NODES or (i and not edges[walk[i - 1], node]):
            return 0.0
        if node == GOAL:
            return (LONGEST - (i + 1)) / (LONGEST - best[walk[0]])
    return 0.0


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with a token for each node."""
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate([*LETTERS, ".", "-"])}, unk_token="-"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=".", pad_token="-")


@functools.cache
def imitator(epochs: int = 8) -> GPT2LMHeadModel:
    """Train the start of all runs on the walks: a GPT-2 of 6 layers x 144."""
    torch.manual_seed(0)
    sizes = {"n_positions": 16, "n_embd": 144, "n_layer": 6, "n_head": 12}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=NODES + 2, bos_token_id=END, eos_token_id=END, **sizes, **dropout))
    walks = [[*walk, END] for walk in random_walks(graph())]
    ids = torch.tensor([walk + [PAD] * (LONGEST + 1 - len(walk)) for walk in walks])
    labels = ids.masked_fill(ids == PAD, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(ids)).split(50):
            optimizer.zero_grad()
            model(input_ids=ids[rows], labels=labels[rows]).loss.backward()
            optimizer.step()
    return model.eval()


def run(seed: int, folder: str, rollouts: int = 40) -> dict[str, Any]:
    """Train once; return the curve of the held-out optimality."""
    edges = graph()
    best = shortest(edges)
    starts = sorted({walk[0] for walk in random_walks(edges)})

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        walks = [prompt + text for prompt, text in zip(prompts, completions, strict=True)]
        return [optimality(edges, [ord(letter) - ord("a") for letter in walk], best) for walk in walks]

    model = GPT2LMHeadModel(imitator().config)
    model.load_state_dict(imitator().state_dict())
    trainer = PPOTrainer(
        model=model,
        reward_funcs=reward,
        processing_class=tokenizer(),
        args=RLHFConfig(
            output_dir=folder,
            seed=seed,
            total_episodes=128 * rollouts,
            rollout_batch_size=128,
            num_minibatches=1,
            num_epochs=4,
            max_new_tokens=LONGEST - 1,
            learning_rate=3e-4,
            lr_scheduler_type="constant",
            kl_coef=0.05,
            gae_lambda=0.95,
            eval_every=5,
            quiet=True,
        ),
        train_dataset=[{"prompt": LETTERS[node]} for node in starts],
        eval_dataset=[{"prompt": LETTERS[node]} for node in starts] * 8,
    )
    trainer.train()
    curve = [
        {"x": row["progress/episodes"], "optimality": row["eval/score_mean"], "kl": row["eval/kl_nats_per_response"]}
        for row in trainer.run.read()
        if "eval/score_mean" in row
    ]
    return {"before": curve[0]["optimality"], "optimality": curve[-1]["optimality"], "curve": curve}


def picture(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw optimality against responses."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6))
    draw(axis, rows, "optimality", f"mean of {len(rows)} seeds", "tab:blue")
    axis.axhspan(BAND.low, BAND.high, color="tab:green", alpha=0.15, label="tolerance at the end")
    axis.set(xlabel="responses", ylabel="optimality (1: shortest paths)", ylim=(0, 1.02))
    axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    torch.set_num_threads(1)
    reproduce(__doc__, "random-walks", run, picture, BAND)


if __name__ == "__main__":
    main()
