"""Checks of a run: its reference and reward, saving and loading, resuming, and the number of processes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.config.arguments.train import TrainArgs
from rlhf_ppo.models.loading import load_policy, load_tokenizer
from rlhf_ppo.runtime.errors import RunError
from rlhf_ppo.trainer import PPOTrainer
from rlhf_ppo.training.rollouts.collect import score
from rlhf_ppo.verify.changed_rollouts import reordered
from rlhf_ppo.verify.report import Check, Finding
from rlhf_ppo.verify.subject import OWN_REWARD, Subject, largest
from rlhf_ppo.verify.token_checks import PLAIN_ROWS

PROCESSES_TIMEOUT_S = 600.0
EXACT = 1e-3
"""Largest difference of log-probs in nats that rounding explains in fp32."""


def _reference(subject: Subject) -> Finding:
    part, temperature = subject.rollout.sequences(subject.rows), subject.run.args.temperature
    start = subject.run.reference.logprobs(part, temperature=temperature)
    difference = subject.forward(part).logprobs - start
    if subject.given.ref_model is not None:
        kl = float(difference.sum(dim=1).mean())
        return Finding(None, f"ref_model is a model of its own, and the KL to it starts at {kl:.3g} nats per response")
    gap, said = largest([difference]), ""
    drift = 0.0
    try:
        drift = largest([subject.trained.reference.logprobs(part, temperature=temperature) - start])
        said = f", and two updates have moved it by {drift:.2g} (at most {subject.bound:g})"
    except RunError as error:
        said = f"; whether updates move it is not known, since training stopped ({error})"[:300]
    found = f"reference and policy differ by {gap:.2g} nats before training{said}"
    return Finding(max(gap, drift) <= subject.bound, found, {"gap_nats": gap, "drift_nats": drift})


def _reward(subject: Subject) -> Finding:
    rollout, rows = subject.rollout, subject.rows
    run = dataclasses.replace(subject.run, score_caches={})  # a cache would give the first answer again
    again = score(run, rollout, needs_scores=False)
    back = reordered(score(run, reordered(rollout, rows[::-1]), needs_scores=False), rows[::-1])
    assert rollout.scores is not None
    scale = max(1.0, largest([rollout.scores]))
    gaps = []
    for other in (again, back):
        assert other.scores is not None and other.scored is not None
        same = torch.equal(other.scored, rollout.scored) if rollout.scored is not None else True
        gaps.append(largest([other.scores - rollout.scores]) / scale if same else math.inf)
    equal = "; all scores are equal, so that there is nothing to learn" if rollout.scores.unique().numel() == 1 else ""
    said = (
        f"scores of {len(rows)} responses change by {gaps[0]:.2g} of their size when asked again, and by {gaps[1]:.2g} "
        f"in reverse order (at most 0.001){equal}"
    )
    return Finding(max(gaps) <= 1e-3, said, {"again": gaps[0], "reversed": gaps[1]})


def _save_load(subject: Subject) -> Finding:
    if (trainer := _trained(subject)) is None:
        return _NO_RUN
    folder = trainer.save_model(subject.folder / "saved")
    tokenizer, loaded = load_tokenizer(str(folder)), load_policy(str(folder)).eval()
    torch.nn.Module.to(loaded, subject.run.device)
    rows = subject.rows[:PLAIN_ROWS]
    models = (trainer.model.policy, loaded)
    pairs = ([subject.plain_logprobs(row, policy, bf16=False) for policy in models] for row in rows)
    gap = largest(one - other for one, other in pairs)
    texts = [prompt for prompt in subject.rollout.prompts if isinstance(prompt, str)]
    changed = sum(tokenizer(text)["input_ids"] != subject.run.tokenizer(text)["input_ids"] for text in texts)
    same = tokenizer.chat_template == subject.run.tokenizer.chat_template
    said = (
        f"saved after two updates and loaded by transformers, the policy's log-probs in fp32 differ by {gap:.2g} nats "
        f"(at most {EXACT:g}); the tokenizer encodes {changed} of {len(texts)} texts otherwise, and its chat template "
        f"is {'the same' if same else 'another'}"
    )
    return Finding(gap <= EXACT and not changed and same, said, {"gap_nats": gap, "texts": changed})


_NO_RUN = Finding(None, "training stopped, so that there is nothing to compare: see the check resume")


def _trained(subject: Subject) -> PPOTrainer | None:
    try:
        return subject.trained
    except RunError:
        return None


def _resume(subject: Subject) -> Finding:
    whole = subject.trained
    resumed = subject.given.trainer(reward=OWN_REWARD, output_dir=str(subject.folder / "resumed"))
    resumed.train(resume_from_checkpoint=whole.run.path / "checkpoint-1")
    weights = largest(
        a.detach() - b.detach() for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    )
    moments = largest(a - b for a, b in zip(_moments(whole), _moments(resumed), strict=True))
    one, other = whole.run.read()[-1], resumed.run.read()[-1]
    metrics = sorted(name for name in one if one[name] != other.get(name) and not _both_nan(one[name], other.get(name)))
    exact = subject.run.device.type == "cpu"
    said = (
        f"a run of two rollouts and one resumed after the first differ by {weights:.2g} in weights and {moments:.2g} "
        f"in AdamW's moments; {len(metrics)} metrics differ{': ' + ', '.join(metrics[:3]) if metrics else ''}"
    )
    limit = 0.0 if exact else 1e-4
    right = max(weights, moments) <= limit and not (metrics and exact)
    return Finding(right, said, {"weights": weights, "moments": moments, "metrics": len(metrics)})


def _both_nan(one: Any, other: Any) -> bool:
    return isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)


def _moments(trainer: PPOTrainer) -> list[Tensor]:
    groups, state = trainer.optimizer.param_groups, trainer.optimizer.state
    parameters = [p for group in groups for p in group["params"] if p in state]
    return [state[p][name].float() for p in parameters for name in ("exp_avg", "exp_avg_sq")]


# Processes


def _processes(subject: Subject) -> Finding:
    command, device = subject.given.command, subject.run.device.type
    if command is None:
        return Finding(None, "models and rewards are objects of this process: run `rlhf-ppo verify`, which names them")
    if device == "cuda" and torch.cuda.device_count() < 2:
        return Finding(None, "there is one GPU, and each process needs its own")
    if device == "mps":
        return Finding(None, "processes cannot share work on mps")
    if (trainer := _trained(subject)) is None:
        return _NO_RUN
    folder = subject.folder / "processes"
    answer = _run_processes(subject, folder)
    if answer.returncode:
        lines = [line for line in answer.stderr.splitlines() if "error" in line.lower()] or ["no message"]
        return Finding(False, f"a run with two processes ended with code {answer.returncode}: {lines[0][:200]}")
    alone, both = trainer.run.read()[0], _first_row(folder)
    # bf16 rounds a divided batch otherwise, so that some draws fall on other tokens.
    exact = () if subject.run.bf16 else ("response/length_tokens", "value/loss")
    names = ("score/mean", "policy/entropy", "optim/grad_norm", *exact)
    gaps = {n: abs(alone[n] - both[n]) / max(abs(alone[n]), 1e-6) for n in names if n in alone}
    worst = max(gaps, key=lambda name: gaps[name])
    # Sums in another order; what the optimizer makes of that grows over an update's steps.
    limit = 0.1 if subject.run.bf16 else 0.01
    listed = ", ".join(f"{name} {alone[name]:.6g} and {both[name]:.6g}" for name in gaps)
    said = f"one process and two: {listed}; they differ by at most {gaps[worst]:.2g} of their size (at most {limit:g})"
    return Finding(gaps[worst] <= limit, said, {"difference": gaps[worst]})


def _run_processes(subject: Subject, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `rlhf-ppo train` with two processes on the settings of the check resume's run."""
    command = subject.given.command
    assert command is not None
    changed = {"reward": (OWN_REWARD,), "reward_weights": None, "output_dir": str(folder), "eval_dataset": None}
    args = dataclasses.replace(command, **changed, eval_split=None, eval_size=0)
    settings = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(TrainArgs)
        if getattr(args, field.name) != field.default
    }
    file = subject.folder / "processes.yaml"
    file.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlhf_ppo"]
    words = [sys.executable, "-m", *launcher, "train", "--config", str(file)]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.run(
        words, env=os.environ | threads, capture_output=True, text=True, timeout=PROCESSES_TIMEOUT_S, check=False
    )


def _first_row(folder: Path) -> Mapping[str, float]:
    return json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])


CHECKS = (
    Check(
        "reference",
        _reference,
        "the reference is the policy as it starts, and training does not move it",
        "a reference that shares weights with the policy, an adapter that does not start at 0, dropout",
        "ref_model with the model that training starts from; init_lora_weights=True",
    ),
    Check(
        "reward",
        _reward,
        "the reward gives a response one score, whenever it is asked and whatever stands beside it",
        "a reward that draws numbers, a judge at temperature above 0, scores in another order, statistics of the batch",
        "a seed, or temperature 0, in the reward; cache_rewards=True",
    ),
    Check(
        "save_load",
        _save_load,
        "the saved model, loaded by transformers, is the model in memory, and its tokenizer the same",
        "tied weights saved apart, a tokenizer changed in memory alone, a dtype that rounds",
        "load the tokenizer from a folder; precision='fp32'",
    ),
    Check(
        "resume",
        _resume,
        "a run that is resumed from a checkpoint ends as the one that was never interrupted",
        "state outside the checkpoint: in respond, in a layer, in a global",
        "keep no state in respond; save_every with intact checkpoints (rlhf-ppo check)",
    ),
    Check(
        "processes",
        _processes,
        "two processes compute what one does",
        "a loss averaged over processes instead of summed, a reward or respond that depends on the process",
        "whole_rollout_rewards=True for rewards that compare responses",
    ),
)
