"""Replay: train on recorded rollouts in place of sampled ones, and refuse those that another run sampled.

(Not `rlhf-ppo replay`, which recomputes the one minibatch in a black box.)

What the policy did and how it scored comes from the record, and so do the old log-probs: the ratio that PPO clips is
the one to the policy that recorded. What the critic says is read again, because the critic is what settings change.
The first update is the recorded run's own; from the second one on the responses are those of another policy.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.core import kl_estimate
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.models.acceleration.working_copy import computing
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.forward.runner import Sequences
from rlhf_ppo.rewards.functions import rewards_in_words
from rlhf_ppo.training.checkpoints.fingerprints import tokenizer_fingerprint
from rlhf_ppo.training.recorded.recorded_rollouts import Recording, open_recording
from rlhf_ppo.training.recorded.recording import architecture, model_fingerprints
from rlhf_ppo.training.rollouts.collect import read_divided
from rlhf_ppo.training.run import Run
from rlhf_ppo.training.state import TrainState

_SAMPLING = (
    *("rollout_batch_size", "num_generations", "max_new_tokens", "min_new_tokens", "temperature"),
    *("stop_token_ids", "stop_strings", "max_turns", "recompute_logprobs"),
)
"""Settings of what was sampled, which the update reads, too."""


def open_replay(args: RLHFConfig, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Recording | None:
    """Open the recording that ``replay`` names, and check that this run could have sampled it; None without one.

    Raises:
        FileNotFoundError, ValueError: see :func:`.open_recording`; or the recording is of another tokenizer or model,
            was sampled with other settings, is too short, or would be moved aside.
    """
    if args.replay is None:
        return None
    recording = open_recording(args.replay)
    facts, where = recording.facts, f"the rollouts in {recording.folder}"
    if recording.folder.resolve().is_relative_to(Path(args.output_dir).resolve()):
        raise ValueError(
            f"replay={args.replay!r} is in output_dir={str(args.output_dir)!r}, from where a new run moves an earlier "
            "one's files: name another output_dir"
        )
    if (ours := tokenizer_fingerprint(tokenizer)) != facts.tokenizer:
        raise ValueError(
            f"{where} were sampled with another tokenizer ({facts.tokenizer}) than this run's ({ours}): start from the "
            f"model that sampled them ({facts.model})"
        )
    if (ours := architecture(config)) != facts.architecture:
        raise ValueError(
            f"{where} were sampled by another model ({facts.model}: {facts.architecture}) than this run's ({ours}): "
            "start from that model"
        )
    for name in _SAMPLING:
        ours, theirs = getattr(args, name), facts.settings[name]
        if (list(ours) if isinstance(ours, tuple) else ours) != theirs:
            raise ValueError(f"{where} were sampled with {name}={theirs!r}, this run has {name}={ours!r}: set it so")
    if args.num_rollouts > len(recording):
        size = args.rollout_batch_size
        raise ValueError(
            f"{where} are {len(recording)} of {size} responses, and total_episodes={args.total_episodes} asks for "
            f"{args.num_rollouts}: lower total_episodes to {len(recording) * size}, or record more"
        )
    return recording


def require_same_rewards(recording: Recording | None, weights: dict[str, float]) -> None:
    """Raise a ValueError unless a run's reward functions and their weights are those of the recorded scores."""
    if recording is not None and recording.facts.rewards != weights:
        raise ValueError(
            f"the rollouts in {recording.folder} were scored by {rewards_in_words(recording.facts.rewards)}, and this "
            f"run's rewards are {rewards_in_words(weights)}: name the same reward functions and reward_weights, or "
            "record with these"
        )


def require_first_policy(run: Run, model: ActorCritic) -> None:
    """Check that a run that replays starts from the policy that sampled the recording's first rollout.

    Raises:
        ValueError: the log-probs of its first responses differ; names both models.
    """
    if run.recording is None:
        return
    rollout = run.recording.read(0, run.device)
    rows = run.microbatches(model, rollout, range(len(rollout.prompts)))[0]
    with torch.no_grad(), computing(model, bf16=run.bf16):
        now = model(*rollout.sequences(rows), temperature=run.args.temperature, entropy=False).logprobs
    gap = float((now - rollout.logprobs[rows, : now.shape[1]]).abs().max())
    if not gap <= run.initial_ratio_bound:
        facts = run.recording.facts
        raise ValueError(
            f"the rollouts in {run.recording.folder} were sampled by another policy ({facts.model}) than the one that "
            f"this run starts from ({run.sources['model']}): log-probs of its first responses differ by {gap:.3g} "
            "nats. Start from the same model"
        )


def replay_rollout(state: TrainState, run: Run, recording: Recording) -> tuple[Rollout, dict[str, float]]:
    """Read the next recorded rollout, and what the critic and, if it is another one, the reference say of it now.

    Returns:
        (the rollout, metrics of how far the policy is from the one that sampled it).
    """
    model, rollout = state.model, recording.read(state.iteration, run.device)
    theirs = recording.facts.fingerprints
    same_reference = theirs["reference"] == run.fingerprints["reference"]
    with run.stopwatch.phase("replay"):
        reading = partial(_read_pass, run, model, reference=not same_reference)
        read = read_divided(run, model, rollout, reading)
    values = read.get("values")
    if state.iteration == 0 and all(theirs[name] == x for name, x in model_fingerprints(model).items()):
        values = rollout.values  # to the last bit: decoding rounds otherwise than a whole pass
    state.rollouts_made += 1
    moved = dataclasses.replace(
        rollout,
        values=values,
        value_scale=model.value_scale,
        ref_logprobs=read.get("ref_logprobs", rollout.ref_logprobs),
    )
    return moved, _distance(rollout, read["logprobs"])


def _read_pass(run: Run, model: ActorCritic, part: Sequences, *, reference: bool) -> dict[str, Tensor | None]:
    """Compute log-probs and values of some rows, and on demand the reference's log-probs, [n, t] each by name."""
    now = model(*part, temperature=run.args.temperature, entropy=False)
    return {
        "logprobs": now.logprobs,
        "values": model.in_reward_units(now.values, part.mask),
        "ref_logprobs": run.reference.logprobs(part, temperature=run.args.temperature) if reference else None,
    }


def _distance(rollout: Rollout, logprobs: Tensor) -> dict[str, float]:
    kl = kl_estimate(rollout.logprobs, logprobs, "k1").sum(dim=1)
    # Of the weights w = pi(response) / pi_recording(response): (sum w)^2 / (B sum w^2).
    log_weights = -kl.double()
    effective = (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp() / len(kl)
    return {"replay/kl_nats_per_response": float(kl.mean()), "replay/effective_fraction": float(effective)}
