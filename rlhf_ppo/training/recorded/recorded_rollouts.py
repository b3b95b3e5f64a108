"""Recorded rollouts: write the rollouts of a run into a folder, verified by checksums, and read them back.

The folder holds ``rollouts.json`` (what they are of, and a manifest) and two files per rollout:
``rollout-000001.safetensors`` has its tensors, ``rollout-000001.jsonl`` a line per response. A rollout belongs to the
recording once the manifest lists it, and the manifest is replaced last; what a killed run left behind is never read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from rlhf_ppo.core import BannedTokens, ValueScale
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.runtime.checkpoints.checkpoint import as_json, file_facts, intact_manifest, manifest_text
from rlhf_ppo.runtime.files import json_line, replacing_files
from rlhf_ppo.runtime.package import __version__

FOLDER, MANIFEST, FORMAT = "rollouts", "rollouts.json", 1
_LISTS = ("prompts", "completions", "conversations", "tool_counts")
_TABLES = ("columns", "score_parts", "logged_columns")
_SCALARS = ("cache_hit_fraction", "decode_gap", "logged_metrics", "foreign")
_PART = "token_scores of "
"""Prefix of the names of a reward function's scores per token."""


@dataclass(frozen=True)
class RecordingFacts:
    """What recorded rollouts are of: who uses them compares these with its own."""

    model: str
    """The policy that the run started from: a folder or hub id, or "object"."""
    reference: str
    """Likewise, the reference."""
    architecture: str
    """The policy's kind and sizes, as errors name them."""
    tokenizer: str
    """Digest of the policy's vocabulary."""
    rewards: dict[str, float]
    """Name of each reward function -> its weight in ``Rollout.scores``."""
    settings: dict[str, Any]
    """All settings of the run (:class:`rlhf_ppo.RLHFConfig`) as JSON has them: gamma, kl_coef, temperature, ..."""
    fingerprints: dict[str, Any]
    """Those of a checkpoint, and digests of the weights that sampled the first rollout: policy, critic."""


@dataclass(frozen=True)
class Recording:
    """Recorded rollouts, verified. Iterating reads them one by one, in order, onto the CPU."""

    folder: Path
    """Where the files are, such as runs/x/rollouts."""
    facts: RecordingFacts
    entries: tuple[dict[str, Any], ...]
    """The manifest's entry of each rollout."""

    @property
    def numbers(self) -> list[int]:
        """The iterations that the rollouts were trained in, from 1, without gaps."""
        return [entry["number"] for entry in self.entries]

    @property
    def num_responses(self) -> int:
        """Responses in all rollouts."""
        return sum(entry["responses"] for entry in self.entries)

    @property
    def num_tokens(self) -> int:
        """Tokens that the policy chose, in all rollouts."""
        return sum(entry["tokens"] for entry in self.entries)

    def __len__(self) -> int:
        """Return the number of rollouts."""
        return len(self.entries)

    def __iter__(self) -> Iterator[Rollout]:
        """Read the rollouts in order."""
        return (self.read(index) for index in range(len(self)))

    def read(self, index: int, device: torch.device | str = "cpu") -> Rollout:
        """Read the rollout at ``index``, from 0: equal to the recorded one, its tensors on ``device``."""
        entry = self.entries[index]
        tensors, lines = (self.folder / name for name in _files(entry["number"]))
        rows = [json.loads(line) for line in lines.read_bytes().split(b"\n") if line]
        return _rollout(entry, load_file(tensors, device=str(device)), rows)


def open_recording(folder: str | Path) -> Recording:
    """Open recorded rollouts, and verify each file's size and checksum.

    Args:
        folder: a run's folder, or the folder rollouts/ in it.
    Raises:
        FileNotFoundError: there is no such folder, or nothing was recorded in it.
        ValueError: the recording is empty, damaged or of another version; says what to do.
    """
    if not (recording_folder(folder) / MANIFEST).is_file():
        problem = "holds no recorded rollouts" if Path(folder).is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{folder} {problem}: record some by train --save-rollouts (save_rollouts=True) or rlhf-ppo critic record"
        )
    folder = recording_folder(folder)
    manifest = _read_manifest(folder)
    entries = manifest["rollouts"]
    if not entries:
        raise ValueError(
            f"{folder} is empty: its run ended before its first rollout was recorded, or its first rollout is larger "
            "than save_rollouts_gb; record again"
        )
    problems = [problem for entry in entries for problem in _problems(folder, entry)]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(
            f"recorded rollouts in {folder} are damaged: {'; '.join(problems[:3])}{more}. Restore the files from a "
            "backup, or record again"
        )
    return Recording(folder, RecordingFacts(**manifest["facts"]), tuple(entries))


def recording_folder(folder: str | Path) -> Path:
    """Return where a run's recorded rollouts are, given its folder or that one itself."""
    folder = Path(folder)
    return folder if folder.name == FOLDER or (folder / MANIFEST).is_file() else folder / FOLDER


def start_recording(folder: str | Path, facts: RecordingFacts, *, first: int = 1) -> None:
    """Begin a recording in a run's folder, in place of one that is there; ``first``: number of its first rollout."""
    _write(recording_folder(folder), {"facts": dataclasses.asdict(facts), "first": first, "rollouts": []})


def record_rollout(folder: str | Path, number: int, rollout: Rollout, *, max_bytes: float) -> bool | None:
    """Record a rollout as the next one of the recording in a run's folder.

    The recording has no gaps: once a rollout was left out, so are all that follow.

    Args:
        folder: the run's.
        number: the iteration that trains on it, from 1.
        rollout: scored. Values of columns that JSON does not know become text.
        max_bytes: how large the whole recording may be.
    Returns:
        True if it was recorded, False if it would exceed ``max_bytes``, None if an earlier one was left out.
    Raises:
        OSError: the disk is full; the recording is as it was.
        ValueError: the manifest is damaged.
    """
    folder = recording_folder(folder)
    manifest = _read_manifest(folder)
    entries = manifest["rollouts"]
    if number != manifest["first"] + len(entries):
        return None
    entry, contents = _entry(number, rollout)
    size = sum(facts["bytes"] for old in (*entries, entry) for facts in old["files"].values())
    if size > max_bytes:
        return False
    _write(folder, {**manifest, "rollouts": [*entries, entry]}, contents)
    return True


def rewind_recording(folder: str | Path, number: int) -> int | None:
    """Remove the rollouts after ``number`` from the recording in a run's folder; None: it has none.

    Returns:
        Number of the rollout that it takes next: ``number + 1``, unless it begins later or ended earlier.
    """
    folder = recording_folder(folder)
    if not (folder / MANIFEST).is_file():
        return None
    manifest = _read_manifest(folder)
    kept = [entry for entry in manifest["rollouts"] if entry["number"] <= number]
    if kept != manifest["rollouts"]:
        _write(folder, {**manifest, "rollouts": kept})
    listed = {name for entry in kept for name in entry["files"]}
    for file in folder.glob("rollout-*"):
        if file.name not in listed:
            file.unlink()
    return manifest["first"] + len(kept)


def _files(number: int) -> tuple[str, str]:
    return f"rollout-{number:06}.safetensors", f"rollout-{number:06}.jsonl"


def _write(folder: Path, manifest: Mapping[str, Any], contents: Mapping[str, bytes] | None = None) -> None:
    """Write files and the manifest that lists them, atomically."""
    contents = contents or {}
    text = manifest_text({"format": FORMAT, "version": __version__, **manifest})
    # Files are replaced in the order of their names: the manifest's comes after those of the rollouts.
    with replacing_files(folder, needed=len(text) + sum(map(len, contents.values()))) as new:
        for name, content in contents.items():
            (new / name).write_bytes(content)
        (new / MANIFEST).write_text(text, encoding="utf-8")


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest, and verify its own checksum.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    file = folder / MANIFEST
    if (manifest := intact_manifest(file)) is None:
        raise ValueError(
            f"{file} is damaged (its checksum does not match): restore it from a backup, or record again in another "
            "folder"
        )
    if manifest["format"] != FORMAT:
        raise ValueError(
            f"{file} has format {manifest['format']}, but this version ({__version__}) reads format {FORMAT}: use "
            f"version {manifest['version']}, or record again"
        )
    return manifest


def _problems(folder: Path, entry: Mapping[str, Any]) -> Iterator[str]:
    for name, facts in entry["files"].items():
        file = folder / name
        if name not in _files(entry["number"]):
            yield f"{MANIFEST} lists {name!r}, which cannot be part of a recording"
        elif file.is_symlink() or not file.is_file():
            yield f"{name} is missing"
        elif (size := file.stat().st_size) != facts["bytes"]:
            yield f"{name} has {size} bytes instead of {facts['bytes']}"
        elif file_facts(file) != facts:
            yield f"the checksum of {name} does not match"


def _entry(number: int, rollout: Rollout) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return a rollout's entry in the manifest, and the contents of its files."""
    lines = "".join(map(json_line, _lines(rollout))).encode()
    contents = dict(zip(_files(number), (save(_tensors(rollout)), lines), strict=True))
    return as_json(
        {
            "number": number,
            "responses": len(rollout.prompts),
            "tokens": int(rollout.lengths.sum()),
            **{name: getattr(rollout, name) for name in _SCALARS},
            "value_scale": None if rollout.value_scale is None else dataclasses.asdict(rollout.value_scale),
            "banned_tokens": None if rollout.banned is None else rollout.banned.tokens,
            "tables": {name: list(getattr(rollout, name)) for name in _TABLES},
            "files": {
                name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                for name, content in contents.items()
            },
        }
    ), contents


def _tensors(rollout: Rollout) -> dict[str, Tensor]:
    found = {field.name: getattr(rollout, field.name) for field in dataclasses.fields(Rollout)}
    found |= {_PART + name: part for name, part in rollout.token_score_parts.items()}
    found["banned"] = None if rollout.banned is None else rollout.banned.where
    # Clones: safetensors refuses tensors that share memory.
    return {name: x.detach().cpu().contiguous().clone() for name, x in found.items() if isinstance(x, Tensor)}


def _lines(rollout: Rollout) -> Iterator[dict[str, Any]]:
    scores, scored = (None if x is None else x.tolist() for x in (rollout.scores, rollout.scored))
    for i, (finished, tokens) in enumerate(zip(rollout.finished.tolist(), rollout.lengths.tolist(), strict=True)):
        yield {
            # prompt, completion, conversation, tool_count
            **{name[:-1]: values[i] for name in _LISTS if (values := getattr(rollout, name))},
            **{name: {key: x[i] for key, x in getattr(rollout, name).items()} for name in _TABLES},
            "score": None if scores is None or (scored is not None and not scored[i]) else scores[i],
            "tokens": tokens,
            "finished": finished,
        }


def _rollout(entry: Mapping[str, Any], tensors: dict[str, Tensor], rows: list[dict[str, Any]]) -> Rollout:
    parts = {name.removeprefix(_PART): tensors.pop(name) for name in sorted(tensors) if name.startswith(_PART)}
    banned = tensors.pop("banned", None)
    lists = {name: [row[name[:-1]] for row in rows] for name in _LISTS if name[:-1] in rows[0]}
    # Earlier versions recorded fewer.
    tables = {name: {k: [row[name][k] for row in rows] for k in keys} for name, keys in entry["tables"].items()}
    return Rollout(
        **lists,
        **tables,
        **{name: entry[name] for name in _SCALARS if name in entry},
        value_scale=None if entry["value_scale"] is None else ValueScale(**entry["value_scale"]),
        banned=None if banned is None else BannedTokens(banned, tuple(entry["banned_tokens"])),
        token_score_parts={name: parts[name] for name in tables["score_parts"] if name in parts},
        **{"values": None, **tensors},
    )
