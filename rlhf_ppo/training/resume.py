"""Recovery: where a run begins, what it goes back to, and what of it is saved when something ends it."""

from __future__ import annotations

import shlex
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ppo.generation.multi_turn import RespondError
from rlhf_ppo.models.compare import SavedModelError
from rlhf_ppo.rewards.validation import RewardError
from rlhf_ppo.runtime.errors import NonFiniteGradientError
from rlhf_ppo.runtime.resume import find_checkpoint
from rlhf_ppo.runtime.signals import Interrupted, asked_to_stop
from rlhf_ppo.training.checkpoint import Boundary, load_checkpoint, save_checkpoint
from rlhf_ppo.training.stability import PolicyDriftError, nonfinite_parameters

if TYPE_CHECKING:
    from rlhf_ppo.trainer import PPOTrainer

MAX_ROLLBACKS = 3
"""Times that a run goes back to the same checkpoint."""


@dataclass
class SafePoint:
    """What a run can go back to."""

    boundary: Boundary | None = None
    """What a rollout moves, as it was between the last two updates."""
    checkpoint: tuple[int, Path] | None = None
    """The last one: its iteration and folder."""
    rollbacks: int = 0
    """Times that the run has gone back to it."""


def begin(trainer: PPOTrainer, resume: str | Path | None, settings: dict[str, Any], *, override: bool) -> None:
    """Start afresh, or go on from a checkpoint.

    Args:
        trainer: as it was built.
        resume, override: see :meth:`rlhf_ppo.PPOTrainer.train`.
        settings: for run.json.
    """
    checkpoint = None if resume is None else find_checkpoint(resume, trainer.run.path)
    if checkpoint is None:
        if resume is not None and not trainer.args.quiet:
            print(f"no checkpoint in {trainer.run.path}: the run starts afresh")
        trainer.run.start(settings)
        trainer.safe.checkpoint = None
        return
    load_checkpoint(trainer, checkpoint, override=override)
    if not trainer.args.quiet:
        print(f"going on after iteration {trainer.iteration}, from {checkpoint.folder}")
    trainer.safe.checkpoint = (trainer.iteration, checkpoint.folder)
    trainer.run.go_on(checkpoint.folder, trainer.iteration, settings)


def keep_checkpoint(trainer: PPOTrainer) -> Path:
    """Save where the run is now, unless that has just been done. Not to be called in the middle of an update."""
    safe = trainer.safe
    if safe.checkpoint is None or safe.checkpoint[0] != trainer.iteration:
        safe.checkpoint = (trainer.iteration, save_checkpoint(trainer, safe.boundary))
        safe.rollbacks = 0
    return safe.checkpoint[1]


def go_back(trainer: PPOTrainer, problem: str) -> None:
    """Undo an update that cannot stand.

    Raises:
        NonFiniteGradientError: there is no going back; says the problem.
    """
    trainer.skipped_in_a_row = 0
    safe = trainer.safe
    if trainer.args.on_nonfinite != "rollback" or safe.checkpoint is None or safe.rollbacks >= MAX_ROLLBACKS:
        raise NonFiniteGradientError(problem)
    made, safe.rollbacks = trainer.rollouts_made, safe.rollbacks + 1
    load_checkpoint(trainer, safe.checkpoint[1], override=True)
    trainer.rollouts_made = made  # other draws: the same would lead to the same
    trainer.run.rewind(trainer.iteration)
    warnings.warn(f"{problem}. Going back to {safe.checkpoint[1]}, with other draws", stacklevel=3)


def save_model(trainer: PPOTrainer) -> None:
    """Save the model of a run that is over, or somewhere else where its own folder has no room.

    Raises:
        OSError: it does not lie in the run's folder; says where it lies instead.
    """
    try:
        trainer.save_model()
    except OSError as error:
        raise OSError(error.errno, f"the model is not in its place: {error.strerror}. {_rescue(trainer)}") from error


def _rescue(trainer: PPOTrainer) -> str:
    """Say where the model lies: in a checkpoint, or else in the system's temporary folder, where it is then saved."""
    checkpoint, said = trainer.safe.checkpoint, []
    if checkpoint is None or checkpoint[0] != trainer.iteration:
        try:
            said.append(f"It lies in {trainer.save_model(tempfile.mkdtemp(prefix='rlhf-ppo-model-'))} instead")
        except OSError as error:
            said.append(f"Nor does it lie elsewhere: {error.strerror}")
    if checkpoint is not None:
        iteration, folder = checkpoint
        said.append(
            f"{folder} holds it as it was after iteration {iteration}: free some space, then go on with "
            f"resume_from_checkpoint={shlex.quote(str(folder))}"
        )
    return ". ".join(said)


def save_after(trainer: PPOTrainer, error: BaseException) -> None:
    """Whatever ends a run, what was learned until then stays; between two updates, so that the run can go on.

    Raises:
        RewardError, RespondError, NonFiniteGradientError, PolicyDriftError: the same error, which also says where the
            checkpoint is.
    """
    if asked_to_stop() and type(error) is KeyboardInterrupt:
        return  # a second signal, maybe in the middle of an update
    if nonfinite_parameters(trainer.model):
        return  # nothing worth saving, and nothing that should replace what there is
    folder: Path | None = None
    # What ended the run may be in the way of saving, too (a full disk), and is the error to see.
    if isinstance(error, (Interrupted, RewardError, RespondError, NonFiniteGradientError, PolicyDriftError)):
        try:
            folder = keep_checkpoint(trainer)
        except OSError as failure:
            warnings.warn(str(failure.strerror), stacklevel=2)
    try:
        save_model(trainer)
    except OSError as failure:
        warnings.warn(str(failure.strerror), stacklevel=2)
    except SavedModelError as failure:
        warnings.warn(str(failure), stacklevel=2)
    if isinstance(error, Interrupted):
        error.saved = folder
    elif folder is not None:
        raise type(error)(f"{error}. Go on with resume_from_checkpoint={shlex.quote(str(folder))}") from error.__cause__
