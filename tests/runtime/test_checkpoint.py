"""Checkpoints on disk: committed whole or not at all, and never used once a bit of them has changed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from rlhf_ppo.runtime.checkpoints import checkpoint, stored_tensors
from rlhf_ppo.runtime.checkpoints.checkpoint import (
    CheckpointError,
    list_checkpoints,
    read_checkpoint,
    verify_checkpoint,
)
from rlhf_ppo.runtime.checkpoints.checkpoint_commit import prune, write_checkpoint
from rlhf_ppo.runtime.checkpoints.resume import find_checkpoint, newest_good, require_unchanged

TENSORS = {
    "model": {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(3, dtype=torch.int64)},
    "rng": {"torch": torch.arange(9, dtype=torch.uint8), "half": torch.ones(2, dtype=torch.bfloat16)},
    "none": {},
}
STATE = {"iteration": 3, "coef": 0.1 + 0.2, "nested": {"x": [1, None, "ż"]}}


def write(root: Path, step: int, **more) -> Path:
    return write_checkpoint(root, step, tensors=TENSORS, state=STATE, settings={"lr": 1e-3, "ids": (1, 2)}, **more)


def steps(root: Path) -> list[str]:
    return [folder.name for folder in list_checkpoints(root)]


def test_what_was_written_is_read(tmp_path):
    folder = write(tmp_path / "run", 7, fingerprints={"data": "abc"})
    assert folder == tmp_path / "run" / "checkpoint-7" and verify_checkpoint(folder) == []
    got = read_checkpoint(folder)
    assert (got.step, got.state, got.settings) == (7, STATE, {"lr": 1e-3, "ids": [1, 2]})
    assert got.fingerprints == {"data": "abc"}
    assert got.tensors.keys() == TENSORS.keys()
    for group, named in TENSORS.items():
        assert got.tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            assert got.tensors[group][name].dtype == tensor.dtype and torch.equal(got.tensors[group][name], tensor)


def test_checkpoints_are_ordered_by_number_and_other_folders_are_none(tmp_path):
    for step in (10, 9, 100):
        write(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-1.txt").touch()
    assert steps(tmp_path) == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    newest = newest_good(tmp_path)
    assert newest is not None and newest.folder == tmp_path / "checkpoint-100"
    assert newest_good(tmp_path / "nothing") is None


def test_fault_24_every_flipped_bit_is_noticed_and_the_file_named(tmp_path):
    folder = write(tmp_path, 1)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for place in {0, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
            for bit in (0, 3, 5):
                changed = bytearray(whole)
                changed[place] ^= 1 << bit
                file.write_bytes(changed)
                assert [line.split(":")[0] for line in verify_checkpoint(folder)] == [file.name]
        file.write_bytes(whole)
    assert verify_checkpoint(folder) == []


@pytest.mark.parametrize("harm", ["truncate", "empty", "longer", "missing", "link"])
def test_faults_24_25_a_harmed_file_is_named(tmp_path, harm):
    for i, name in enumerate(["model.safetensors", "none.safetensors", "state.json", "manifest.json"]):
        file = write(tmp_path, i) / name
        whole = file.read_bytes()
        file.unlink()
        match harm:
            case "truncate":
                file.write_bytes(whole[: len(whole) // 2])
            case "empty":
                file.write_bytes(b"")
            case "longer":
                file.write_bytes(whole + b"x")
            case "link":
                file.symlink_to(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match=rf"checkpoint-{i} cannot be used: {name}: "):
            read_checkpoint(file.parent)


def test_fault_24_the_newest_good_one_is_taken_and_each_bad_one_is_named(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "checkpoint-3" / "state.json").write_text("{}")
    (tmp_path / "checkpoint-2" / "manifest.json").unlink()
    with pytest.warns(UserWarning) as seen:
        newest = newest_good(tmp_path)
    assert newest is not None and newest.folder == tmp_path / "checkpoint-1"
    said = [str(w.message) for w in seen]
    assert len(said) == 2 and "checkpoint-3" in said[0] and "state.json: has 2 bytes" in said[0]
    assert "checkpoint-2" in said[1] and "manifest.json: is missing" in said[1] and "from checkpoint-1" in said[1]


@pytest.mark.parametrize("wanted", ["auto", "the run", "the checkpoint"])
def test_a_resumed_run_hashes_and_reads_each_file_once(tmp_path, monkeypatch, wanted):
    for step in (1, 2):
        write(tmp_path, step)
    hashed, read = [], []
    digest, load = hashlib.file_digest, stored_tensors.safe_open
    monkeypatch.setattr(
        checkpoint.hashlib, "file_digest", lambda f, *rest: (hashed.append(f.name), digest(f, *rest))[1]
    )
    monkeypatch.setattr(stored_tensors, "safe_open", lambda file, kind: (read.append(file), load(file, kind))[1])
    path = {"the run": tmp_path, "the checkpoint": tmp_path / "checkpoint-2"}.get(wanted, wanted)
    found = find_checkpoint(path, tmp_path)
    assert found is not None and (found.step, found.state) == (2, STATE)
    files = [tmp_path / "checkpoint-2" / f"{name}.safetensors" for name in TENSORS]
    assert sorted(read) == sorted(files)
    assert sorted(map(Path, hashed)) == sorted([*files, tmp_path / "checkpoint-2" / "state.json"])


def test_fault_25_a_run_whose_checkpoints_are_all_bad_is_no_fresh_run(tmp_path):
    (write(tmp_path, 1) / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is good.*state\.json: is missing"):
        newest_good(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"checkpoint-5 does not exist"):
        read_checkpoint(tmp_path / "checkpoint-5")


def test_a_checkpoint_of_an_earlier_version_says_so(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"manifest\.json: is missing.*of a version that wrote no manifest"):
        read_checkpoint(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("name", ["../outside.json", "weights.pkl", "/etc/passwd.json"])
def test_fault_28_a_manifest_cannot_name_other_files(tmp_path, name):
    folder = write(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(checkpoint.manifest_text(manifest))
    with pytest.raises(CheckpointError, match="cannot be part of a checkpoint"):
        read_checkpoint(folder)


def test_a_committed_checkpoint_is_never_touched_again_but_a_bad_one_is_replaced(tmp_path):
    folder = write(tmp_path, 1)
    with pytest.raises(FileExistsError, match="good checkpoint"):
        write(tmp_path, 1)
    (folder / "state.json").unlink()
    write(tmp_path, 1)
    assert verify_checkpoint(folder) == []


def test_fault_27_rotation_comes_after_the_commit(tmp_path, monkeypatch):
    write(tmp_path, 1, keep=1)
    monkeypatch.setattr(stored_tensors, "save_file", _full)
    with pytest.raises(OSError):
        write(tmp_path, 2, keep=1)
    assert steps(tmp_path) == ["checkpoint-1"]
    monkeypatch.undo()
    write(tmp_path, 2, keep=1)
    assert steps(tmp_path) == ["checkpoint-2"] and len(list(tmp_path.iterdir())) == 1


def test_rotation_spares_the_best_and_does_not_count_the_bad(tmp_path):
    for step in range(1, 7):
        folder = write(tmp_path, step)
        if step == 5:
            (folder / "manifest.json").unlink()
    assert [p.name for p in prune(tmp_path, keep=2, spare={1})] == ["checkpoint-2", "checkpoint-3"]
    assert steps(tmp_path) == ["checkpoint-1", "checkpoint-4", "checkpoint-5", "checkpoint-6"]
    with pytest.raises(ValueError, match="keep=0 must be at least 1"):
        prune(tmp_path, keep=0)


def _full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["save_file", "fsync", "write_text", "rename"])
def test_fault_23_a_full_disk_in_mid_save_leaves_the_old_one_and_no_temporary(tmp_path, monkeypatch, where):
    write(tmp_path, 1)
    owner = {"save_file": stored_tensors, "write_text": Path}.get(where, os)
    monkeypatch.setattr(owner, where, _full)
    with pytest.raises(OSError, match=r"step 2 could not be written.*No space left.*untouched; free some space") as got:
        write(tmp_path, 2, keep=1)
    assert got.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"] and verify_checkpoint(
        tmp_path / "checkpoint-1"
    ) == []


def test_fault_23_the_space_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    monkeypatch.setattr(stored_tensors, "save_file", None)
    with pytest.raises(OSError, match=r"needs 0\.1 MB and the disk has 0\.0 MB free") as got:
        write(tmp_path, 2)
    assert got.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_save_go_at_the_next_one(tmp_path):
    for name in (".tmp-4", ".tmp-old-checkpoint-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    assert newest_good(tmp_path) is None
    write(tmp_path, 5)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]


def test_fault_26_what_changed_is_shown_old_to_new(tmp_path):
    got = read_checkpoint(write(tmp_path, 1, fingerprints={"data": "abc"}))
    same = {"settings": {"lr": 1e-3, "ids": (1, 2)}, "fingerprints": {"data": "abc"}}
    require_unchanged(got, **same)
    require_unchanged(got, **{**same, "settings": {"lr": 1e-3, "ids": [1, 2], "later": 4}}, defaults={"later": 4})
    require_unchanged(got, **{**same, "settings": {"lr": 5.0, "ids": (1, 2)}}, free={"lr"})
    other = {"settings": {"lr": 0.5, "ids": (1, 2), "later": 4}, "fingerprints": {"data": "xyz"}}
    with pytest.raises(CheckpointError) as error:
        require_unchanged(got, **other)
    for line in ("later: null -> 4", "lr: 0.001 -> 0.5", 'data: "abc" -> "xyz"', "--resume-override"):
        assert line in str(error.value)
    assert "ids" not in str(error.value)
    with pytest.warns(UserWarning, match=r"lr: 0.001 -> 0.5"):
        require_unchanged(got, **other, override=True)


def test_a_run_in_a_folder_named_by_digits_is_no_checkpoint(tmp_path):
    write(tmp_path / "7", 1)
    found = find_checkpoint(tmp_path / "7", None)
    assert found is not None and found.folder == tmp_path / "7" / "checkpoint-1"
