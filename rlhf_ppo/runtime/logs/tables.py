"""Tables of a run's folder in parquet: one file per recorded rollout, so that no row is ever written twice."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_ppo.runtime.files import replacing_files


class Column(NamedTuple):
    """One column of a table."""

    kind: str
    """Its type in parquet: int32, float32, string or bool. Any value may be null, where it is undefined."""
    meaning: str


_ACTION = {
    "value": Column("float32", "what the critic expected before it, in the reward's units; null without a critic"),
    "delta": Column("float32", "reward + gamma V' - V, how far the next value and the reward missed that"),
    "advantage": Column("float32", "the advantage, before whitening"),
    "weight": Column("float32", "the advantage as the update trained on it, usually whitened"),
    "ratio": Column("float32", "probability after the update over that before it"),
    "clipped": Column("string", "above or below: on which side of the clip range the ratio is; empty: inside"),
    "gradient_alive": Column("bool", "whether the policy's loss still has a gradient for it, after the update"),
}

TOKENS: dict[str, Column] = {
    "iteration": Column("int32", "the rollout, from 1, as in metrics.jsonl"),
    "response": Column("int32", "the response's place in its rollout, from 0: its line among those of samples.jsonl"),
    "position": Column("int32", "its place in the response, from 0; gaps are tokens that the policy did not choose"),
    "token": Column("int32", "its id"),
    "text": Column("string", "what it adds to the text before it; special tokens are spelled out"),
    "reward": Column("float32", "its reward: its share of the score and penalties, minus kl_coef times its KL"),
    "kl": Column("float32", "log-prob minus the reference's, in nats"),
    "logprob": Column("float32", "log-prob when it was sampled"),
    "ref_logprob": Column("float32", "log-prob under the frozen reference"),
    "entropy": Column("float32", "entropy of the distribution that it was drawn from, in nats"),
    **_ACTION,
}
"""Columns of ``tokens/``: the policy's tokens in the first responses of a rollout."""

RESPONSES: dict[str, Column] = {
    "iteration": TOKENS["iteration"],
    "response": Column("int32", "the response's place in its rollout, from 0"),
    "score": Column("float32", "its score, before any penalty; null if it had none"),
    "tokens": Column("int32", "its length"),
    "finished": Column("bool", "whether a stop token or stop string ended it"),
    "kl": Column("float32", "its KL to the reference in nats, summed over its tokens"),
    "repeated": Column("float32", "share of its runs of four tokens that occurred in it before"),
}
"""Columns of ``responses/``: all responses of a rollout."""

STEPS: dict[str, Column] = {
    "iteration": TOKENS["iteration"],
    "copy": Column("int32", "the environment copy, from 0"),
    "step": Column("int32", "the step's place in the rollout, from 0"),
    "action": Column("string", "the action"),
    "reward": Column("float32", "its reward, as it was learned from"),
    **_ACTION,
    "ended": Column("string", "terminated or truncated: how the episode ended here; empty: it went on"),
}
"""Columns of ``steps/``: what the last update of a control task learned from, of its first copies."""

TABLES: dict[str, dict[str, Column]] = {"tokens": TOKENS, "responses": RESPONSES, "steps": STEPS}
"""Folder of each table -> its columns."""


def write_table(folder: Path, name: str, number: int, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write a rollout's rows, in place of those that are there.

    Args:
        folder: the run's.
        name: one of TABLES.
        number: the rollout's iteration.
        columns: the values of each column but ``iteration``.
    Raises:
        OSError: the disk is full; what was there is untouched.
    """
    import pyarrow
    from pyarrow import parquet

    fields = TABLES[name]
    rows = len(next(iter(columns.values())))
    kinds = {kind: getattr(pyarrow, {"bool": "bool_"}.get(kind, kind))() for kind, _ in fields.values()}
    schema = pyarrow.schema(
        [pyarrow.field(n, kinds[c.kind], metadata={"meaning": c.meaning}) for n, c in fields.items()]
    )
    table = pyarrow.table({"iteration": [number] * rows, **columns}, schema=schema)
    with replacing_files(folder / name, needed=table.nbytes) as new:
        parquet.write_table(table, new / _file_name(number), compression="zstd", write_statistics=False)


def table_numbers(folder: Path, name: str) -> list[int]:
    """List the iterations that have rows in a table, in order."""
    found = (file.stem.rpartition("-")[2] for file in (folder / name).glob("rollout-*.parquet"))
    return sorted(int(number) for number in found if number.isdecimal())


def read_table(folder: Path, name: str, number: int) -> dict[str, list[Any]]:
    """Read the rows of one rollout, by column.

    Raises:
        ValueError: the file is damaged or has other columns; names it.
    """
    from pyarrow import ArrowException, parquet

    file = folder / name / _file_name(number)
    try:
        # Read by Python, so that the file cannot change below the reader.
        columns = parquet.ParquetFile(file).read().to_pydict()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{file} is damaged ({str(error).splitlines()[0]})") from None
    if missing := [column for column in TABLES[name] if column not in columns]:
        raise ValueError(f"{file} is damaged (it has no column {missing[0]!r})")
    return columns


def rewind_tables(folder: Path, number: int) -> None:
    """Remove the rows of rollouts after ``number``."""
    for name in TABLES:
        for later in table_numbers(folder, name):
            if later > number:
                (folder / name / _file_name(later)).unlink()


def copy_tables(origin: Path, folder: Path) -> None:
    """Copy all tables of one run's folder into another's."""
    for name in TABLES:
        if (origin / name).is_dir():
            shutil.copytree(origin / name, folder / name, dirs_exist_ok=True)


def _file_name(number: int) -> str:
    return f"rollout-{number:06}.parquet"
