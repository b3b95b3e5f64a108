"""Resuming: where a run begins, what it can roll back to, and what is saved when an error or a signal ends it."""

from __future__ import annotations

import shlex
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ppo.generation.multi_turn import RespondError
from rlhf_ppo.generation.vllm.server import VLLMError
from rlhf_ppo.models.actor_critic import ActorCritic
from rlhf_ppo.models.compare import SavedModelError
from rlhf_ppo.models.saving import bytes_to_save, save_actor_critic, save_reference
from rlhf_ppo.models.sharded.skeleton import whole_copy
from rlhf_ppo.rewards.validation import RewardError
from rlhf_ppo.runtime.checkpoints.checkpoint import MANIFEST, Checkpoint, file_facts
from rlhf_ppo.runtime.checkpoints.resume import find_checkpoint
from rlhf_ppo.runtime.errors import NonFiniteGradientError, RatioTripwireError, UnhealthyRunError
from rlhf_ppo.runtime.files import require_space
from rlhf_ppo.runtime.logs.lines import LOGGER
from rlhf_ppo.runtime.machine.signals import Interrupted, asked_to_stop
from rlhf_ppo.runtime.processes.errors import OtherProcessError
from rlhf_ppo.runtime.processes.group import ProcessGroup
from rlhf_ppo.training.checkpoints.checkpoint import Boundary, load_checkpoint, save_checkpoint
from rlhf_ppo.training.recorded.recorded_rollouts import rewind_recording
from rlhf_ppo.training.recorded.recording import begin_recording, continue_recording
from rlhf_ppo.training.run import Run
from rlhf_ppo.training.stability import PolicyDriftError, nonfinite_parameters
from rlhf_ppo.training.state import TrainState

_SAYS_HOW = (
    *(
        RewardError,
        RespondError,
        VLLMError,
        NonFiniteGradientError,
        PolicyDriftError,
        RatioTripwireError,
        UnhealthyRunError,
    ),
)
"""Errors whose message goes on to say how to resume."""

_RAISED_BY_ALL = (Interrupted, *_SAYS_HOW)
"""What all processes raise, because they agree upon it or find it in the same numbers."""

MAX_ROLLBACKS = 3
"""At most this many rollbacks to one checkpoint."""


@dataclass
class SafePoint:
    """What a run can return to."""

    boundary: Boundary | None = None
    """What a rollout changes, as it was between the last two updates."""
    checkpoint: tuple[int, Path] | None = None
    """Iteration and folder of the last checkpoint."""
    rollbacks: int = 0
    """How often the run has rolled back to it."""
    between_updates: bool = False
    """Whether the state is that of ``boundary``, also in the middle of a rollout."""

    def mark(self, state: TrainState, run: Run) -> None:
        """Record, between two updates, what a rollout changes."""
        self.boundary, self.between_updates = Boundary.of(state, run), True


def begin(
    state: TrainState,
    run: Run,
    safe: SafePoint,
    checkpoint: str | Path | None,
    facts: dict[str, Any],
    *,
    override: bool,
) -> None:
    """Start a run, or resume one from a checkpoint.

    Args:
        state: as it was built.
        checkpoint, override: see ``resume_from_checkpoint`` and ``resume_override`` of
            :meth:`rlhf_ppo.PPOTrainer.train`.
        facts: for run.json.
    Raises:
        OSError: there is no room for the model that is saved at the end.
    """
    needed = bytes_to_save(state.model, base=run.base)
    require_space(run.folder.path, needed, f"the model that is saved into {run.folder.path}")
    found = None if checkpoint is None else find_checkpoint(checkpoint, run.folder.path)
    _require_one_checkpoint(run, found)
    if found is None:
        if checkpoint is not None and not run.args.quiet:
            LOGGER.info("no checkpoint in %s: the run starts afresh", run.folder.path)
        run.folder.start(facts)
        safe.checkpoint = None
        begin_recording(state, run)
    else:
        load_checkpoint(state, run, found, override=override)
        if not run.args.quiet:
            LOGGER.info("resuming after iteration %d, from %s", state.iteration, found.folder)
        safe.checkpoint = (state.iteration, found.folder)
        run.folder.continue_from(found.folder, state.iteration, facts)
        continue_recording(state, run, found.folder.parent)
    if run.start is None and run.reference.model is not None:
        # No other folder holds the reference that an evaluation of this run needs.
        with whole_copy(run.reference.model, keep=run.processes.first) as model:
            run.processes.on_first(lambda: save_reference(model, run.tokenizer, run.folder.path))


def _require_one_checkpoint(run: Run, found: Checkpoint | None) -> None:
    """Raise a ValueError unless all processes have found the same checkpoint."""
    digests = run.processes.facts(lambda: None if found is None else file_facts(found.folder / MANIFEST)["sha256"])
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise ValueError(
                f"process {rank} sees {'no' if digest is None else 'another'} checkpoint where the first one sees "
                f"{'none' if found is None else found.folder}: output_dir={str(run.folder.path)!r} must be on a file "
                "system that all machines share"
            )


def keep_checkpoint(state: TrainState, run: Run, safe: SafePoint, processes: ProcessGroup | None = None) -> Path:
    """Save a checkpoint, unless this iteration has one. Not to be called in the middle of an update.

    ``processes`` are those that save; None: all of the run.
    """
    if safe.checkpoint is None or safe.checkpoint[0] != state.iteration:
        safe.checkpoint = (state.iteration, save_checkpoint(state, run, safe.boundary, processes))
        safe.rollbacks = 0
    return safe.checkpoint[1]


def roll_back(state: TrainState, run: Run, safe: SafePoint, problem: str) -> None:
    """Undo an update by returning to the last checkpoint (``on_nonfinite="rollback"``).

    Raises:
        NonFiniteGradientError: there is no checkpoint to return to, or that has not helped; says the problem.
    """
    state.consecutive_skips = 0
    if run.args.on_nonfinite != "rollback" or safe.checkpoint is None or safe.rollbacks >= MAX_ROLLBACKS:
        raise NonFiniteGradientError(problem)
    made, safe.rollbacks = state.rollouts_made, safe.rollbacks + 1
    load_checkpoint(state, run, safe.checkpoint[1], override=True)
    state.rollouts_made = made  # other random draws: the same ones would lead to the same problem
    run.folder.rewind(state.iteration)
    run.processes.on_first(lambda: rewind_recording(run.folder.path, state.iteration))
    warnings.warn(f"{problem}. Rolling back to {safe.checkpoint[1]}, with other random draws", stacklevel=3)


def save_model(state: TrainState, run: Run, safe: SafePoint, processes: ProcessGroup | None = None) -> None:
    """Save the model of a run that has ended, or elsewhere if the run's folder has no room.

    ``processes`` are those that save; None: all of the run.

    Raises:
        OSError: it is not in the run's folder; says where it is instead.
    """

    with whole_copy(state.model, keep=run.processes.first) as model:
        model.value_scale = state.model.value_scale

        def write() -> None:
            try:
                _write_model(model, run, run.folder.path)
            except OSError as error:
                where = _rescue(state, model, run, safe)
                raise OSError(error.errno, f"the model is not in its place: {error.strerror}. {where}") from error

        (processes or run.processes).on_first(write)


def _write_model(model: ActorCritic, run: Run, folder: str | Path) -> None:
    save_actor_critic(model, run.tokenizer, Path(folder), base=run.base)


def _rescue(state: TrainState, model: ActorCritic, run: Run, safe: SafePoint) -> str:
    """Say where the model is: in a checkpoint, or else in the system's temporary folder, where it is then saved."""
    checkpoint, said = safe.checkpoint, []
    if checkpoint is None or checkpoint[0] != state.iteration:
        folder = tempfile.mkdtemp(prefix="rlhf-ppo-model-")
        try:
            _write_model(model, run, folder)
            said.append(f"It was saved in {folder} instead")
        except OSError as error:
            said.append(f"Saving it elsewhere failed, too: {error.strerror}")
    if checkpoint is not None:
        iteration, folder = checkpoint
        said.append(
            f"{folder} holds it as it was after iteration {iteration}: free some space, then resume with "
            f"resume_from_checkpoint={shlex.quote(str(folder))}"
        )
    return ". ".join(said)


@contextmanager
def saving_after_errors(state: TrainState, run: Run, safe: SafePoint) -> Iterator[None]:
    """Save what was learned if an error or a signal ends the block, in a checkpoint if the run can resume from it.

    If one of several processes fails, the first one saves alone. Processes that share the weights save together what
    ends them between two updates; of what stops one of them alone, the last checkpoint is left.

    Raises:
        RewardError, RespondError, VLLMError, NonFiniteGradientError, PolicyDriftError: the same error, which also says
            where the checkpoint is.
    """
    try:
        with run.processes.saving():
            yield
    except BaseException as raised:
        error = _find_cause(run, safe, raised)
        cause, folder = error.__cause__, None
        if not _is_at_once(error) and _is_worth_saving(state, run):
            folder = _save_everything(state, run, safe, error)
        if isinstance(error, Interrupted):
            error.saved = folder
        elif isinstance(error, _SAYS_HOW):
            error = error if folder is None else type(error)(f"{error}. Resume with {_resume(folder)}")
        elif run.processes.first and safe.checkpoint is not None:
            print(f"saved in {safe.checkpoint[1]}: resume with {_resume(safe.checkpoint[1])}", file=sys.stderr)
        if error is raised:
            raise
        raise error from cause


def _find_cause(run: Run, safe: SafePoint, raised: BaseException) -> BaseException:
    """Return the error by which all processes end, of which this process raised one; tell the others."""
    if run.plan.sharding is not None and safe.between_updates:
        raised = run.processes.hand_over(raised)
    elif isinstance(raised, _RAISED_BY_ALL):
        return raised
    return run.processes.fail(raised)


def _is_at_once(error: BaseException) -> bool:
    """Whether a second signal ends the run, here or in another process, perhaps in the middle of an update."""
    if isinstance(error, OtherProcessError):
        return error.failure.exit_code > 128
    return asked_to_stop() and type(error) is KeyboardInterrupt


def _is_worth_saving(state: TrainState, run: Run) -> bool:
    """Whether this process can save weights, and these may replace what there is."""
    if run.processes.broken and run.plan.sharding is not None:
        return False  # no process has the whole model
    return not nonfinite_parameters(state.model)


def _resume(folder: Path) -> str:
    return f"resume_from_checkpoint={shlex.quote(str(folder))}"


def _save_everything(state: TrainState, run: Run, safe: SafePoint, error: BaseException) -> Path | None:
    """Save the model and, after an error between two updates, a checkpoint; return the checkpoint's folder.

    What ended the run may also be in the way of saving (a full disk), and is the error to report: others are warnings.
    """
    folder: Path | None = None
    if run.processes.broken and not run.processes.first:
        return None
    if safe.between_updates and not isinstance(error, OSError):
        try:
            folder = keep_checkpoint(state, run, safe, run.processes.survivors)
        except OSError as failure:
            warnings.warn(str(failure.strerror), stacklevel=2)
    try:
        save_model(state, run, safe, run.processes.survivors)
    except OSError as failure:
        warnings.warn(str(failure.strerror), stacklevel=2)
    except SavedModelError as failure:
        warnings.warn(str(failure), stacklevel=2)
    return folder
