"""Recorded rollouts: what is read equals what was recorded; gaps, damage and other versions are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from rlhf_ppo.core import BannedTokens, ValueScale
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.runtime.checkpoints.checkpoint import manifest_text
from rlhf_ppo.training.recorded.recorded_rollouts import (
    RecordingFacts,
    open_recording,
    record_rollout,
    rewind_recording,
    start_recording,
)

FACTS = RecordingFacts("gpt2", "gpt2", "gpt2, 2 layers", "30 tokens", {"letters": 1.0}, {"gamma": 1.0}, {"policy": "a"})
MUCH = 1e9


def make(seed: int = 0, **more) -> Rollout:
    """Two responses of 3 and 2 tokens, with every kind of value that JSON or safetensors could change."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    numbers = [torch.rand(2, 3, generator=random) * mask for _ in range(4)]
    fields = {
        "prompts": ["a\u2028b", [{"role": "user", "content": "naïve \u0085"}]],
        "columns": {"answer": [1, None], "tags": [["x"], []]},
        "prompt_ids": torch.tensor([[0, 5], [6, 7]]),
        "prompt_mask": torch.tensor([[False, True], [True, True]]),
        "response_ids": torch.tensor([[3, 4, 5], [6, 0, 0]]),
        "mask": mask,
        "finished": torch.tensor([False, True]),
        "logprobs": -numbers[0],
        "entropy": numbers[1],
        "values": numbers[2].double() / 3,
        "completions": ["one\ntwo", "\ud7ff"],
        "ref_logprobs": -numbers[3],
        "scores": torch.tensor([0.1, 0.0], dtype=torch.float64),
        "scored": torch.tensor([True, False]),
        "score_parts": {"letters": [0.1, None], "length": [1 / 3, 2]},
    }
    return Rollout(**{**fields, **more})


EVERYTHING = {
    "value_scale": ValueScale(1 / 3, 0.1, 7),
    "token_scores": torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.5, 0.0]]),
    "token_score_parts": {"length": torch.ones(2, 3)},
    "logged_metrics": {"format": 0.25},
    "logged_columns": {"parsed": [None, {"deep": [1]}]},
    "cache_hit_fraction": 1 / 3,
    "sampled_logprobs": -torch.ones(2, 3),
    "decode_gap": 1e-7,
    "foreign": True,
    "staleness": torch.tensor([0, 1]),
    "banned": BannedTokens(torch.tensor([[True, False, False], [False, False, False]]), (0, 12)),
    "environment": torch.tensor([[False, False, False], [False, False, True]]),
    "turns": torch.zeros(2, 3, dtype=torch.long),
    "context_full": torch.tensor([False, True]),
    "conversations": [[{"role": "user", "content": "hi"}], []],
    "tool_counts": [{"calls": 2, "malformed": 1}, {}],
}


def assert_equal(one: object, two: object) -> None:
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two)
    elif isinstance(one, Rollout):
        for field in dataclasses.fields(Rollout):
            assert_equal(getattr(one, field.name), getattr(two, field.name))
    elif isinstance(one, BannedTokens) and isinstance(two, BannedTokens):
        assert torch.equal(one.where, two.where) and one.tokens == two.tokens
    elif isinstance(one, dict) and isinstance(two, dict):
        assert list(one) == list(two)
        for name in one:
            assert_equal(one[name], two[name])
    else:
        assert one == two


@pytest.mark.parametrize("more", [{}, {"values": None, "columns": {}}, EVERYTHING], ids=["usual", "least", "all"])
def test_a_rollout_is_read_as_it_was_recorded(tmp_path, more):
    rollouts = [make(0, **more), make(1, **more)]
    start_recording(tmp_path, FACTS)
    for number, rollout in enumerate(rollouts, start=1):
        assert record_rollout(tmp_path, number, rollout, max_bytes=MUCH)
    recording = open_recording(tmp_path)
    assert recording.facts == FACTS and recording.numbers == [1, 2]
    assert (len(recording), recording.num_responses, recording.num_tokens) == (2, 4, 10)
    for read, recorded in zip(recording, rollouts, strict=True):
        assert_equal(read, recorded)
    assert_equal(open_recording(tmp_path / "rollouts").read(1), rollouts[1])


def test_the_test_above_compares_every_field():
    given = make(**EVERYTHING)
    assert not [field.name for field in dataclasses.fields(Rollout) if getattr(given, field.name) in (None, [], {})]


def test_an_object_in_a_column_becomes_text(tmp_path):
    start_recording(tmp_path, FACTS)
    record_rollout(tmp_path, 1, make(columns={"file": [Path("a"), Path("b")]}), max_bytes=MUCH)
    assert open_recording(tmp_path).read(0).columns == {"file": ["a", "b"]}


def test_a_recording_keeps_its_beginning_and_has_no_gaps(tmp_path):
    """The bound leaves room for two; the third is left out, and so is the fourth, though it would fit."""
    start_recording(tmp_path, FACTS)
    assert record_rollout(tmp_path, 1, make(), max_bytes=MUCH)
    size = sum(file.stat().st_size for file in (tmp_path / "rollouts").glob("rollout-*"))
    assert record_rollout(tmp_path, 2, make(), max_bytes=2 * size)
    assert record_rollout(tmp_path, 3, make(), max_bytes=3 * size - 1) is False
    assert record_rollout(tmp_path, 4, make(), max_bytes=MUCH) is None
    assert open_recording(tmp_path).numbers == [1, 2]
    assert rewind_recording(tmp_path, 4) == 3
    assert rewind_recording(tmp_path, 1) == 2


def test_rewinding_undoes_rollouts_and_removes_what_a_kill_left(tmp_path):
    start_recording(tmp_path, FACTS, first=3)
    for number in (3, 4, 5):
        record_rollout(tmp_path, number, make(number), max_bytes=MUCH)
    (tmp_path / "rollouts" / "rollout-000006.jsonl").write_text("half a li")
    assert rewind_recording(tmp_path, 4) == 5
    assert {file.name for file in (tmp_path / "rollouts").iterdir()} == {
        "rollouts.json",
        *(f"rollout-00000{number}.{kind}" for number in (3, 4) for kind in ("jsonl", "safetensors")),
    }
    assert record_rollout(tmp_path, 5, make(9), max_bytes=MUCH)
    assert_equal(open_recording(tmp_path).read(2), make(9))
    assert rewind_recording(tmp_path, 1) == 3  # before its first


def test_what_is_no_recording_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: record some by train --save-rollouts"):
        open_recording(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no recorded rollouts: record some by train --save-rollouts"):
        open_recording(tmp_path)
    start_recording(tmp_path, FACTS)
    with pytest.raises(ValueError, match=r"rollouts is empty: .*; record again"):
        open_recording(tmp_path)
    assert rewind_recording(tmp_path / "nowhere", 1) is None


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("rollout-000002.safetensors", lambda x: x[:-9], r"rollout-000002\.safetensors has \d+ bytes instead of \d+"),
        ("rollout-000001.jsonl", lambda x: x.replace(b"one", b"two"), r"the checksum of rollout-000001\.jsonl does"),
        ("rollout-000001.jsonl", None, r"rollout-000001\.jsonl is missing"),
        ("rollouts.json", lambda x: x.replace(b'"tokens": 5', b'"tokens": 6'), r"rollouts\.json is damaged"),
        ("rollouts.json", lambda x: x[:100], r"rollouts\.json is damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, damage, said):
    start_recording(tmp_path, FACTS)
    for number in (1, 2):
        record_rollout(tmp_path, number, make(), max_bytes=MUCH)
    file = tmp_path / "rollouts" / name
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"{said}.*or record again"):
        open_recording(tmp_path)


def test_another_version_is_named(tmp_path):
    start_recording(tmp_path, FACTS)
    file = tmp_path / "rollouts" / "rollouts.json"
    file.write_text(manifest_text({**json.loads(file.read_text()), "format": 9, "version": "12.0"}))
    with pytest.raises(ValueError, match=r"has format 9, but this version \(.*\) reads format 1: use version 12\.0"):
        open_recording(tmp_path)
    with pytest.raises(ValueError, match="has format 9"):
        record_rollout(tmp_path, 1, make(), max_bytes=MUCH)


def test_a_manifest_cannot_point_elsewhere(tmp_path):
    start_recording(tmp_path, FACTS)
    record_rollout(tmp_path, 1, make(), max_bytes=MUCH)
    file = tmp_path / "rollouts" / "rollouts.json"
    manifest = json.loads(file.read_text())
    manifest["rollouts"][0]["files"] = {"../secret": {"bytes": 1, "sha256": ""}}
    file.write_text(manifest_text(manifest))
    with pytest.raises(ValueError, match=r"lists '\.\./secret', which cannot be part of a recording"):
        open_recording(tmp_path)
