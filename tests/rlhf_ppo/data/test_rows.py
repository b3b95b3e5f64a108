"""Rows stay as they were given, whatever they hold, in the orders and under the digests that they always had."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from datasets import Dataset, interleave_datasets

from rlhf_ppo import RLHFConfig
from rlhf_ppo.data.files import load_rows
from rlhf_ppo.data.mixtures import load_mixture
from rlhf_ppo.data.prompts import PromptSet
from rlhf_ppo.data.rows import as_rows, interleave
from rlhf_ppo.training.checkpoints.fingerprints import data_fingerprint

CALLS = [[{"function": {"name": "weather", "arguments": arguments}}] for arguments in ({"city": "Rome"}, {"n": 2})]
UNEQUAL = {
    "keys of nested dicts": [{"prompt": "a", "tests": {"x": 1}}, {"prompt": "b", "tests": {"y": [{"z": 2}]}}],
    "kinds": [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": "2"}, {"prompt": "c", "answer": 2.5}],
    "text that looks like a date": [{"prompt": "a", "day": "2026-01-01"}, {"prompt": "b", "day": "2026-01-02"}],
    "whole and broken numbers": [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2.5}, {"prompt": "c", "n": 2**70}],
    "messages": [
        {"prompt": [{"role": "user", "content": "a"}]},
        {"prompt": [{"role": "user", "content": "a", "name": "b"}, {"role": "assistant", "tool_calls": CALLS[0]}]},
        {"prompt": [{"role": "assistant", "content": "", "tool_calls": CALLS[1]}]},
    ],
    "prompts": [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}]}],
}


@pytest.mark.parametrize("rows", UNEQUAL.values(), ids=UNEQUAL)
def test_rows_keep_their_own_keys_and_types_from_a_list_and_from_files(rows, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, row in enumerate(rows):
        (folder / f"train-{number}.jsonl").write_text(json.dumps(row))
    read = [as_rows(rows), *(load_rows(str(tmp_path / name)) for name in ("a.jsonl", "b.json", "folder"))]
    read.append(load_mixture((str(tmp_path / "a.jsonl"), str(tmp_path / "folder"))).select(range(len(rows))))
    for found in read:
        assert repr(found.to_list()) == repr(rows)  # 1 == 1.0, but their texts differ


def test_a_reward_gets_copies_of_the_rows_values(make_trainer):
    """A column that a row lacks is None there; an object is the very one that was given."""
    thing = SimpleNamespace(n=3)
    rows = [
        {"prompt": "a", "tests": {"x": 1}, "pair": (1, [2])},
        {"prompt": "b", "tests": {"y": 2}, "pair": thing, "late": 7},
    ]
    seen: list[dict] = []

    def reward(prompts, completions, tests, pair, late, **_):
        seen.append({"tests": [dict(test) for test in tests], "pair": list(pair), "late": late})
        for test in tests:
            test["spoilt"] = True
        return [float(len(text)) for text in completions]

    trainer = make_trainer(train_dataset=rows, reward_funcs=reward, rollout_batch_size=2, num_minibatches=1)
    for _ in range(2):
        batch = trainer.train_prompts.take([0, 1])
        trainer.rollout(batch.prompts, **batch.columns)
    expected = {"tests": [{"x": 1}, {"y": 2}], "pair": [(1, [2]), thing], "late": [None, 7]}
    assert seen == [expected] * 2 and seen[0]["pair"][1] is thing
    assert "spoilt" not in rows[0]["tests"]


def test_arrow_messages_lose_the_keys_that_only_others_have():
    """Arrow's structs hold every key in every row; in other columns nobody can tell None from absent, so it stays."""
    chats = [[{"role": "assistant", "content": "", "tool_calls": calls}] for calls in CALLS]
    table = Dataset.from_list([{"prompt": chat, "tests": {"x": 1}} for chat in [*chats, *chats]])
    plain = Dataset.from_list([{"prompt": [{"role": "user", "content": "a", "tool_calls": None}]}] * 2)
    assert as_rows(table)["prompt"] == chats * 2
    assert as_rows(plain)[0]["prompt"] == [{"role": "user", "content": "a"}]
    assert as_rows(Dataset.from_list([{"t": {"x": 1}}, {"t": {"y": 2}}]))["t"] == [
        {"x": 1, "y": None},
        {"x": None, "y": 2},
    ]


def test_splits_and_mixtures_have_the_order_of_datasets():
    """So that a run goes on from checkpoints of earlier versions with the same batches."""
    rows = [{"n": i} for i in range(40)]
    ours, theirs = as_rows(rows), Dataset.from_list(rows)
    for size, seed in ((7, 0), (20, 3)):
        parts, others = ours.train_test_split(size, seed=seed), theirs.train_test_split(size, seed=seed)
        assert all(parts[name]["n"] == list(others[name]["n"]) for name in ("train", "test"))
    second = Dataset.from_list([{"n": 100 + i} for i in range(90)])
    mixed = interleave_datasets([theirs, second], [0.3, 0.7], seed=5, stopping_strategy="first_exhausted")
    assert interleave([ours, as_rows(second)], [0.3, 0.7], 5)["n"] == list(mixed["n"])


def test_the_digest_of_data_is_what_it_was_for_rows_in_python_and_in_arrow(tokenizer):
    """The number was written by the version that put every list through Arrow; a checkpoint holds it."""
    rows = [{"prompt": f"p {i}", "n": i, "answer": {"text": f"a{i}", "values": [i, i + 1]}} for i in range(1200)]
    args = RLHFConfig(output_dir="unused")

    def digest(data) -> str:
        return data_fingerprint(PromptSet(data, tokenizer, args, vocab_size=30, room=None))

    assert digest(rows) == digest(Dataset.from_list(rows)) == "1200 rows, d3e3fe932300de6e"
    other = [{"prompt": "a", "tests": {1: {"x": (1,)}, "y": {2}, None: SimpleNamespace()}}]
    assert digest(other) == digest(other) != digest([{"prompt": "a", "tests": {1: {"x": (2,)}}}])


def test_column_names_that_are_not_text_are_refused():
    with pytest.raises(ValueError, match="the names of train_dataset's columns must be text, got 3"):
        as_rows([{"prompt": "a", 3: "b"}], "train_dataset")


def test_a_users_transform_reads_the_columns_that_it_needs():
    rows = Dataset.from_list([{"prompt": "a", "x": 1}, {"prompt": "b", "x": 2}])

    def both(batch):
        return {"prompt": [f"{p}{x}" for p, x in zip(batch["prompt"], batch["x"], strict=True)]}

    changed = rows.with_transform(both)
    assert as_rows(changed)["prompt"] == ["a1", "b2"]
