"""Train on problems whose optimum is known in closed form: what share of J* - J(reference) does PPOTrainer reach?

The policy is a small GPT-2 over six tokens, so that every completion of at most four can be enumerated. With the KL
penalty's coefficient beta the best policy is pi*(y|x) ~ pi_ref(y|x) exp(score(x, y) / beta), and
J* = beta log sum_y pi_ref(y|x) exp(score / beta).

    python benchmarks/closed_form.py                        # twenty CPU minutes: results, table and picture
    python benchmarks/closed_form.py --arms cispo --seeds 1 --results try.jsonl --settings '{"learning_rate": 3e-3}'

What the results file has already is not run again; delete it to start anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.models.forward.runner import Sequences
from rlhf_ppo.runtime.machine.threads import torch_threads
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.rewards import shape_rewards

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/closed_form.jsonl"
PICTURE = ROOT / "docs/images/closed-form.png"

EOS, LETTERS, LENGTH, BETA = "<|endoftext|>", "abcde", 4, 0.3
PROMPTS = ("a", "b")

GROUPS = {"num_generations": 8}
ARMS: dict[str, dict[str, Any]] = {
    "clip": {},
    "penalty": {"objective": "penalty"},
    # Bounds no step, so that it needs a smaller one, and more of them.
    "cispo": {"objective": "cispo", "learning_rate": 1e-3},
    "rloo": {"advantage_estimator": "rloo", **GROUPS},
    "grpo, mean only": {"advantage_estimator": "grpo", **GROUPS},
    "grpo": {"advantage_estimator": "grpo", "normalize_advantages": True, **GROUPS},
    "clip, whitened": {"normalize_advantages": True},
}
"""Settings that each arm changes. The last two divide advantages by a spread, and are there to show what that does."""

ROLLOUTS = {"cispo": 400}
"""Rollouts of an arm; of the others 300."""

SETTINGS: dict[str, Any] = {
    "kl_coef": BETA,
    "max_new_tokens": LENGTH,
    "rollout_batch_size": 128,
    "num_epochs": 2,
    "learning_rate": 1.5e-3,
    "normalize_advantages": False,
    "samples_per_rollout": 0,
    "device": "cpu",
    "precision": "fp32",
    "num_threads": 1,
    "quiet": True,
}


class Exact(NamedTuple):
    """Expectations under a policy, computed by enumeration; means over the prompts."""

    objective: Tensor
    """[] J = E[score] - beta KL."""
    kl: Tensor
    """[] KL to the reference in nats per response."""
    entropy: Tensor
    """[] entropy in nats per token."""
    length: Tensor
    """[] tokens per response."""


class Problem:
    """Prompts, all completions of each, their scores, and the reference's log-probs of them."""

    def __init__(self, seed: int) -> None:
        words = [tuple(word) for n in range(LENGTH + 1) for word in itertools.product(range(1, 6), repeat=n)]
        self.texts = ["".join(LETTERS[i - 1] for i in word) for word in words]
        generator = torch.Generator().manual_seed(1000 + seed)
        place = torch.randn(len(PROMPTS), LENGTH, 6, generator=generator)
        pair = torch.randn(len(PROMPTS), 6, 6, generator=generator)
        self.scores = torch.tensor(
            [
                [
                    0.4 * float(sum(place[x, i, word[i]] for i in range(len(word))))
                    + 0.4 * float(sum(pair[x, one, other] for one, other in itertools.pairwise(word)))
                    for word in words
                ]
                for x in range(len(PROMPTS))
            ],
            dtype=torch.float64,
        )
        self.score_of = {
            (prompt, text): float(self.scores[x, y])
            for x, prompt in enumerate(PROMPTS)
            for y, text in enumerate(self.texts)
        }
        ended = [(*word, 0) if len(word) < LENGTH else word for word in words]
        self.lengths = torch.tensor([len(word) for word in ended])
        self.ids = torch.tensor([[*word, *[0] * (LENGTH - len(word))] for word in ended])
        self.mask = torch.arange(LENGTH) < self.lengths[:, None]

    def reward(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        """Look the scores up."""
        return [self.score_of[pair] for pair in zip(prompts, completions, strict=True)]

    def logprobs(self, model: Any, *, entropy: bool = False) -> tuple[Tensor, Tensor]:
        """Compute log-probs and entropies of all completions' tokens, [prompts, completions, LENGTH]."""
        count = len(self.ids)
        found = []
        for x in range(len(PROMPTS)):
            prompt = torch.full((count, 1), x + 1)
            out = model(
                *Sequences(prompt, torch.ones_like(prompt, dtype=torch.bool), self.ids, self.mask), entropy=entropy
            )
            found.append((out.logprobs, out.entropy if entropy else out.logprobs))
        first, second = zip(*found, strict=True)
        return torch.stack(first).double(), torch.stack(second).double()

    def values(self, model: Any) -> Tensor:
        """Compute the critic's values, in the reward's units, before all completions' tokens."""
        count, found = len(self.ids), []
        for x in range(len(PROMPTS)):
            prompt = torch.full((count, 1), x + 1)
            out = model(*Sequences(prompt, torch.ones_like(prompt, dtype=torch.bool), self.ids, self.mask))
            found.append(model.in_reward_units(out.values, self.mask))
        return torch.stack(found).double()

    def exact(self, model: Any, reference: Tensor) -> Exact:
        """Compute what the policy's expectations are."""
        logprobs, entropies = self.logprobs(model, entropy=True)
        whole = logprobs.sum(dim=-1)
        p = whole.exp()
        kl = (p * (whole - reference)).sum(dim=1).mean()
        length = (p * self.lengths).sum(dim=1).mean()
        entropy = (p * entropies.sum(dim=-1)).sum(dim=1).mean() / length
        return Exact((p * self.scores).sum(dim=1).mean() - BETA * kl, kl, entropy, length)

    def optimum(self, reference: Tensor) -> float:
        """Return J*, the mean over the prompts."""
        return float(BETA * torch.logsumexp(reference + self.scores / BETA, dim=1).mean())


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter; 0 ends a text."""
    core = Tokenizer(models.WordLevel({EOS: 0, **{x: i + 1 for i, x in enumerate(LETTERS)}}, unk_token=EOS))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS)


def make_model(seed: int) -> Any:
    """A GPT-2 of two layers, 32 wide, whose weights are drawn so wide that it is far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = {"n_positions": 8, "n_embd": 32, "n_layer": 2, "n_head": 2}
        return AutoModelForCausalLM.from_config(
            GPT2Config(vocab_size=6, bos_token_id=0, eos_token_id=0, initializer_range=0.15, **shape)
        )


def make_trainer(
    problem: Problem, seed: int, output_dir: str, *, value_model: Any = None, **settings: Any
) -> PPOTrainer:
    """A trainer on a problem."""
    return PPOTrainer(
        model=make_model(seed),
        reward_funcs=problem.reward,
        args=RLHFConfig(output_dir=output_dir, seed=seed, **{**SETTINGS, **settings}),
        train_dataset=[{"prompt": prompt} for prompt in PROMPTS],
        processing_class=make_tokenizer(),
        value_model=value_model,
    )


def train(arm: str, seed: int, rollouts: int, every: int = 10, **settings: Any) -> dict[str, Any]:
    """Train one arm on one seed, and return what it reaches, by enumeration."""
    problem, points = Problem(seed), []
    with tempfile.TemporaryDirectory() as folder, torch_threads(1):
        trainer = make_trainer(problem, seed, folder, **{"total_episodes": 128 * rollouts, **ARMS[arm], **settings})
        with torch.no_grad():
            reference = problem.logprobs(trainer.model)[0].sum(dim=-1)
            first, best = float(problem.exact(trainer.model, reference).objective), problem.optimum(reference)

        def note(trainer: PPOTrainer, metrics: dict[str, float]) -> None:
            if trainer.iteration % every == 0 or trainer.iteration == rollouts:
                with torch.no_grad():
                    exact = problem.exact(trainer.model, reference)
                points.append([trainer.iteration, (float(exact.objective) - first) / (best - first)])

        trainer.callbacks.append(note)
        trainer.train()
        with torch.no_grad():
            exact = problem.exact(trainer.model, reference)
        spread = [row["advantage/std"] for row in trainer.run.read()]
    return {
        "arm": arm,
        "seed": seed,
        "rollouts": rollouts,
        "reference": first,
        "optimum": best,
        "reached": points[-1][1],
        "kl": float(exact.kl),
        "points": points,
        "advantage_std": [spread[0], spread[-1]],
    }


# What the loop computes and reports, against enumeration


def trained_a_little(problem: Problem, seed: int, folder: str, responses: int, **settings: Any) -> PPOTrainer:
    """A trainer whose policy has left the reference, so that no KL is 0, and whose rollouts have many responses."""
    few = make_trainer(problem, seed, folder, total_episodes=128 * 15)
    few.train()
    many = {"rollout_batch_size": responses, "total_episodes": responses, "microbatch_tokens": 65_536}
    trainer = make_trainer(problem, seed, folder + "/many", **{**many, "normalize_advantages": False, **settings})
    trainer.model.policy.load_state_dict(few.model.policy.state_dict())
    return trainer


def gradient_cosine(seed: int, responses: int, *, moved: bool) -> float:
    """Return the cosine between the loop's gradient of one rollout and the exact one of J.

    Args:
        moved: of a policy that has left the reference; False: the first gradient of a run.
    """
    problem = Problem(seed)
    with tempfile.TemporaryDirectory() as folder:
        # Without a value loss: it would train the trunk, too.
        settings = {"vf_coef": 0.0, "normalize_advantages": False}
        if moved:
            trainer = trained_a_little(problem, seed, folder, responses, **settings)
        else:
            many = {"rollout_batch_size": responses, "total_episodes": responses, "microbatch_tokens": 65_536}
            trainer = make_trainer(problem, seed, folder, **settings, **many)
        start = make_trainer(problem, seed, folder + "/start").model
        with torch.no_grad():
            reference = problem.logprobs(start)[0].sum(dim=-1)
        prompts = trainer.train_prompts.batch(0, responses).prompts
        rollout, run, args, model = trainer.rollout(prompts), trainer.fixed, trainer.args, trainer.model
        experience = estimate(rollout, shape_rewards(rollout, args, trainer.kl_coef), args).experience
        parameters = model.policy_parameters()
        run.minibatch_gradient(model, rollout, experience, list(range(responses)), args)
        sampled = torch.cat([p.grad.flatten().clone() for p in parameters])
        exact = torch.autograd.grad(-problem.exact(model, reference).objective, parameters)
    return float(torch.cosine_similarity(sampled, torch.cat([x.flatten() for x in exact]), dim=0))


def reported(seed: int, responses: int = 8192) -> dict[str, tuple[float, float, float]]:
    """Return what a rollout reports, with the enumerated number and the standard error of the first.

    Reward-to-go is GAE's advantage plus value under lambda 1: its mean after each beginning of a response is Q.
    """
    problem = Problem(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trained_a_little(problem, seed, folder, responses)
        rollout = trainer.rollout(trainer.train_prompts.batch(0, responses).prompts)
        estimates = estimate(rollout, shape_rewards(rollout, trainer.args, trainer.kl_coef), trainer.args)
        start = make_trainer(problem, seed, folder + "/start").model
        with torch.no_grad():
            reference = problem.logprobs(start)[0]
            exact = problem.exact(trainer.model, reference.sum(dim=-1))
            logprobs = problem.logprobs(trainer.model)[0]
    mask, n = rollout.mask, len(rollout.mask)
    kl = (rollout.logprobs - rollout.ref_logprobs).sum(dim=1)
    surprise = (rollout.entropy - float(exact.entropy)).mul(mask).sum(dim=1) / float(exact.length)
    metrics = estimates.metrics
    found = {
        "kl/reference_nats_per_response": (metrics["kl/reference_nats_per_response"], float(exact.kl), _error(kl)),
        "policy/entropy": (metrics["policy/entropy"], float(exact.entropy), _error(surprise)),
        "score/mean": (
            metrics["score/mean"],
            float(exact.objective + BETA * exact.kl),
            _error(rollout.scores),
        ),
    }
    to_go = (estimates.advantages + estimates.values.double()).where(mask, 0)
    starts = rollout.prompt_ids[:, -1] - 1
    for prefix, q in action_values(problem, logprobs, reference, depth=2).items():
        x, *tokens = prefix
        here = starts == x
        for t, token in enumerate(tokens):
            here &= (rollout.response_ids[:, t] == token) & mask[:, t]
        if (count := int(here.sum())) >= 30:
            sample = to_go[here, len(tokens) - 1]
            found[f"Q{prefix}"] = (float(sample.mean()), q, max(float(sample.std() / math.sqrt(count)), 1e-5))
    assert n == responses
    return found


def _error(x: Tensor) -> float:
    return float(x.double().std() / math.sqrt(len(x)))


def action_values(problem: Problem, logprobs: Tensor, reference: Tensor, *, depth: int) -> dict[tuple[int, ...], float]:
    """Enumerate Q of responses' first ``depth`` tokens: (prompt, token, ...) -> expected reward-to-go."""
    p = logprobs.sum(dim=-1).exp()
    cost = BETA * (logprobs - reference)
    sums: dict[tuple[int, ...], list[float]] = {}
    for x in range(len(PROMPTS)):
        for y, (ids, length) in enumerate(zip(problem.ids.tolist(), problem.lengths.tolist(), strict=True)):
            for t in range(min(depth, length)):
                pair = sums.setdefault((x, *ids[: t + 1]), [0.0, 0.0])
                pair[0] += float(p[x, y])
                pair[1] += float(p[x, y] * (problem.scores[x, y] - cost[x, y, t:length].sum()))
    return {prefix: total / weight for prefix, (weight, total) in sums.items()}


def critic_error(seed: int, rollouts: int = 150) -> float:
    """Train the critic alone on a fixed policy; return its error's root mean square, of the values' spread.

    Over the states that the policy visits, by how often it does.
    """
    problem = Problem(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            problem,
            seed,
            folder,
            total_episodes=256 * rollouts,
            rollout_batch_size=256,
            learning_rate=0.0,
            value_learning_rate=3e-3,
            vf_coef=1.0,
            value_model=make_model(seed + 100),
        )
        trainer.train()
        with torch.no_grad():
            logprobs = problem.logprobs(trainer.model)[0]
            values = problem.values(trainer.model)
    p, seen = logprobs.sum(dim=-1).exp(), dict[tuple[int, ...], list[float]]()
    for x in range(len(PROMPTS)):
        for y, (ids, length) in enumerate(zip(problem.ids.tolist(), problem.lengths.tolist(), strict=True)):
            for t in range(length):
                state = seen.setdefault((x, *ids[:t]), [0.0, 0.0, float(values[x, y, t])])
                state[0] += float(p[x, y])
                state[1] += float(p[x, y] * problem.scores[x, y])  # the policy is the reference: no KL
    weight, total, said = torch.tensor(list(seen.values()), dtype=torch.float64).unbind(dim=1)
    weight, exact = weight / weight.sum(), total / weight
    mean = (weight * exact).sum()
    spread = (weight * (exact - mean).square()).sum().sqrt()
    return float((weight * (said - exact).square()).sum().sqrt() / spread)


def facts(seed: int) -> dict[str, Any]:
    """Compare gradients, reported numbers and a critic with enumeration, on one seed."""
    pairs = reported(seed)
    scores = {name: (said - exact) / error for name, (said, exact, error) in pairs.items()}
    action = [score for name, score in scores.items() if name.startswith("Q")]
    return {
        "facts": seed,
        "first_gradient_cosine": gradient_cosine(seed, 4096, moved=False),
        "later_gradient_cosine": gradient_cosine(seed, 16_384, moved=True),
        "reported": {name: [*pair, scores[name]] for name, pair in pairs.items() if not name.startswith("Q")},
        "action_values": {
            "count": len(action),
            "largest_z": max(map(abs, action)),
            "mean_square_z": sum(z * z for z in action) / len(action),
        },
        "critic_error": critic_error(seed),
    }


# The command


def read(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a results file, none if there is no such file."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table of the arms."""
    lines = ["| arm | seeds | J* - J(reference) reached, each seed | KL in nats |", "|---|---|---|---|"]
    for arm in ARMS:
        runs = sorted((row for row in rows if row.get("arm") == arm), key=lambda row: row["seed"])
        if runs:
            shares = ", ".join(f"{100 * row['reached']:.2f} %" for row in runs)
            kls = sorted(row["kl"] for row in runs)
            lines.append(f"| {arm} | {len(runs)} | {shares} | {kls[0]:.2f} to {kls[-1]:.2f} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw what is left of the gap to the optimum, on a logarithmic scale: each seed thin, their mean thick."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {
        "the arms": ["clip", "penalty", "cispo", "rloo", "grpo, mean only"],
        "what dividing by a spread does": ["grpo, mean only", "grpo", "clip", "clip, whitened"],
    }
    for number, (title, arms) in enumerate(panels.items()):
        axes = figure.add_subplot(1, 2, number + 1)
        for arm in arms:
            runs = [row["points"] for row in rows if row.get("arm") == arm]
            if not runs:
                continue
            x = [point[0] for point in runs[0]]
            gaps = [[1 - point[1] for point in points] for points in runs]
            mean = [sum(column) / len(column) for column in zip(*gaps, strict=True)]
            (line,) = axes.plot(x, mean, linewidth=1.8, label=arm)
            for gap in gaps:
                axes.plot(x, gap, linewidth=0.5, alpha=0.5, color=line.get_color())
        axes.axhline(0.01, color="gray", linestyle="--", linewidth=1)
        axes.set_yscale("log")
        axes.set_xlabel("rollouts of 128 responses")
        axes.set_ylabel("share of J* - J(reference) that is left")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle("Distance from the optimum, which enumeration knows", fontsize=12)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train the arms on the seeds, compare facts, print the table, and write results and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--rollouts", type=int, help="default: 300, for cispo 400")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON; then no facts, and --results is needed")
    args = parser.parse_args()
    if args.settings and args.results == RESULTS:
        parser.error("--settings changes what the committed results are about: name another file with --results")
    done = {(row.get("arm"), row.get("seed"), row.get("facts")) for row in read(args.results)}
    work = [(arm, seed, None) for seed in range(args.seeds) for arm in args.arms]
    work += [] if args.settings else [(None, None, seed) for seed in range(args.seeds)]
    for arm, seed, fact in work:
        if (arm, seed, fact) in done:
            continue
        row = facts(fact) if arm is None else train(arm, seed, args.rollouts or ROLLOUTS.get(arm, 300), **args.settings)
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"facts on seed {fact}" if arm is None else f"{arm}, seed {seed}: {row['reached']:.4f}", flush=True)
    rows = read(args.results)
    print(table(rows))
    if args.results == RESULTS:
        draw(rows, PICTURE)


if __name__ == "__main__":
    main()
