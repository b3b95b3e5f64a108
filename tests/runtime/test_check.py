"""`check`: a table of good and bad, and an exit code that a script can read."""

from __future__ import annotations

import pytest
import torch

from rlhf_ppo.cli import main
from rlhf_ppo.runtime.checkpoints.checkpoint_commit import write_checkpoint


def test_check_says_which_is_bad_why_and_which_would_be_resumed(tmp_path, capsys):
    run = tmp_path / "run"
    for step in (1, 2, 3):
        write_checkpoint(run, step, tensors={"model": {"a": torch.ones(3)}}, state={"x": 1})
    assert main(["check", str(run)]) == 0
    assert "a resumed run continues from checkpoint-3" in capsys.readouterr().out
    (run / "checkpoint-3" / "state.json").write_text("{}")
    (run / "checkpoint-1" / "manifest.json").unlink()
    assert main(["check", str(run)]) == 1
    out = capsys.readouterr().out
    assert "continues from checkpoint-2" in out and out.count("BAD") == 2 and out.count("good") == 1
    assert "state.json" in out and "manifest.json" in out
    (run / "checkpoint-2" / "model.safetensors").write_bytes(b"")
    assert main(["check", str(run)]) == 1 and "none of them can be resumed" in capsys.readouterr().out
    assert main(["check", str(run / "checkpoint-3")]) == 1


def test_a_folders_name_is_shown_as_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint("x[/y]:dog:", 1, tensors={"model": {"a": torch.ones(3)}}, state={"x": 1})
    assert main(["check", "x[/y]:dog:"]) == 0
    assert "checkpoints of x[/y]:dog:" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_check_of_something_else_is_one_line(tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert main(["check", name]) == 2
    assert capsys.readouterr().err.startswith(f"error: {name}")
