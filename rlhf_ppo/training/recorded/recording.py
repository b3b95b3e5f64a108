"""Recording: where a run's recording begins or continues, what it is of, and recording a policy without training it.

A recording that is full keeps its beginning. Its first rollouts are those of the policy that the run started from: a
run that starts from a critic fitted on them meets such responses first, and only there is a replay exact.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import PretrainedConfig

from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.loading import vocabulary_size
from rlhf_ppo.runtime.checkpoints.checkpoint import as_json
from rlhf_ppo.runtime.logs.progress import ProgressDisplay
from rlhf_ppo.runtime.machine.signals import stop_if_asked
from rlhf_ppo.training.checkpoints.fingerprints import parameters_fingerprint, tokenizer_fingerprint
from rlhf_ppo.training.recorded.recorded_rollouts import (
    FOLDER,
    Recording,
    RecordingFacts,
    open_recording,
    record_rollout,
    rewind_recording,
    start_recording,
)
from rlhf_ppo.training.rollouts.collect import collect, next_draws, next_prompts
from rlhf_ppo.training.run import Run
from rlhf_ppo.training.state import TrainState


def recording_facts(run: Run, model: ActorCritic) -> RecordingFacts:
    """Return what a run's rollouts are of; ``model`` as it samples the first of them."""
    return RecordingFacts(
        model=run.sources["model"] or "object",
        reference=run.sources["reference"] or "object",
        architecture=architecture(cast(Any, model.policy).config),
        tokenizer=tokenizer_fingerprint(run.tokenizer),
        rewards={name: weight for name, (_, weight) in run.rewards.items()},
        settings=as_json(dataclasses.asdict(run.args)),
        fingerprints=as_json({**run.fingerprints, **model_fingerprints(model)}),
    )


def architecture(config: PretrainedConfig) -> str:
    """Return a model's kind and sizes, as errors name them."""
    text = config.get_text_config()
    sizes = (getattr(text, name, "?") for name in ("num_hidden_layers", "hidden_size"))
    return "{}, {} layers, {} wide, {} tokens".format(config.model_type, *sizes, vocabulary_size(config))


def model_fingerprints(model: ActorCritic) -> dict[str, str | None]:
    """Return digests of the policy's weights, and of the critic's own with its scale (None: no critic)."""
    own = {id(p) for p in model.critic_parameters()}
    policy, critic = ([(n, p) for n, p in model.named_parameters() if (id(p) in own) is of] for of in (False, True))
    return {
        "policy": parameters_fingerprint(policy),
        "critic": f"{parameters_fingerprint(critic)}, {model.value_scale}" if critic else None,
    }


def begin_recording(state: TrainState, run: Run) -> None:
    """Begin a recording with the next rollout, under ``save_rollouts``."""
    if not run.args.save_rollouts:
        return
    facts = recording_facts(run, state.model)  # on every process: it takes all to read sharded weights
    if run.folder.writes:
        start_recording(run.folder.path, facts, first=state.iteration + 1)


def continue_recording(state: TrainState, run: Run, origin: Path) -> None:
    """Continue the recording of a run that resumes: what came after the checkpoint is removed from it.

    Args:
        state: as the checkpoint had it.
        run: the one that resumes.
        origin: folder of the run whose checkpoint that was; its recording so far is copied.
    """
    if run.processes.on_first(lambda: _must_begin(state, run, origin)):
        begin_recording(state, run)


def _must_begin(state: TrainState, run: Run, origin: Path) -> bool:
    """Rewind the recording; return whether a new one begins."""
    folder, record = run.folder.path, run.args.save_rollouts
    if record and origin.resolve() != folder.resolve() and (origin / FOLDER).is_dir():
        shutil.copytree(origin / FOLDER, folder / FOLDER, dirs_exist_ok=True)
    following = rewind_recording(folder, state.iteration)
    if following is None or following > state.iteration + 1:
        return True
    if record and following <= state.iteration:
        warnings.warn(
            f"the recording in {folder / FOLDER} ends with rollout {following - 1}, and the run resumes after rollout "
            f"{state.iteration}: nothing more is recorded, so that it has no gap",
            stacklevel=6,
        )
    return False


def keep_rollout(run: Run, number: int, rollout: Rollout) -> None:
    """Record a rollout under ``save_rollouts``; a full disk ends the recording, not the run."""
    if not run.args.save_rollouts or not run.folder.writes:
        return
    try:
        _record(run, number, rollout)
    except OSError as error:
        # The recording has no gaps: those after it are left out without a word.
        warnings.warn(f"rollout {number} and those after it are not recorded: {error.strerror}", stacklevel=3)


def _record(run: Run, number: int, rollout: Rollout) -> bool:
    """Record a rollout; return whether it was, and warn of the first that has no room under ``save_rollouts_gb``."""
    limit = run.args.save_rollouts_gb
    recorded = record_rollout(run.folder.path, number, rollout, max_bytes=limit * 1e9)
    if recorded is False:
        warnings.warn(
            f"rollout {number} and those after it are not recorded: they would exceed save_rollouts_gb={limit}",
            stacklevel=4,
        )
    return bool(recorded)


def record_policy(state: TrainState, run: Run, progress: ProgressDisplay) -> Recording:
    """Sample, score and record the rollouts of a run that trains nothing; see :meth:`rlhf_ppo.PPOTrainer.record`."""
    run = dataclasses.replace(run, args=dataclasses.replace(run.args, save_rollouts=True))
    begin_recording(state, run)
    for done in range(run.args.num_rollouts):
        at = dataclasses.replace(state, iteration=done, rollouts_made=done)  # which prompts and which draws
        rollout = collect(run, state.model, next_prompts(run, done), next_draws(run, at))
        assert rollout.scores is not None and rollout.scored is not None
        if not run.processes.on_first(partial(_record, run, done + 1, rollout)):
            break
        progress.update((done + 1) * run.args.rollout_batch_size, score=float(rollout.scores[rollout.scored].mean()))
        run.processes.facts(stop_if_asked)
    return open_recording(run.folder.path)
