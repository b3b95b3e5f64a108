"""DataArgs: where a command's data comes from, one record for the commands that read data sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ppo.core.validation import Settings, is_changed


def require_weights(sources: str | Sequence[str], weights: Sequence[float] | None) -> None:
    """Raise a ValueError unless there is one positive weight per data set (or no weights at all)."""
    count = 1 if isinstance(sources, str) else len(sources)
    if not count:
        raise ValueError("dataset is empty: name at least one data set")
    if weights is None:
        return
    if len(weights) != count:
        raise ValueError(f"dataset_weights has {len(weights)} weights for {count} data sets in dataset")
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"dataset_weights must be positive, got {tuple(weights)}; leave a data set out instead")


@dataclass(frozen=True, kw_only=True)
class DataArgs(Settings):
    """Data: what is read."""

    dataset: tuple[str, ...]
    """One or more data sets: hub ids, folders, or csv, jsonl or parquet files (also .gz)."""
    dataset_weights: tuple[float, ...] | None = None
    """Share of each data set in the mixture; None: all rows of all of them."""
    split: str = "train"
    """Split of the data sets."""

    def __post_init__(self) -> None:
        if isinstance(self.dataset, str):
            object.__setattr__(self, "dataset", (self.dataset,))
        super().__post_init__()
        require_weights(self.dataset, self.dataset_weights)


@dataclass(frozen=True, kw_only=True)
class PromptArgs(DataArgs):
    """Data: what is read."""

    dataset: tuple[str, ...]
    """Prompts: one or more hub ids, folders, or csv, jsonl or parquet files (also .gz)."""
    prompt_column: str = "prompt"
    """Column with the prompts, text or chat messages; the other columns reach the reward functions."""


@dataclass(frozen=True, kw_only=True)
class HeldOutPromptArgs(PromptArgs):
    """Data: what is read."""

    eval_dataset: str | None = None
    """Held-out prompts of the same form; None: set eval_size rows of the data set aside."""
    eval_split: str | None = None
    """Split of eval_dataset; None: split."""
    eval_size: int = 64
    """Rows set aside for the evaluations when there is no eval_dataset; 0: no evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(0, "eval_size")
        if self.eval_dataset is None and self.eval_split is not None:
            raise ValueError(f"eval_split={self.eval_split!r} is a split of eval_dataset, which is not given: name it")
        if self.eval_dataset is not None and is_changed(self, "eval_size"):
            raise ValueError(
                f"eval_size={self.eval_size} sets rows of dataset aside, but the evaluation reads eval_dataset="
                f"{self.eval_dataset!r}: drop one of them"
            )
