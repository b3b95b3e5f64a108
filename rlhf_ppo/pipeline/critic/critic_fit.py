"""Run `rlhf-ppo critic fit`: train a critic offline on the returns of recorded rollouts, with held-out ones to stop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from rlhf_ppo.config.arguments.critic_fit import CriticFitArgs
from rlhf_ppo.core import ValueScale, explained_variance
from rlhf_ppo.models.acceleration.working_copy import computing
from rlhf_ppo.models.loading import adapter_base, resolve_model
from rlhf_ppo.pipeline.critic.critic_report import judge_critic, lambda_table, say_report, write_report
from rlhf_ppo.pipeline.critic.data import CriticData, gather_evidence, hold_out, load_critic_data
from rlhf_ppo.pipeline.critic.models import Reader, build_critic, check_tokenizer, policy_name, save_critic
from rlhf_ppo.runtime.errors import NonFiniteGradientError
from rlhf_ppo.runtime.logs.metrics import MetricAverage
from rlhf_ppo.runtime.logs.progress import ProgressDisplay
from rlhf_ppo.runtime.logs.run_directory import RunDirectory, run_lock
from rlhf_ppo.runtime.machine.threads import torch_threads
from rlhf_ppo.runtime.processes.join import join_for
from rlhf_ppo.runtime.processes.voice import first_alone
from rlhf_ppo.runtime.seeding import seed_everything
from rlhf_ppo.training.gradients import sum_over_processes
from rlhf_ppo.training.models.fitted_critic import (
    SHAPING,
    CriticFacts,
    adapter_facts,
    facts_json,
    probe_values,
    read_weights,
)
from rlhf_ppo.training.models.learning_rates import critic_rate, model_size, policy_rate

_PENALTIES = [10.0**power for power in range(-7, 3)]
"""Ridge penalties to try, as shares of the hidden states' mean variance."""


@dataclass(frozen=True)
class FitResult:
    """A fitted critic."""

    folder: Path
    """What a run takes as value_head_from."""
    facts: CriticFacts
    history: list[float]
    """Held-out explained variance at the start and after each pass; of a shared critic, for each penalty."""
    report: dict[str, Any]
    """What critic_report.json says of the held-out rollouts."""


@dataclass(frozen=True)
class Split:
    """Recorded rollouts with the rows of each to train on, and those to judge by."""

    data: CriticData
    train: list[list[int]]
    held_out: list[list[int]]

    def scale(self) -> ValueScale:
        """Return mean and spread of the training returns."""
        parts = zip(self.data.rollouts, self.train, strict=True)
        returns = torch.cat([part.returns[rows][part.mask[rows]] for part, rows in parts])
        std = float(returns.std(correction=0))
        return ValueScale(float(returns.mean()), std if std > 0 else 1.0, len(self.data.rollouts))

    def explained(self, reader: Reader) -> float:
        """Compute a critic's explained variance on the held-out rows."""
        values = reader.values(self.data.rollouts, self.held_out)
        parts = list(zip(self.data.rollouts, values, self.held_out, strict=True))
        v, r = (
            torch.cat([(x if which else part.returns)[rows][part.mask[rows]] for part, x, rows in parts])
            for which in (True, False)
        )
        return float(explained_variance(v, r))


def fit_critic(args: CriticFitArgs) -> FitResult:
    """Fit a critic on recorded rollouts, judge it on held-out ones, and save it for runs to start from.

    Raises:
        FileNotFoundError, ValueError: bad settings, recordings or models, or too few rollouts; says which.
        NonFiniteGradientError: a loss or gradient is non-finite; nothing is saved.
        OSError: the disk is full.
    """
    processes = join_for(args)
    args = args if processes.first else dataclasses.replace(args, quiet=True)
    data = load_critic_data(args.rollouts, gamma=args.gamma, kl_coef=args.kl_coef)
    split = Split(data, *hold_out(data, args.eval_fraction, by=args.split_by, seed=args.seed))
    policy = policy_name(data, args.model)
    tokenizer = check_tokenizer(data, policy)
    folder = _output_folder(args)
    with run_lock(folder, processes):
        seed_everything(args.seed)
        reader = build_critic(args, data, policy)
        with torch_threads(args.num_threads, reader.model):
            reader.model.change_value_scale(split.scale())
            history = solve_head(reader, split) if args.kind == "shared" else train_critic(reader, split, args)
            values = reader.values(data.rollouts, split.held_out)
        evidence = gather_evidence(data.rollouts, values, split.held_out, data.gamma, args.seed)
        report = judge_critic(evidence, f"a {args.kind} critic, on {len(evidence.mask)} held-out responses")
        facts = _facts(args, data, policy, reader, report["critic"])

        def write() -> None:
            save_critic(reader.model, facts_json(facts), tokenizer, folder, resolve_model(policy))
            write_report(report, folder)

        processes.on_first(write)
    return FitResult(folder, facts, history, report)


def _output_folder(args: CriticFitArgs) -> Path:
    folder = RunDirectory(args.output_dir).path
    if any((folder / name).exists() for name in ("run.json", "rollouts.json")):
        raise ValueError(f"output_dir {folder} holds a run or a recording, whose files would be replaced: name another")
    return folder


def _facts(
    args: CriticFitArgs, data: CriticData, policy: str, reader: Reader, held_out: dict[str, float]
) -> CriticFacts:
    model = reader.model
    adapter: Any = getattr(model.policy, "peft_config", {}).get(model.value_adapter)
    merged = model.value_trunk is None and adapter_base(resolve_model(policy)) is not None
    return CriticFacts(
        kind=args.kind,
        model=policy,
        tokenizer=data.facts.tokenizer,
        rewards=data.facts.rewards,
        gamma=data.gamma,
        kl_coef=data.kl_coef,
        shaping={name: getattr(data.settings, name) for name in SHAPING},
        recordings=data.folders,
        held_out=held_out,
        probe=probe_values(model).tolist(),
        weights=None if merged else read_weights(model),
        adapter=None if adapter is None else adapter_facts(adapter),
    )


@torch.no_grad()
def solve_head(reader: Reader, split: Split) -> list[float]:
    """Fit the head on a frozen trunk by ridge regression, from one pass over the rollouts.

    The passes leave sums of products of hidden states and returns, [O, O] numbers however long the recording is. From
    them weights and held-out explained variance follow for every penalty; the best one is kept, which is this kind's
    early stopping.

    Returns:
        The held-out explained variance for each penalty, from the smallest.
    """
    head = reader.model.value_head
    assert head is not None
    sums = [_moments(reader, split, rows) for rows in (split.train, split.held_out)]
    train = sums[0]
    width, n = head.in_features, train[-2, -2]
    mean = train[-2, :width] / n
    gram = train[:width, :width] / n - mean[:, None] * mean
    cross = train[:width, -1] / n - mean * train[-2, -1] / n
    identity = torch.eye(width, dtype=gram.dtype, device=gram.device) * gram.diagonal().mean().clamp(min=1e-12)
    found = []
    for penalty in _PENALTIES:
        weight = torch.linalg.solve(gram + penalty * identity, cross)
        bias = train[-2, -1] / n - mean @ weight
        # The error y - w x - b, as weights of the columns (x, 1, y).
        error = torch.cat([-weight, -bias[None], torch.ones_like(bias)[None]])
        found.append((_explained(sums[1], error), weight, bias))
    _, weight, bias = max(found, key=lambda item: item[0])
    head.weight.copy_(weight[None])
    head.bias.copy_(bias[None])
    return [share for share, _, _ in found]


def _moments(reader: Reader, split: Split, rows: list[list[int]]) -> Tensor:
    """Sum the products of (hidden state, 1, normalised return) over tokens: [O + 2, O + 2] in float64."""
    head, scale = reader.model.value_head, reader.model.value_scale
    assert head is not None and scale is not None
    # MPS has no float64.
    device = torch.device("cpu") if reader.device.type == "mps" else reader.device
    total = torch.zeros(head.in_features + 2, head.in_features + 2, dtype=torch.float64, device=device)
    for part, some in zip(split.data.rollouts, rows, strict=True):
        for batch, sequences in reader.passes(part, reader.share(part, some)[reader.processes.rank]):
            with computing(reader.model, bf16=reader.bf16):
                states = reader.model.runner.hidden(sequences)
            length = sequences.mask.shape[1]
            y = scale.normalize(part.returns[batch, :length][part.mask[batch, :length]])[:, None]
            x, y = states.to(device).double(), y.to(device)
            row = torch.cat([x, torch.ones_like(y), y], dim=1)
            total += row.T @ row
    reader.processes.add_up([total])
    return total


def _explained(sums: Tensor, error: Tensor) -> float:
    """Compute 1 - Var(error) / Var(y) from sums of products; ``error`` weights the columns."""
    n = sums[-2, -2]
    left = error @ sums @ error / n - (error @ sums[:, -2] / n) ** 2
    return float(1 - left / (sums[-1, -1] / n - (sums[-1, -2] / n) ** 2).clamp(min=1e-30))


def train_critic(reader: Reader, split: Split, args: CriticFitArgs) -> list[float]:
    """Train head and trunk, or head and adapter, on squared errors; keep the pass that explains held-out returns best.

    Returns:
        The held-out explained variance at the start and after each pass.
    """
    trained = reader.model.critic_parameters()
    rate = args.learning_rate or _learning_rate(reader.model.policy)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    order = torch.Generator().manual_seed(args.seed)
    history = [split.explained(reader)]
    best = [p.detach().clone() for p in trained]
    total = sum(map(len, split.train))
    with ProgressDisplay("passes", args.num_epochs, each="pass", quiet=args.quiet) as progress:
        for epoch in range(args.num_epochs):
            for i, rows in _batches(split, args.batch_size, order):
                _step(reader, split, i, rows, optimizer, args)
            history.append(split.explained(reader))
            progress.update(epoch + 1, responses=total, explained=history[-1])
            newest = len(history) - 1
            if history[-1] == max(history):
                best = [p.detach().clone() for p in trained]
            elif newest - history.index(max(history)) >= args.patience:
                break
    with torch.no_grad():
        for parameter, kept in zip(trained, best, strict=True):
            parameter.copy_(kept)
    return history


def _learning_rate(policy: Any) -> float:
    size, adapter = model_size(policy)
    return critic_rate(policy_rate(size, adapter=adapter), adapter=adapter)


def _batches(split: Split, size: int, order: torch.Generator) -> Iterator[tuple[int, list[int]]]:
    """Yield (rollout, its rows) in random order; rows of one rollout are padded alike."""
    batches = []
    for i, rows in enumerate(split.train):
        shuffled = [rows[k] for k in torch.randperm(len(rows), generator=order).tolist()]
        batches += [(i, shuffled[start : start + size]) for start in range(0, len(rows), size)]
    yield from (batches[k] for k in torch.randperm(len(batches), generator=order).tolist())


def _step(
    reader: Reader, split: Split, i: int, rows: list[int], optimizer: torch.optim.Optimizer, args: CriticFitArgs
) -> None:
    """Take one optimizer step on the mean of 0.5 * squared error over the tokens of a batch."""
    part, scale = split.data.rollouts[i], reader.model.value_scale
    assert scale is not None
    count, loss = int(part.mask[rows].sum()), torch.zeros((), device=reader.device)
    optimizer.zero_grad()
    for batch, sequences in reader.passes(part, reader.share(part, rows)[reader.processes.rank]):
        with computing(reader.model, bf16=reader.bf16):
            values = reader.model.head_values(sequences)
            target = scale.normalize(part.returns[batch, : values.shape[1]]).to(values)
            error = (values - target) * sequences.mask
            piece = 0.5 * error.square().sum() / count
            piece.backward()
        loss += piece.detach()
    loss = float(sum_over_processes(reader.processes, reader.model, MetricAverage(), {"loss": loss})[1]["loss"])
    norm = float(torch.nn.utils.clip_grad_norm_(reader.model.critic_parameters(), args.max_grad_norm))
    if not math.isfinite(loss + norm):
        raise NonFiniteGradientError(
            f"the loss is {loss:.3g} and its gradient's norm {norm:.3g}, so nothing was saved; lower learning_rate"
        )
    optimizer.step()


def fit_command(args: CriticFitArgs) -> None:
    """Run the `critic fit` command."""
    result = fit_critic(args)
    with first_alone():
        for line in say_report(result.report):
            print(line)
        Console().print(lambda_table(result.report["lambdas"]))
        start = {
            "shared": f"value_head_from={result.folder}",
            "separate": f"value_model={result.folder} value_head_from={result.folder}",
            "adapter": f"critic=adapter value_head_from={result.folder}, and the same LoRA settings",
        }[result.facts.kind]
        print(f"critic   {result.folder}: start a run with {start}")
        print(f"report   {result.folder}/critic_report.json, critic_report.png")
