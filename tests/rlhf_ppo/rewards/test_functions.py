"""Signatures of reward functions: they get the arguments that they accept, and a mismatch is an error at the start."""

from __future__ import annotations

import pytest

from rlhf_ppo.rewards.functions import accepts, require_accepts_columns
from rlhf_ppo.rewards.scoring import score


def test_token_ids_go_to_functions_that_accept_them():
    seen: dict[str, object] = {}

    def names(prompts, completions, completion_ids=None):
        seen["names"] = completion_ids
        return [0.0]

    def takes_anything(prompts, completions, **columns):
        seen["anything"] = columns["completion_ids"]
        return [0.0]

    def takes_neither(prompts, completions, answer):
        seen["neither"] = answer
        return [0.0]

    score(names, ["p"], ["c"], {}, completion_ids=[[5, 6]])
    score(takes_anything, ["p"], ["c"], {"answer": [1]}, completion_ids=[[5, 6]])
    score(takes_neither, ["p"], ["c"], {"answer": [1]}, completion_ids=[[5, 6]])
    assert seen == {"names": [[5, 6]], "anything": [[5, 6]], "neither": [1]}
    assert accepts(takes_anything, "completion_ids") and not accepts(takes_anything, "conversations")


def test_a_rollouts_ids_are_the_sampled_ones_without_padding(make_trainer, prompts):
    seen: list[list[int]] = []

    def reward(prompts, completions, completion_ids, **columns):
        seen.extend(completion_ids)
        return [float(i) for i in range(len(prompts))]

    rollout = make_trainer(reward_funcs=reward).rollout(prompts)
    assert [len(ids) for ids in seen] == rollout.lengths.tolist() and len(set(map(len, seen))) > 1
    for ids, row, keep in zip(seen, rollout.response_ids, rollout.mask, strict=True):
        assert ids == row[keep].tolist()


def wants(prompts, completions, answer):
    return [0.0] * len(prompts)


def test_a_function_that_does_not_accept_the_columns_is_an_error_at_the_start(make_trainer):
    with pytest.raises(
        ValueError, match=r"'wants' has the parameters .*answer.*\['answer', 'id'\] of train_dataset.*'id'"
    ):
        make_trainer(reward_funcs=wants, train_dataset=[{"prompt": "a", "answer": 1, "id": 2}] * 8)
    with pytest.raises(
        ValueError, match=r"'wants'.*columns \[\] of train_dataset: missing a required argument: 'answer'"
    ):
        make_trainer(reward_funcs=wants, train_dataset=[{"prompt": "a"}] * 8)
    rows = [{"prompt": "a", "answer": 1}] * 8
    with pytest.raises(ValueError, match=r"columns \[\] of eval_dataset"):
        make_trainer(reward_funcs=wants, train_dataset=rows, eval_dataset=[{"prompt": "a"}])
    make_trainer(reward_funcs=wants, train_dataset=rows, eval_dataset=rows)


def test_functions_without_a_signature_are_not_checked():
    require_accepts_columns(max, "max", ["answer"], "train_dataset")  # written in C
    assert not accepts(max, "completion_ids")


@pytest.mark.parametrize("column", ["completions", "completion_ids", "prompts", "conversations", "completion_turns"])
def test_a_column_with_the_name_of_an_argument_is_refused(make_trainer, column):
    with pytest.raises(ValueError, match=rf"train_dataset has the columns \['{column}'\].*rename them"):
        make_trainer(train_dataset=[{"prompt": "a", column: 1}] * 8)
