"""Mixtures: several data sets as one, concatenated or in given proportions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlhf_ppo.config.arguments.data import DataArgs, require_weights
from rlhf_ppo.data.files import load_rows
from rlhf_ppo.data.rows import Rows, interleave, join


def load_data(args: DataArgs, *, seed: int) -> Rows:
    """Load the data sets that a command's arguments name (see :func:`load_mixture`)."""
    return load_mixture(args.dataset, args.split, weights=args.dataset_weights, seed=seed)


def load_mixture(
    sources: str | Sequence[str], split: str = "train", *, weights: Sequence[float] | None = None, seed: int = 0
) -> Rows:
    """Load one or more data sets as one (see :func:`rlhf_ppo.data.files.load_rows`).

    Without weights the data sets are concatenated. With weights each row is drawn from data set i with probability
    weights[i] / sum, without replacement, until one of them is exhausted: the proportions hold throughout, no row
    occurs twice, and the rest of the others is unused. A row's name is its data set and its number there.

    Raises:
        FileNotFoundError, ValueError: see :func:`rlhf_ppo.data.files.load_rows`; invalid weights; columns that differ
            in name or type.
    """
    sources = (sources,) if isinstance(sources, str) else tuple(sources)
    require_weights(sources, weights)
    parts = [load_rows(source, split) for source in sources]
    for source, part in zip(sources[1:], parts[1:], strict=True):
        _require_same_columns(sources[0], parts[0], source, part)
    names = [source if split == "train" else f"{source}, {split}," for source in sources]
    parts = [
        replace(part, names=[f"{name} row {i}" for i in range(len(part))])
        for name, part in zip(names, parts, strict=True)
    ]
    if weights is None:
        return join(parts)
    return interleave(parts, [weight / sum(weights) for weight in weights], seed)


def _require_same_columns(first: str, rows: Rows, second: str, others: Rows) -> None:
    only_first = sorted(set(rows.column_names) - set(others.column_names))
    only_second = sorted(set(others.column_names) - set(rows.column_names))
    if only_first or only_second:
        raise ValueError(
            "data sets to mix must have the same columns: "
            f"only {first} has {only_first}, only {second} has {only_second}; rename or drop these"
        )
    for name in rows.column_names:
        ours, theirs = _kinds(rows, name), _kinds(others, name)
        numbers = {"int64", "float64"}
        if ours and theirs and not (ours & theirs or (ours & numbers and theirs & numbers)):
            raise ValueError(
                f"data sets to mix must have the same columns: {name!r} is {' or '.join(sorted(ours))} in {first} "
                f"and {' or '.join(sorted(theirs))} in {second}"
            )


def _kinds(rows: Rows, column: str) -> set[str]:
    """Return the types in a column; None fits any."""
    words = {str: "string", int: "int64", float: "float64"}
    return {words.get(kind, kind.__name__) for kind in map(type, rows[column]) if kind is not type(None)}
