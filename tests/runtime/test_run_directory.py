"""The folder of a run: an earlier run is moved aside, lines are appended, any text survives."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from rlhf_ppo.runtime.logs.run_directory import RunDirectory, read_run


def test_a_second_run_moves_the_first_aside(tmp_path):
    run = RunDirectory(tmp_path / "run")
    for number in range(3):
        run.start({"number": number})
        run.log({"score/mean": float(number)})
        (run.path / "model.safetensors").write_text(str(number))
    assert json.loads((run.path / "run.json").read_text()) == {"number": 2}
    assert run.read() == [{"score/mean": 2.0}]
    for number in (0, 1):
        old = run.path / f"previous-{number + 1}"
        assert json.loads((old / "run.json").read_text()) == {"number": number}
        assert json.loads((old / "metrics.jsonl").read_text()) == {"score/mean": float(number)}
        assert (old / "model.safetensors").read_text() == str(number)


def test_a_folder_without_a_run_keeps_its_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunDirectory(tmp_path).start({})
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_unknown_metric_is_refused_and_not_written(tmp_path):
    run = RunDirectory(tmp_path)
    with pytest.raises(KeyError, match="metric dictionary"):
        run.log({"score/made_up": 1.0})
    assert run.read() == []


def test_a_number_of_ones_own_is_written_as_a_number(tmp_path):
    run = RunDirectory(tmp_path)
    heard = []
    run.listener = heard.append
    run.log({"custom/rate": np.float32(0.5), "mine": torch.tensor(2.0), "score/mean": 1.0})
    assert run.read() == heard == [{"custom/rate": 0.5, "mine": 2.0, "score/mean": 1.0}]


@pytest.mark.parametrize(
    "text", ["two\nlines", "a\u2028b", "a\x85b", "a\x0cb\x1c", 'quote " \\', "Zażółć 🙂", "\ufffd"]
)
def test_any_text_of_a_model_is_one_line_and_reads_back(tmp_path, text):
    """Models write every byte: U+2028 and U+0085 end a line for Python's splitlines, not for JSON lines."""
    run = RunDirectory(tmp_path)
    run.append("samples.jsonl", {"completion": text})
    run.append("samples.jsonl", {"completion": "next"})
    assert run.read("samples.jsonl") == [{"completion": text}, {"completion": "next"}]


def test_half_a_character_is_escaped_as_json_does(tmp_path):
    run = RunDirectory(tmp_path)
    run.append("samples.jsonl", {"completion": "é\udfff\ud800"})
    assert (tmp_path / "samples.jsonl").read_bytes() == '{"completion": "é\\udfff\\ud800"}\n'.encode()
    assert run.read("samples.jsonl") == [{"completion": "é\udfff\ud800"}]


def test_a_line_that_a_kill_cut_off_is_no_row_and_goes_at_a_rewind(tmp_path):
    run = RunDirectory(tmp_path)
    run.append("samples.jsonl", {"iteration": 1, "completion": "ż"})
    whole = (tmp_path / "samples.jsonl").read_bytes()
    for torn in (b'{"iteration": 2, "compl', '{"completion": "ż'.encode()[:-1], b"{"):
        (tmp_path / "samples.jsonl").write_bytes(whole + torn)
        assert run.read("samples.jsonl") == [{"iteration": 1, "completion": "ż"}]
    run.rewind(1)
    assert (tmp_path / "samples.jsonl").read_bytes() == whole


@pytest.mark.parametrize("bad", [b"{bad", b'{"completion": "\xff"}'])
def test_a_damaged_line_is_named(tmp_path, bad):
    run = RunDirectory(tmp_path)
    run.append("samples.jsonl", {"completion": "a\u2028b"})
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write(bad + b"\n")
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 2, is damaged \(.*\): repair or remove that line"):
        run.read("samples.jsonl")


@pytest.mark.parametrize("text", ["{bad", "[]", ""])
def test_damaged_settings_of_a_run_are_named(tmp_path, text):
    assert read_run(tmp_path) == {}
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is damaged \(.*\): restore the run's settings, or remove it"):
        read_run(tmp_path)


def test_checkpoints_alone_are_an_earlier_run_and_the_lock_stays(tmp_path):
    """A run that was set aside only half left checkpoints without metrics: they are not the new run's."""
    for name in ("checkpoint-2", "run.lock"):
        (tmp_path / name).mkdir()
    RunDirectory(tmp_path).start({})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["previous-1", "run.json", "run.lock"]
    assert [p.name for p in (tmp_path / "previous-1").iterdir()] == ["checkpoint-2"]


def test_rewind_forgets_what_came_after(tmp_path):
    run = RunDirectory(tmp_path)
    for i in range(1, 5):
        run.log({"progress/iteration": i, "score/mean": float(i)})
        run.append("samples.jsonl", {"iteration": i, "completion": "a\u2028b"})
        run.log({"progress/iteration": i, "eval/score_mean": float(i)})
        run.append("eval_samples.jsonl", {"iteration": i})
    run.rewind(2)
    # The evaluation after iteration 2 opens the third, and is made again.
    assert [(row["progress/iteration"], "eval/score_mean" in row) for row in run.read()] == [
        (1, False),
        (1, True),
        (2, False),
    ]
    assert run.read("eval_samples.jsonl") == [{"iteration": 1}]
    assert [row["iteration"] for row in run.read("samples.jsonl")] == [1, 2]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["eval_samples.jsonl", "metrics.jsonl", "samples.jsonl"]


def test_a_missing_file_has_no_rows_and_a_file_is_no_folder(tmp_path):
    assert RunDirectory(tmp_path / "new").read("nothing.jsonl") == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: name a folder"):
        RunDirectory(tmp_path / "file")
