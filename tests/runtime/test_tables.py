"""Tables of a run's folder: a file per rollout, whole or not at all."""

from __future__ import annotations

import pytest
from pyarrow import parquet

from rlhf_ppo.runtime.logs.run_directory import RunDirectory
from rlhf_ppo.runtime.logs.tables import RESPONSES, TABLES, read_table, table_numbers, write_table

ROW = {"response": [0], "score": [None], "tokens": [3], "finished": [True], "kl": [0.5], "repeated": [0.0]}


def test_a_rollout_is_written_again_instead_of_twice(tmp_path):
    for kl in (0.25, 0.5):
        write_table(tmp_path, "responses", 3, {**ROW, "kl": [kl]})
    assert table_numbers(tmp_path, "responses") == [3]
    assert read_table(tmp_path, "responses", 3) == {"iteration": [3], **ROW}
    # As any reader of parquet sees the folder.
    table = parquet.read_table(tmp_path / "responses")
    assert table.num_rows == 1 and table.column_names == list(RESPONSES)


def test_columns_say_what_they_mean(tmp_path):
    write_table(tmp_path, "responses", 1, ROW)
    (file,) = (tmp_path / "responses").iterdir()
    schema = parquet.read_schema(file)
    for name, column in RESPONSES.items():
        assert schema.field(name).metadata[b"meaning"].decode() == column.meaning


def test_every_column_is_in_the_docs(request):
    page = (request.config.rootpath / "docs" / "report.md").read_text(encoding="utf-8")
    for columns in TABLES.values():
        for name, column in columns.items():
            assert f"| `{name}` | {column.kind} | {column.meaning} |" in page


def test_a_run_that_starts_afresh_or_rolls_back_leaves_no_rows_behind(tmp_path):
    run = RunDirectory(tmp_path)
    run.start({})
    for number in (1, 2, 3):
        write_table(tmp_path, "responses", number, ROW)
    run.rewind(2)
    assert table_numbers(tmp_path, "responses") == [1, 2]
    run.start({})  # it was killed before its first line of metrics
    assert not table_numbers(tmp_path, "responses")
    assert table_numbers(tmp_path / "previous-1", "responses") == [1, 2]


def test_a_damaged_file_is_named(tmp_path):
    write_table(tmp_path, "responses", 1, ROW)
    (file,) = (tmp_path / "responses").iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"rollout-000001\.parquet is damaged"):
        read_table(tmp_path, "responses", 1)
