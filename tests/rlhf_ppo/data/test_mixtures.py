"""Mixing: proportions hold throughout, no row occurs twice, and data sets that do not fit are named."""

from __future__ import annotations

import json

import pytest

from rlhf_ppo.data.mixtures import load_mixture


@pytest.fixture
def write(tmp_path):
    def file(name: str, rows: list[dict]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return file


@pytest.fixture
def two(write):
    a = write("a.jsonl", [{"prompt": f"a{i}", "n": i} for i in range(300)])
    b = write("b.jsonl", [{"prompt": f"b{i}", "n": i} for i in range(1000)])
    return a, b


def test_without_weights_data_sets_are_concatenated(two):
    prompts = load_mixture(two)["prompt"]
    assert len(prompts) == 1300 and prompts[0] == "a0" and prompts[300] == "b0"
    assert load_mixture(two[0])["prompt"] == load_mixture(two[:1])["prompt"] == prompts[:300]


def test_weights_are_proportions_throughout_and_no_row_occurs_twice(two):
    prompts = list(load_mixture(two, weights=(3.0, 1.0), seed=1)["prompt"])
    assert len(set(prompts)) == len(prompts)
    # 300 rows of a are three quarters: about 400 in all. The standard deviation of the share is sqrt(.75 * .25 / 400).
    for part in (prompts, prompts[: len(prompts) // 2]):
        assert sum(p.startswith("a") for p in part) / len(part) == pytest.approx(0.75, abs=0.08)
    assert {f"a{i}" for i in range(300)} <= set(prompts)


@pytest.mark.parametrize("weights", [None, (0.5, 0.5)])
def test_each_row_keeps_the_name_of_its_data_set_and_its_number_there(two, weights):
    rows = load_mixture(two, weights=weights).train_test_split(0.5, seed=0)["test"]
    assert rows.names == [f"{two[row['prompt'][0] == 'b']} row {row['n']}" for row in rows]
    assert load_mixture(two[0], "train[5:]").names[0] == f"{two[0]}, train[5:], row 0"


def test_the_order_depends_on_the_seed_alone(two):
    first, again, other = (list(load_mixture(two, weights=(0.5, 0.5), seed=s)["prompt"]) for s in (0, 0, 1))
    assert first == again != other


def test_columns_that_differ_are_named(write):
    a = write("a.jsonl", [{"prompt": "p", "answer": "1"}])
    b = write("b.jsonl", [{"prompt": "p", "label": "1"}])
    c = write("c.jsonl", [{"prompt": "p", "answer": 1}])
    with pytest.raises(ValueError, match=r"only .*a\.jsonl has \['answer'\], only .*b\.jsonl has \['label'\]"):
        load_mixture((a, b))
    with pytest.raises(ValueError, match=r"'answer' is .*string.* in .*a\.jsonl and .*int64.* in .*c\.jsonl"):
        load_mixture((a, c))


def test_invalid_weights_are_refused(two):
    with pytest.raises(ValueError, match="dataset_weights has 1 weights for 2 data sets"):
        load_mixture(two, weights=(1.0,))
    with pytest.raises(ValueError, match=r"dataset_weights must be positive, got \(1\.0, 0\.0\)"):
        load_mixture(two, weights=(1.0, 0.0))
    with pytest.raises(ValueError, match="dataset is empty"):
        load_mixture(())
