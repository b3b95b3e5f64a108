"""Explain a rollout step by step: reward, value, advantage and ratio of every decision; for the report, too."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from classic.advantages import Estimate, trained_advantages
from classic.networks.actor_critic import ActorCritic
from classic.rollout import Rollout
from classic.state import Run, TrainState
from rlhf_ppo.core import Experience, PPOConfig
from rlhf_ppo.runtime.explain import Explanation, explain_actions
from rlhf_ppo.runtime.logs.tables import STEPS, write_table
from rlhf_ppo.runtime.report.page import report_at_end

RECORDED_STEPS = 512
"""Steps that are recorded of the last update: the first copies'."""


@torch.no_grad()
def explain_rollout(network: ActorCritic, rollout: Rollout, estimate: Estimate, config: PPOConfig) -> Explanation:
    """Explain every decision of a rollout, with its update's estimates and settings and the current policy."""
    mask = rollout.mask
    trained = trained_advantages(estimate, mask, config).to(rollout.logprobs.dtype)
    now = network.evaluate(rollout.decisions()).logprobs.cpu()
    if rollout.state is None:  # rows of unmasked steps only
        now = torch.zeros_like(rollout.logprobs).masked_scatter(mask, now)
    return explain_actions(
        rewards=rollout.rewards,
        values=estimate.values,
        next_values=estimate.next_values,
        terminated=rollout.terminated,
        truncated=rollout.truncated,
        advantages=estimate.advantages,
        old=Experience(rollout.logprobs, None, trained, None, mask),
        new_logprobs=now,
        config=config,
        gamma=config.gamma,
        labels=[[_label(action) for action in row] for row in rollout.actions],
    )


def report_run(run: Run, state: TrainState) -> None:
    """Record the steps that the last update learned from, and write report.html, unless the settings say otherwise."""
    if run.folder is None or not run.args.report:
        return
    if state.last_update is not None:  # there is none if a resumed run had nothing left to do
        rows = explain_rollout(state.network, *state.last_update).rows
        shown = rows[:RECORDED_STEPS]
        named = {"copy": "sequence", "action": "label"}
        columns = {name: [row[named.get(name, name)] for row in shown] for name in STEPS if name != "iteration"}
        try:
            write_table(run.folder.path, "steps", state.counters["iteration"], columns)
        except OSError as error:
            warnings.warn(f"the steps of the last update are not recorded: {error.strerror}", stacklevel=3)
    report_at_end(run.folder.path, quiet=run.args.quiet)


def _label(action: Tensor) -> str:
    numbers = action.flatten().tolist()
    return ",".join(f"{number:.2f}" if isinstance(number, float) else str(number) for number in numbers)
