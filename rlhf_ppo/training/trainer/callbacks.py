"""Callbacks: functions called after each update, and objects whose methods a run calls at more moments."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.runtime.command_line.user_code import require_callbacks

HOOKS = ("on_train_begin", "on_rollout_end", "on_update_end", "on_evaluate", "on_save", "on_train_end")

_ELSEWHERE = {
    "on_step_end": "on_update_end",
    "on_log": "on_update_end",
    "on_optimizer_step": "on_update_end",
    "on_epoch_end": "on_update_end",
    "on_step_begin": "on_rollout_end",
    "on_epoch_begin": "on_rollout_end",
    "on_init_end": "on_train_begin",
    "on_training_start": "on_train_begin",
    "on_training_end": "on_train_end",
}
"""Hooks of transformers and Stable-Baselines3 -> the closest here."""


class Callback:
    """Methods that a run calls; inherit from it and write those you need.

    ``trainer`` is the :class:`rlhf_ppo.PPOTrainer`: ``trainer.iteration``, ``trainer.args``, ``trainer.model``,
    ``trainer.run.log({"custom/...": 1.0})``. Several processes call each of them.
    """

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Refuse a hook that does not exist: it would never be called.

        Raises:
            TypeError: names it, and the hook that was probably meant.
        """
        super().__init_subclass__(**arguments)
        for name in vars(cls):
            if name.startswith("on_") and name not in HOOKS:
                close = _ELSEWHERE.get(name) or next(iter(difflib.get_close_matches(name, HOOKS, n=1)), None)
                meant = f"write {close}" if close else f"there are {', '.join(HOOKS)}"
                raise TypeError(f"{cls.__name__}.{name} would never be called: {meant}")

    def on_train_begin(self, trainer: Any) -> None:
        """Called once, before the first rollout of this process, a resumed run's too."""

    def on_rollout_end(self, trainer: Any, rollout: Rollout) -> None:
        """Called with each rollout, sampled and scored, before the update on it."""

    def on_update_end(self, trainer: Any, metrics: dict[str, float]) -> object:
        """Called after each update with its metrics; returning True ends the run."""

    def on_evaluate(self, trainer: Any, metrics: dict[str, float]) -> None:
        """Called with the metrics (``eval/``) of each evaluation of the run."""

    def on_save(self, trainer: Any, folder: Path) -> None:
        """Called with the folder of each checkpoint, and of the model at the end."""

    def on_train_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        """Called once, after the model is saved, with the last metrics; not after an error."""

    def __call__(self, trainer: Any, metrics: dict[str, float]) -> object:
        """Do what a callback function does."""
        return self.on_update_end(trainer, metrics)


def read_callbacks(callbacks: Any) -> list[Any]:
    """Return the functions and :class:`Callback` objects that a user passed, as a list.

    Raises:
        ValueError: one is neither; names it.
    """
    for i, callback in enumerate(callbacks if isinstance(callbacks, (list, tuple)) else ()):
        foreign = [name for name in dir(callback) if name in {*HOOKS, *_ELSEWHERE}]
        if foreign and not isinstance(callback, Callback):
            raise ValueError(
                f"callbacks[{i}], {type(callback).__name__}, has {foreign[0]}, but is no rlhf_ppo.Callback: inherit "
                "from that, whose hooks are called with the trainer first"
            )
    return require_callbacks(callbacks, "trainer, metrics")


def tell(trainer: Any, callbacks: Sequence[Any], hook: str, *given: Any) -> None:
    """Call a hook of the callbacks that are objects."""
    for callback in callbacks:
        if isinstance(callback, Callback):
            getattr(callback, hook)(trainer, *given)
