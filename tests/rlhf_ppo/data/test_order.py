"""The order of prompts: passes over the data set, or the easiest first in a growing window."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from rlhf_ppo.data.order import PromptOrder

EASIEST = [9 - i for i in range(10)]
"""Row 9 is the easiest."""


def curriculum(**more: Any) -> PromptOrder:
    return PromptOrder(10, **{"seed": 3, "easiest": EASIEST, "start": 0.2, "growing": 4, **more})


def test_the_window_grows_in_equal_steps_to_all_rows():
    """From 2 of 10 by 2 rows an iteration: 0.2 + 0.8 i / 4."""
    assert [curriculum().window(i) for i in range(6)] == [2, 4, 6, 8, 10, 10]
    assert curriculum(start=0.01).window(0) == 1 and curriculum(start=1.0).window(0) == 10


def test_each_iteration_draws_from_the_easiest_without_repeats():
    order = curriculum()
    for iteration, window in enumerate((2, 4, 6, 8)):
        drawn = order.rows(iteration, 2, 2)
        assert len(set(drawn)) == 2 and set(drawn) <= set(EASIEST[:window])
        assert drawn == order.rows(iteration, 2, 2)
    # A rollout larger than the window takes each prompt as often.
    assert set(Counter(order.rows(0, 6, 6)).values()) == {3}


def test_further_prompts_of_an_iteration_go_on_where_it_ended():
    order = curriculum()
    assert order.rows(1, 2, 2) + order.rows(1, 2, 2, after=2) == order.rows(1, 2, 4)
    plain = PromptOrder(10, 3)
    assert plain.rows(2, 3, 3) + plain.rows(2, 3, 2, after=3) == plain.rows(2, 3, 5)
    # What one iteration took beyond its own, the next does not take again.
    assert plain.rows(3, 3, 3, extra=2) == plain.rows(2, 3, 8)[5:]


def test_after_the_window_has_grown_every_pass_has_every_row_once():
    order, plain = curriculum(), PromptOrder(10, 3)
    rows = [row for iteration in range(4, 14) for row in order.rows(iteration, 3, 3)]
    assert all(sorted(rows[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert rows == [row for iteration in range(10) for row in plain.rows(iteration, 3, 3)]


def test_another_seed_draws_other_rows():
    assert [curriculum(seed=s).rows(3, 5, 5) for s in (3, 4)] != [curriculum(seed=3).rows(3, 5, 5)] * 2


def rows_with(*levels: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"the {'abcdefghijklmnop'[i]}", "level": level} for i, level in enumerate(levels)]


def test_a_run_sees_easy_prompts_first_and_resumes_exactly(make_trainer):
    """Of 16 prompts 4, then 10, then all: a quarter, growing over two of the run's four rollouts."""
    data = rows_with(*(15 - i for i in range(16)))
    settings = {"curriculum_column": "level", "total_episodes": 16, "rollout_batch_size": 4, "num_minibatches": 2}
    runs = []
    for checkpoint in (None, 1):
        levels: list[int] = []

        def reward(prompts, completions, level, levels=levels):
            levels.extend(level)
            return [float(len(text)) for text in completions]

        trainer = make_trainer(reward_funcs=reward, train_dataset=data, save_every=1, **settings)
        start = None if checkpoint is None else runs[0][0].run.path / f"checkpoint-{checkpoint}"
        trainer.train(resume_from_checkpoint=start)
        runs.append((trainer, levels))
    (trainer, levels), (resumed, later) = runs
    assert set(levels[:4]) == set(range(4)) and max(levels[4:8]) < 10 and later == levels[4:]
    shares = [line["progress/curriculum_fraction"] for line in trainer.run.read()]
    assert shares == [0.25, 0.625, 1.0, 1.0] and resumed.run.read() == trainer.run.read()


def test_a_run_that_is_made_longer_keeps_its_curriculum(make_trainer):
    """The window grows over two rollouts, not over half of the eight that there are now."""
    data = rows_with(*range(16))
    settings = {"curriculum_column": "level", "rollout_batch_size": 4, "num_minibatches": 2, "save_every": 1}
    short = make_trainer(train_dataset=data, total_episodes=16, **settings)
    short.train()
    start = short.run.path / "checkpoint-1"
    for _ in range(2):
        # Twice, because the checkpoints of the longer run must know it, too.
        trainer = make_trainer(train_dataset=data, total_episodes=32, **settings)
        trainer.train(resume_from_checkpoint=start)
        shares = [line["progress/curriculum_fraction"] for line in trainer.run.read()]
        assert shares == [0.25, 0.625, *[1.0] * 6]
        start = trainer.run.path / "checkpoint-2"


def test_prompts_that_replace_others_while_the_window_grows_leave_the_first_pass_whole(make_trainer):
    asked = []

    def reward(prompts, completions, **columns):
        asked.extend(prompts[::2])
        return [0.5] * len(prompts) if len(asked) <= 8 else [float(i) for i in range(len(prompts))]

    trainer = make_trainer(
        reward_funcs=reward,
        train_dataset=rows_with(*range(8)),
        curriculum_column="level",
        curriculum_start=0.5,
        curriculum_span=0.3,
        total_episodes=24,
        rollout_batch_size=8,
        num_generations=2,
        advantage_estimator="grpo",
        zero_signal_prompts="resample",
        zero_signal_rounds=1,
    )
    with pytest.warns(UserWarning, match="constant reward"):
        trainer.train()
    # 4 prompts and the same 4 again from the window, then the 8 of a pass.
    assert len(asked) == 16 and len(set(asked[:8])) == 4 and len(set(asked[8:])) == 8


def test_a_window_smaller_than_a_rollout_is_warned_of(make_trainer):
    trainer = make_trainer(train_dataset=rows_with(*range(8)), curriculum_column="level", rollout_batch_size=8)
    with pytest.warns(UserWarning, match="next rollout draws from 2 of 8 prompts, fewer than the 8 that it takes"):
        trainer.train()


@pytest.mark.parametrize("value", [None, "hard", True, math.nan, math.inf, [1]])
def test_a_difficulty_that_is_no_number_is_named_with_its_row(make_trainer, value):
    with pytest.raises(ValueError, match=r"train_dataset row 1: the column 'level' holds .* needs a number"):
        make_trainer(train_dataset=rows_with(1, value, 2), curriculum_column="level")


def test_a_missing_column_is_named_with_the_closest(make_trainer):
    with pytest.raises(ValueError, match=r"no column 'levle', its columns are .*; did you mean 'level'"):
        make_trainer(train_dataset=rows_with(1, 2), curriculum_column="levle")


def test_held_out_prompts_need_no_difficulty(make_trainer):
    make_trainer(train_dataset=rows_with(1, 2.5), eval_dataset=[{"prompt": "a"}], curriculum_column="level")
