"""Peers as oracles: GAE, returns, whitening, losses and the KL controller against the installed code of SB3 and TRL.

    python benchmarks/oracles.py                # a minute; the first run installs the peers into build/oracles

The peers' own code is executed on random data: functions and classes are called, and what TRL has inside its training
loop is cut out of the installed source and run. Where a number differs, the difference is explained and predicted, and
a fact that does not depend on either library decides. Writes benchmarks/results/oracles.json; ends with 1 if a
comparison comes out otherwise than the table says.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peers import peer_python
from torch import Tensor

from rlhf_ppo.core import (
    Experience,
    PolicyOutput,
    PPOConfig,
    adapt_kl_coef,
    aggregate_loss,
    clipped_value_loss,
    compute_gae,
    kl_estimate,
    kl_penalized_rewards,
    masked_mean,
    masked_whiten,
    ppo_diagnostics,
    ppo_loss,
)

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "build/oracles"
RESULTS = ROOT / "benchmarks/results/oracles.json"
PINS = ("torch==2.13.0", "trl==1.12.0", "stable-baselines3==2.9.2", "pandas")
OLD_TRL = "trl==0.11.4"
"""The last series with the adaptive KL controller."""


class Table:
    """The comparisons made so far."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(
        self, peer: str, what: str, ours: Any, theirs: Any, *, relation: str = "equal", why: str = "", fact: str = ""
    ) -> None:
        """Compare ours with what theirs, put right by ``relation``, should be.

        Args:
            relation: how theirs was changed before it was compared; "equal": not at all.
            why: what the difference is.
            fact: what decides between the two.
        """
        a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (ours, theirs))
        difference = float((a - b).abs().max() / a.abs().max().clamp(min=1.0))
        self.rows.append(
            {"peer": peer, "what": what, "relation": relation, "difference": difference, "why": why, "fact": fact}
        )

    def state(self, peer: str, what: str, holds: bool, fact: str, why: str) -> None:
        """Add a fact that decides a difference."""
        row = {"peer": peer, "what": what, "relation": "differs", "difference": 0.0 if holds else math.inf}
        self.rows.append({**row, "why": why, "fact": fact})

    @property
    def failures(self) -> list[dict[str, Any]]:
        """Comparisons beyond float32's rounding."""
        return [row for row in self.rows if not row["difference"] <= 2e-5]


def seeded(seed: int) -> torch.Generator:
    """Return a generator."""
    return torch.Generator().manual_seed(seed)


# Stable-Baselines3


def sb3_agent(**settings: Any) -> Any:
    """Make SB3's PPO on spaces of four numbers and three actions; it never plays."""
    import gymnasium
    from stable_baselines3 import PPO
    from stable_baselines3.common.logger import Logger

    class Nothing(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-10, 10, (4,))
        action_space = gymnasium.spaces.Discrete(3)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            return self.observation_space.sample(), {}

    usual = {"n_steps": 32, "batch_size": 32, "n_epochs": 1, "max_grad_norm": 1e9, "gamma": 0.97, "gae_lambda": 0.9}
    agent = PPO("MlpPolicy", Nothing(), device="cpu", seed=0, **{**usual, **settings})
    agent.set_logger(Logger(None, []))
    return agent


def fill(agent: Any, data: dict[str, Tensor], last_value: Tensor, done: bool) -> None:
    """Put random steps [T] of one copy into SB3's rollout buffer, and let it compute advantages."""
    import numpy as np

    agent.rollout_buffer.reset()
    for t in range(len(data["rewards"])):
        agent.rollout_buffer.add(
            data["observations"][t : t + 1].numpy(),
            data["actions"][t : t + 1].numpy(),
            data["rewards"][t : t + 1].numpy(),
            data["starts"][t : t + 1].numpy(),
            data["values"][t : t + 1],
            data["logprobs"][t : t + 1],
        )
    agent.rollout_buffer.compute_returns_and_advantage(last_value, np.array([done]))


def sb3_data(agent: Any, seed: int) -> dict[str, Tensor]:
    """Draw 32 steps; old log-probs and values are the policy's, moved by noise, so that some ratios are clipped."""
    g = seeded(seed)
    observations, actions = torch.randn(32, 4, generator=g), torch.randint(3, (32,), generator=g)
    values, logprobs, _ = agent.policy.evaluate_actions(observations, actions)
    return {
        "observations": observations,
        "actions": actions,
        "rewards": torch.randn(32, generator=g),
        "starts": (torch.rand(32, generator=g) < 0.2).float(),
        "values": values.flatten().detach() + 0.3 * torch.randn(32, generator=g),
        "logprobs": logprobs.detach() + 0.3 * torch.randn(32, generator=g),
    }


def compare_sb3(table: Table) -> None:
    """Run SB3's buffer and its update on random steps, and ours on the same."""
    peer = "SB3 2.9.2"
    agent = sb3_agent()
    data = sb3_data(agent, 1)
    last_value, done = torch.tensor([0.4]), False
    fill(agent, data, last_value, done)
    buffer = agent.rollout_buffer
    ended = torch.cat([data["starts"][1:], torch.tensor([float(done)])]).bool()
    following = torch.cat([data["values"][1:], last_value])

    def gae(rewards: Tensor, following: Tensor, terminated: Tensor, truncated: Tensor) -> tuple[Tensor, Tensor]:
        steps = (rewards, data["values"], following, terminated, truncated)
        found = compute_gae(*(x[None] for x in steps), gamma=0.97, gae_lambda=0.9)
        return found[0][0], found[1][0]

    advantages, returns = gae(data["rewards"], following, ended, torch.zeros_like(ended))
    table.add(peer, "GAE, episodes that terminate", advantages, buffer.advantages[:, 0])
    table.add(peer, "returns", returns, buffer.returns[:, 0])

    # Truncation: SB3's loop adds gamma * V(last observation) to the reward, which its buffer then sees.
    cut_values = torch.randn(32, generator=seeded(2))
    rewards = torch.where(ended, data["rewards"] + 0.97 * cut_values, data["rewards"])
    fill(agent, {**data, "rewards": rewards}, last_value, done)
    ours = gae(data["rewards"], torch.where(ended, cut_values, following), torch.zeros_like(ended), ended)
    table.add(peer, "GAE, episodes that a time limit cuts", ours[0], buffer.advantages[:, 0])

    fill(agent, data, last_value, done)
    compare_sb3_losses(table, peer, agent, data, advantages, returns)
    compare_sb3_value_clip(table, peer, data, returns)


def compare_sb3_losses(
    table: Table, peer: str, agent: Any, data: dict[str, Tensor], advantages: Tensor, returns: Tensor
) -> None:
    """Let SB3 take one update, and compare what it logs and its gradient."""
    new_values, logprobs, entropy = agent.policy.evaluate_actions(data["observations"], data["actions"])
    mask, n = torch.ones(32, dtype=torch.bool), 32
    theirs = (advantages - advantages.mean()) / (advantages.std() + 1e-8)  # SB3's formula, inside its loop
    whitened = masked_whiten(advantages, mask)
    table.add(
        peer,
        "whitened advantages",
        whitened,
        theirs * math.sqrt(n / (n - 1)),
        relation="theirs * sqrt(n / (n - 1))",
        why="SB3 divides by the standard deviation over n - 1",
        fact=f"variance of the {n} whitened numbers: ours {float(whitened.var(correction=0)):.4f}, "
        f"SB3's {float(theirs.var(correction=0)):.4f}; they are the whole batch, not a sample of it",
    )
    old = Experience(data["logprobs"], data["values"], theirs, returns, mask)
    new = PolicyOutput(logprobs, new_values.flatten(), entropy)
    loss = ppo_loss(new, old, PPOConfig(vf_coef=1.0))
    loss.total.backward()
    gradient = torch.cat([p.grad.flatten() for p in agent.policy.parameters()])
    agent.train()
    logged = agent.logger.name_to_value
    peers_gradient = torch.cat([p.grad.flatten() for p in agent.policy.parameters()])
    table.add(peer, "policy loss (clipped surrogate)", loss.policy, logged["train/policy_gradient_loss"])
    table.add(peer, "entropy", loss.entropy, -logged["train/entropy_loss"])
    table.add(
        peer,
        "value loss",
        loss.value,
        0.5 * logged["train/value_loss"],
        relation="theirs / 2",
        why="SB3's mean squared error has no 1/2",
        fact="a vf_coef of 0.5 there is 1 here; the gradients below agree with that",
    )
    table.add(
        peer,
        "gradient of policy and value loss",
        gradient,
        peers_gradient,
        relation="vf_coef 1 here, 0.5 there",
        fact="over all weights of SB3's network, after its own backward pass",
    )
    diagnostics = ppo_diagnostics(new, old)
    table.add(peer, "approx_kl (k3)", diagnostics["approx_kl"], logged["train/approx_kl"])
    table.add(
        peer,
        "clip fraction",
        diagnostics["out_of_range_fraction"],
        logged["train/clip_fraction"],
        relation="ours: out_of_range_fraction",
        why="SB3 counts every ratio outside the range, also those whose gradient is alive",
    )
    leaf = logprobs.detach().clone().requires_grad_()
    policy = ppo_loss(PolicyOutput(leaf), Experience(data["logprobs"], None, theirs, None, mask), PPOConfig()).policy
    (alive,) = torch.autograd.grad(policy, leaf)
    dead = float((alive == 0).float().mean())
    table.state(
        peer,
        "clip fraction",
        math.isclose(dead, float(diagnostics["clip_fraction"]), abs_tol=1e-6),
        f"share of actions whose gradient is 0, counted by autograd: {dead:.3f}; our clip_fraction "
        f"{float(diagnostics['clip_fraction']):.3f}, SB3's {logged['train/clip_fraction']:.3f}",
        "ours counts what the clip really removed",
    )


def compare_sb3_value_clip(table: Table, peer: str, data: dict[str, Tensor], returns: Tensor) -> None:
    """Compare value clipping: SB3 uses the clipped value alone."""
    clip = 0.1
    agent = sb3_agent(clip_range_vf=clip)
    fill(agent, data, torch.tensor([0.4]), False)
    values = agent.policy.predict_values(data["observations"]).flatten().detach()
    agent.train()
    old = data["values"]
    clipped = old + (values - old).clamp(-clip, clip)
    ours = clipped_value_loss(values, old, returns, clip_range=clip)
    table.add(
        peer,
        "clipped value loss",
        0.5 * (clipped - returns).square().mean(),
        0.5 * agent.logger.name_to_value["train/value_loss"],
        relation="theirs / 2, the clipped error alone",
        why="SB3 takes the clipped error alone; ours, as in OpenAI's baselines, takes the larger of both",
    )
    leaf = values.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(clipped_value_loss(leaf, old, returns, clip_range=clip).sum(), leaf)
    (theirs,) = torch.autograd.grad((0.5 * (old + (leaf - old).clamp(-clip, clip) - returns).square()).sum(), leaf)
    # Values that have left the range away from their target must come back.
    astray = ((values - old).abs() > clip) & ((values - returns).abs() > (old - returns).abs())
    stuck, held = int((theirs[astray] == 0).sum()), int((gradient[astray] == 0).sum())
    table.state(
        peer,
        "clipped value loss",
        held == 0 and stuck == int(astray.sum()) and bool((ours >= 0).all()),
        f"of {int(astray.sum())} values that moved more than {clip} away from their target, {stuck} have no gradient "
        f"back under SB3's formula, {held} under ours",
        "a value that overshoots stays where it is",
    )


# TRL


def lines_of(function: Callable[..., Any], first: str, last: str) -> str:
    """Cut the lines of a function from the one with ``first`` to the next one with ``last``."""
    lines = inspect.getsource(function).splitlines()
    start = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i, line in enumerate(lines) if i >= start and last in line)
    return textwrap.dedent("\n".join(lines[start : end + 1]))


def trl_estimates(ppo: Any, data: dict[str, Tensor], **args: Any) -> dict[str, Any]:
    """Run the lines of TRL's training loop from its masks to its whitened advantages."""
    code = lines_of(ppo.PPOTrainer.train, "response_idxs = torch.arange", "advantages = torch.masked_fill(advantages,")
    usual = {"kl_coef": 0.05, "kl_estimator": "k1", "whiten_rewards": False, "gamma": 1.0, "lam": 0.95}
    names: dict[str, Any] = {**vars(ppo), **{name: x.clone() for name, x in data.items()}}
    names["args"] = SimpleNamespace(**{**usual, **args})
    # Whitened at the end; the whitening itself is compared apart.
    code = code.replace("advantages = masked_whiten(", "before = advantages\nadvantages = masked_whiten(")
    exec(code, names)
    return names


def trl_data(seed: int) -> dict[str, Tensor]:
    """Draw six responses of one to seven tokens; sequence_lengths is the place of the last one, as in TRL."""
    g = seeded(seed)
    lengths = torch.tensor([7, 3, 1, 5, 7, 2])
    shape = 6, 7
    real = torch.arange(7) < lengths[:, None]
    return {
        "responses": torch.randint(2, 9, shape, generator=g),
        "sequence_lengths": lengths - 1,
        "logprobs": torch.where(real, -torch.rand(shape, generator=g) - 0.5, 0.0),
        "ref_logprobs": torch.where(real, -torch.rand(shape, generator=g) - 0.5, 0.0),
        "values": torch.randn(shape, generator=g),
        "scores": torch.randn(6, generator=g),
    }


def ours_like_trl(data: dict[str, Tensor], mask: Tensor, *, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Compute our advantages and returns of TRL's data for responses that are as long as ``mask``."""
    real = torch.arange(mask.shape[1]) <= data["sequence_lengths"][:, None]
    kl = kl_estimate(*(torch.where(real, data[name], 0.0) for name in ("logprobs", "ref_logprobs")))
    rewards = kl_penalized_rewards(data["scores"], kl, mask, 0.05)
    values = data["values"]
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    end = torch.arange(mask.shape[1]) == mask.sum(dim=1, keepdim=True) - 1
    none = torch.zeros_like(mask)
    return compute_gae(rewards, values, following, end, none, gamma=1.0, gae_lambda=gae_lambda, mask=mask)


def compare_trl(table: Table) -> None:
    """Run TRL's lines on random responses, and ours on the same."""
    from trl.experimental.ppo import ppo_trainer as ppo

    peer = "TRL 1.12.0"
    data = trl_data(3)
    real = torch.arange(7) <= data["sequence_lengths"][:, None]
    one_more = torch.arange(7) <= data["sequence_lengths"][:, None] + 1
    for gae_lambda in (1.0, 0.95):
        theirs = trl_estimates(ppo, data, lam=gae_lambda)
        ours = ours_like_trl(data, real, gae_lambda=gae_lambda)
        longer = ours_like_trl(data, one_more, gae_lambda=gae_lambda)
        full = data["sequence_lengths"] == 6
        if gae_lambda == 1.0:
            table.add(peer, "GAE, lambda 1", ours[0], torch.where(real, theirs["before"], 0.0))
            table.add(peer, "returns, lambda 1", ours[1], torch.where(real, theirs["returns"], 0.0))
            continue
        table.add(peer, "GAE, lambda 0.95, responses of full length", ours[0][full], theirs["before"][full])
        table.add(
            peer,
            "GAE, lambda 0.95, shorter responses",
            longer[0][~full] * real[~full],
            theirs["before"][~full] * real[~full],
            relation="ours with the score one step after the last token",
            why="TRL puts the score on the padding after the last token, and bootstraps from the value there",
        )
    credit_of_the_last_token(table, ppo, peer)
    table.add(peer, "KL penalty, k1", kl_estimate(data["logprobs"], data["ref_logprobs"]), theirs["kl"] * real)
    k3 = trl_estimates(ppo, data, kl_estimator="k3")["kl"]
    table.add(peer, "KL penalty, k3", kl_estimate(data["logprobs"], data["ref_logprobs"], "k3") * real, k3 * real)
    compare_trl_whitening(table, ppo, peer, theirs["before"], real)
    compare_trl_losses(table, ppo, peer, data, theirs, real, one_more)


def credit_of_the_last_token(table: Table, ppo: Any, peer: str) -> None:
    """A response of one token with score 1: what its advantage is, whatever the value after it."""
    found = []
    for after in (0.0, 5.0):
        data = {name: x[2:3].clone() for name, x in trl_data(3).items()}
        data["values"] = torch.tensor([[0.25, after, 0, 0, 0, 0, 0]])
        data["scores"], data["ref_logprobs"] = torch.ones(1), data["logprobs"].clone()
        ours = ours_like_trl(data, torch.arange(7)[None] < 1, gae_lambda=0.95)[0]
        found.append((float(ours[0, 0]), float(trl_estimates(ppo, data)["before"][0, 0])))
    table.state(
        peer,
        "GAE, lambda 0.95, shorter responses",
        all(math.isclose(ours, 0.75, abs_tol=1e-6) for ours, _ in found),
        "one token, score 1, value 0.25: the episode is over and earned 1, so the advantage is 0.75. With 0 and with 5 "
        f"as the value after the end, ours is {found[0][0]:.2f} and {found[1][0]:.2f}, TRL's {found[0][1]:.2f} and "
        f"{found[1][1]:.2f}",
        "what the critic says after the end leaks into the last token's credit",
    )


def compare_trl_whitening(table: Table, ppo: Any, peer: str, advantages: Tensor, real: Tensor) -> None:
    """Compare masked_whiten."""
    n = int(real.sum())
    ours, theirs = masked_whiten(advantages, real), torch.where(real, ppo.masked_whiten(advantages, real), 0.0)
    table.add(
        peer,
        "masked_whiten",
        ours,
        theirs * math.sqrt(n / (n - 1)),
        relation="theirs * sqrt(n / (n - 1))",
        why="TRL divides by the variance over n - 1",
        fact=f"variance of the {n} whitened numbers: ours {float((ours[real]).var(correction=0)):.4f}, "
        f"TRL's {float(theirs[real].var(correction=0)):.4f}",
    )
    one = torch.tensor([[3.0, 9.0]]), torch.tensor([[True, False]])
    try:
        answer = str(ppo.masked_whiten(*one).tolist())
    except ValueError as error:
        answer = f"{type(error).__name__}: {str(error)[:60]}"
    table.state(
        peer,
        "masked_whiten of one value",
        masked_whiten(*one).tolist() == [[0.0, 0.0]],
        f"ours 0; TRL's {answer}",
        "a variance over n - 1 does not exist for one value",
    )


def compare_trl_losses(
    table: Table,
    ppo: Any,
    peer: str,
    data: dict[str, Tensor],
    estimates: dict[str, Any],
    real: Tensor,
    one_more: Tensor,
) -> None:
    """Run the lines of TRL's losses, and ours on the same numbers."""
    code = lines_of(ppo.PPOTrainer.train, "vpredclipped = torch.clamp(", "loss = pg_loss + args.vf_coef * vf_loss")
    g = seeded(5)
    new = (data["logprobs"] + 0.3 * torch.randn(6, 7, generator=g)).masked_fill(~real, ppo.INVALID_LOGPROB)
    values = (data["values"] + 0.3 * torch.randn(6, 7, generator=g)).masked_fill(~one_more, 0.0)
    advantages, returns = estimates["advantages"], estimates["returns"]
    old_values = estimates["values"]

    def theirs(rows: list[int], leaf: Tensor) -> dict[str, Any]:
        names = {
            **vars(ppo),
            "vpred": values[rows],
            "new_logprobs": leaf,
            "mb_values": old_values[rows],
            "mb_return": returns[rows],
            "mb_logprobs": estimates["logprobs"][rows],
            "mb_advantage": advantages[rows],
            "padding_mask": ~real,
            "padding_mask_p1": ~one_more,
            "micro_batch_inds": rows,
            "args": SimpleNamespace(cliprange=0.2, cliprange_value=0.2, vf_coef=0.1),
        }
        exec(code, names)
        return names

    def ours(rows: list[int], leaf: Tensor, denominator: Tensor | None = None) -> Any:
        mask = real[rows]
        old = Experience(estimates["logprobs"][rows], None, advantages[rows], None, mask)
        return ppo_loss(PolicyOutput(leaf), old, PPOConfig(), denominator=denominator).policy

    everything = list(range(6))
    leaves = [new.clone().requires_grad_() for _ in range(2)]
    found, loss = theirs(everything, leaves[0]), ours(everything, leaves[1])
    table.add(peer, "policy loss (clipped surrogate)", loss, found["pg_loss"])
    gradients = [torch.autograd.grad(x, leaf)[0] for x, leaf in ((found["pg_loss"], leaves[0]), (loss, leaves[1]))]
    table.add(peer, "gradient of the policy loss", gradients[1], gradients[0])
    per_step = clipped_value_loss(values, old_values, returns, clip_range=0.2)
    table.add(
        peer,
        "value loss",
        aggregate_loss(per_step, one_more),
        found["vf_loss"],
        relation="ours over one step more per response",
        why="TRL also trains the value of the padding after the last token, where it put the score",
        fact=f"ours over the {int(real.sum())} tokens that were chosen: {float(aggregate_loss(per_step, real)):.4f}; "
        f"TRL's over {int(one_more.sum())} steps: {float(found['vf_loss']):.4f}",
    )
    compare_microbatches(table, peer, new, real, theirs, ours)
    drift = torch.where(real, new - data["logprobs"], 0.0)
    diluted = float(0.5 * drift.square().mean())  # TRL's line: approxkl = 0.5 * (logprobs_diff**2).mean()
    k2 = masked_mean(0.5 * drift.square(), real)
    table.add(
        peer,
        "approxkl",
        k2 * real.sum() / real.numel(),
        diluted,
        relation="our k2 * real / all places",
        why="TRL averages k2 over padding too",
        fact=f"over the {int(real.sum())} real tokens it is {float(k2):.4f}; TRL logs {diluted:.4f}, and less with "
        "more padding",
    )


def compare_microbatches(table: Table, peer: str, new: Tensor, real: Tensor, theirs: Any, ours: Any) -> None:
    """Split a minibatch in two and compare the sums of gradients with the whole's."""
    parts = [[0, 4], [1, 2, 3, 5]]
    whole = new.clone().requires_grad_()
    (target,) = torch.autograd.grad(ours(list(range(6)), whole), whole)
    split = {"ours": torch.zeros_like(new), "theirs": torch.zeros_like(new)}
    for rows in parts:
        leaf = new[rows].clone().requires_grad_()
        split["ours"][rows] = torch.autograd.grad(ours(rows, leaf, real.sum()), leaf)[0]
        leaf = new[rows].clone().requires_grad_()
        split["theirs"][rows] = torch.autograd.grad(theirs(rows, leaf)["pg_loss"] / len(parts), leaf)[0]
    table.add(peer, "gradient in two microbatches, ours and the whole's", target, split["ours"])
    off = float((split["theirs"] - target).norm() / target.norm())
    table.state(
        peer,
        "gradient in two microbatches",
        off > 0.1,
        f"two long and four short responses: TRL's mean of microbatch means is off by {off:.0%} of the gradient's norm",
        "each microbatch is divided by its own tokens",
    )


def compare_controller(table: Table) -> None:
    """Compare the adaptive KL coefficient with TRL's last controller."""
    import numpy as np

    source = (PEERS / "old/trl/trainer/utils.py").read_text(encoding="utf-8")
    start = source.index("class AdaptiveKLController")
    names: dict[str, Any] = {"np": np}
    exec(source[start : source.index("\nclass FixedKLController")], names)
    theirs, ours = names["AdaptiveKLController"](0.05, 6.0, 10_000), 0.05
    pairs = []
    for kl in (torch.rand(200, generator=seeded(7)) * 15).tolist():
        theirs.update(kl, 64)
        ours = adapt_kl_coef(ours, kl, target=6.0, horizon=10_000, num_samples=64)
        pairs.append((ours, theirs.value))
    table.add("TRL 0.11.4", "adaptive KL coefficient, 200 updates", [a for a, _ in pairs], [b for _, b in pairs])
    before = theirs.value
    theirs.update(math.nan, 64)
    table.state(
        "TRL 0.11.4",
        "adaptive KL coefficient after a NaN",
        math.isfinite(adapt_kl_coef(before, math.nan, target=6.0, horizon=10_000, num_samples=64)),
        f"ours stays {before:.4f}; TRL's becomes {theirs.value}",
        "one non-finite KL would end the penalty for good",
    )


def rows_of(table: Table) -> Iterator[str]:
    """Yield the table as text."""
    for row in table.rows:
        verdict = row["relation"] if row["relation"] != "equal" else "equal"
        yield f"{row['peer']:<11} {row['what']:<62} {row['difference']:.1e}  {verdict}"
        for text in (row["why"], row["fact"]):
            if text:
                yield f"{'':<12}  {text}"


def main() -> int:
    """Compare with all peers, print and write the table."""
    if find_spec("trl") is None or find_spec("stable_baselines3") is None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [peer_python("oracles", *PINS, beside=OLD_TRL), str(Path(__file__).resolve())], env=environment, check=False
        ).returncode
    table = Table()
    compare_sb3(table)
    compare_trl(table)
    compare_controller(table)
    print("\n".join(rows_of(table)))
    RESULTS.write_text(json.dumps(table.rows, indent=1) + "\n", encoding="utf-8")
    print(f"\n{len(table.rows)} comparisons, {len(table.failures)} otherwise than said; written to {RESULTS.name}")
    return 1 if table.failures else 0


if __name__ == "__main__":
    sys.exit(main())
