"""Mixing: several data sets read as one, end to end or in given proportions."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset, concatenate_datasets, interleave_datasets

from rlhf_ppo.data import ROW_NAME, load_rows, row_names


def load_mixture(
    sources: str | Sequence[str], split: str = "train", *, weights: Sequence[float] | None = None, seed: int = 0
) -> Dataset:
    """One data set out of one or more (see :func:`rlhf_ppo.data.load_rows`).

    Without weights the data sets follow one another whole. With weights each row is drawn from data set i with
    probability weights[i] / sum, without repetition, until one of them has no row left: the proportions hold
    throughout, no row is there twice, and what is left of the others is not used. Each row's name, by data set and
    number, comes along in the column ROW_NAME.

    Raises:
        FileNotFoundError, ValueError: see :func:`rlhf_ppo.data.load_rows`; weights that do not fit; other columns.
    """
    sources = (sources,) if isinstance(sources, str) else tuple(sources)
    require_weights(sources, weights)
    parts = [load_rows(source, split) for source in sources]
    for source, part in zip(sources[1:], parts[1:], strict=True):
        _require_same_columns(sources[0], parts[0], source, part)
    names = [source if split == "train" else f"{source}, {split}," for source in sources]
    parts = [part.add_column(ROW_NAME, row_names(part, f"{name} ")) for name, part in zip(names, parts, strict=True)]
    if len(parts) == 1:
        return parts[0]
    if weights is None:
        return concatenate_datasets(parts)
    total = sum(weights)
    return interleave_datasets(
        parts, probabilities=[weight / total for weight in weights], seed=seed, stopping_strategy="first_exhausted"
    )


def require_weights(sources: str | Sequence[str], weights: Sequence[float] | None) -> None:
    """Raise a ValueError unless there is one positive weight per data set (or no weights at all)."""
    count = 1 if isinstance(sources, str) else len(sources)
    if not count:
        raise ValueError("dataset is empty: name at least one data set")
    if weights is None:
        return
    if len(weights) != count:
        raise ValueError(f"dataset_weights has {len(weights)} weights for {count} data sets in dataset")
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"dataset_weights must be positive, got {tuple(weights)}; leave a data set out instead")


def _require_same_columns(first: str, rows: Dataset, second: str, others: Dataset) -> None:
    only_first = sorted(set(rows.column_names) - set(others.column_names))
    only_second = sorted(set(others.column_names) - set(rows.column_names))
    if only_first or only_second:
        raise ValueError(
            "data sets to mix must have the same columns: "
            f"only {first} has {only_first}, only {second} has {only_second}; rename or drop these"
        )
    for name, kind in rows.features.items():
        if others.features[name] != kind:
            raise ValueError(
                f"data sets to mix must have the same columns: {name!r} is {kind} in {first} "
                f"and {others.features[name]} in {second}"
            )
