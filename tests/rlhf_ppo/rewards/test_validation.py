"""What a reward function may return, and what happens when it misbehaves: never a silent zero."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time

import numpy as np
import pytest
import torch

from rlhf_ppo.data.detokenization import TextPieces
from rlhf_ppo.rewards.loading import load_reward
from rlhf_ppo.rewards.scoring import score
from rlhf_ppo.rewards.validation import RewardError, coerce_scores

EXPECTED = [1.0, 0.0, 2.5]


@pytest.mark.parametrize(
    "answer",
    [
        EXPECTED,
        tuple(EXPECTED),
        [1, False, 2.5],
        np.array(EXPECTED),
        np.array(EXPECTED, dtype=np.float32)[:, None],
        [np.float32(1), np.int64(0), np.float64(2.5)],
        torch.tensor(EXPECTED),
        torch.tensor(EXPECTED, requires_grad=True)[:, None],
        torch.tensor(EXPECTED, dtype=torch.bfloat16),
        [torch.tensor(1.0), torch.tensor([0.0]), np.array(2.5)],
    ],
)
def test_fault_12_unambiguous_numbers_are_read(answer):
    scores = coerce_scores(answer, 3, "fn")
    assert scores == EXPECTED and all(type(value) is float for value in scores)


def test_fault_12_bools_and_none():
    assert coerce_scores([True, None, np.bool_(False)], 3, "fn") == [1.0, None, 0.0]


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        ([1.0, 2.0], "returned 2 scores"),
        ([1.0] * 4, "returned 4 scores"),
        ("1.0", "returned str"),
        (["1", "2", "3"], "returned str '1' at index 0"),
        ([[1.0], [2.0], [3.0]], "returned list"),
        (1.0, "returned float"),
        (None, "returned NoneType"),
        ({"a": 1, "b": 2, "c": 3}, "returned dict"),
        (torch.ones(3, 2), r"array of shape \(3, 2\)"),
        (torch.ones(1, 3), r"array of shape \(1, 3\)"),
        (np.float64(1.0), "returned float64"),
        (torch.tensor(1.0), r"array of shape \(\)"),
        ([1.0, 1j, 2.0], "returned complex 1j at index 1"),
        ((x for x in EXPECTED), "returned generator"),
    ],
)
def test_fault_12_anything_else_is_an_error_with_name_got_and_expected(answer, got):
    with pytest.raises(RewardError, match=got) as error:
        coerce_scores(answer, 3, "my_reward")
    assert "'my_reward'" in str(error.value)
    assert "expected 3 numbers (or None), one per completion" in str(error.value)


def test_fault_12_none_for_all():
    with pytest.raises(RewardError, match="scored none of the 2 completions"):
        score(lambda prompts, completions: [None, None], ["p", "q"], ["x", "y"], {})


@pytest.mark.parametrize(
    ("value", "shown"),
    [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (1e39, "inf"), (-(10**400), "-inf")],  # of float32
)
def test_fault_13_a_non_finite_score_shows_its_sample_or_is_dropped(value, shown):
    def fn(prompts, completions):
        return [1.0, value]

    with pytest.raises(RewardError, match=f"'fn' scored {shown} for prompt 'q' with completion 'y'") as error:
        score(fn, ["p", "q"], ["x", "y"], {})
    assert "drop_nonfinite_scores" in str(error.value)
    assert score(fn, ["p", "q"], ["x", "y"], {}, drop_nonfinite=True) == [1.0, None]


def test_fault_13_dropped_scores_are_counted(make_trainer, prompts):
    trainer = make_trainer(reward_funcs=lambda p, c, **_: [math.nan, *range(7)], drop_nonfinite_scores=True)
    metrics = trainer.step(trainer.rollout(prompts))
    assert metrics["score/unscored_fraction"] == pytest.approx(1 / 8)
    assert metrics["score/mean"] == pytest.approx(3)
    assert metrics["score/part/<lambda>"] == pytest.approx(3)


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_fault_14_the_traceback_of_a_reward_that_raises_is_kept(timeout):
    def broken(prompts, completions):
        return {}["missing"]

    with pytest.raises(RewardError, match="'broken' raised KeyError") as error:
        score(broken, ["p"], ["x"], {}, timeout_s=timeout)
    cause = error.value.__cause__
    assert isinstance(cause, KeyError)
    frames = []
    trace = cause.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert frames[-1] == "broken"


@pytest.mark.parametrize("timeout", [None, 5.0])
@pytest.mark.parametrize("end", [SystemExit(0), asyncio.CancelledError()])
def test_fault_14_a_reward_that_exits_the_program_is_a_failed_reward(end, timeout):
    def leaves(prompts, completions):
        raise end

    async def leaves_later(prompts, completions):
        raise end

    for function in (leaves, leaves_later):
        with pytest.raises(RewardError, match=rf"'{function.__name__}' raised {type(end).__name__}"):
            score(function, ["p"], ["x"], {}, timeout_s=timeout)


def test_fault_14_a_failing_reward_ends_the_run_with_responses_and_model_saved(make_trainer):
    calls = iter(range(100))

    def fails_later(prompts, completions, **_):
        if next(calls) == 1:
            raise ZeroDivisionError("the scorer is down")
        return [float(len(text)) for text in completions]

    trainer = make_trainer(reward_funcs=fails_later, total_episodes=80)
    with pytest.raises(RewardError, match=r"ZeroDivisionError.*failed_rollout\.jsonl") as error:
        trainer.train()
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    folder = trainer.run.path
    rows = [json.loads(line) for line in (folder / "failed_rollout.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and set(rows[0]) == {"prompt", "completion"}
    assert (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()
    # One update was trained and logged, none was made up for the failed one.
    assert len(trainer.run.read()) == 1 == trainer.iteration


def test_fault_14_a_reward_that_hangs_times_out():
    release = threading.Event()

    def hangs(prompts, completions):
        release.wait(20)
        return [0.0]

    start = time.monotonic()
    with pytest.raises(RewardError, match=r"'hangs' did not return within reward_timeout_s=0\.1"):
        score(hangs, ["p"], ["x"], {}, timeout_s=0.1)
    assert time.monotonic() - start < 5
    release.set()


def test_fault_14_the_functions_own_timeout_error_is_reported_as_such():
    def slow_service(prompts, completions):
        raise TimeoutError("service")

    with pytest.raises(RewardError, match="raised TimeoutError: service"):
        score(slow_service, ["p"], ["x"], {}, timeout_s=5)


def test_fault_16_a_constant_reward_warns(make_trainer, prompts):
    trainer = make_trainer(reward_funcs=lambda p, c, **_: [2.0] * len(p))
    with pytest.warns(UserWarning, match=r"every response scored 2\.0: a constant reward gives no signal"):
        trainer.rollout(prompts)


def test_fault_17_completions_reach_the_reward_as_text_and_are_never_run(make_trainer, prompts, monkeypatch):
    """Whatever a model writes, it arrives unchanged as a string."""
    attack = "__import__('os').abort() {prompt} %s $(exit 1) ]]'\""
    seen: list[str] = []
    trainer = make_trainer(reward_funcs=lambda p, c, **_: seen.extend(c) or range_list(len(c)))
    monkeypatch.setattr(TextPieces, "decode", lambda *args: attack)
    metrics = trainer.step(trainer.rollout(prompts))
    assert seen == [attack] * 8
    assert metrics["score/mean"] == pytest.approx(3.5)


def range_list(n: int) -> list[float]:
    return [float(i) for i in range(n)]


def test_rewards_from_files_and_modules(tmp_path):
    file = tmp_path / "my_rewards.py"
    file.write_text("def short(prompts, completions, **columns):\n    return [-len(c) for c in completions]\n")
    assert load_reward(f"{file}:short", device="cpu")(["p"], ["abc"]) == [-3]
    toy = load_reward("rlhf_ppo.rewards.toy:dialogue", device="cpu")
    # '"hi"' is 4 of the 8 characters of 'she "hi"'.
    assert toy(["p"], ['she "hi"']) == [0.5]
    with pytest.raises(ValueError, match="no function 'long'"):
        load_reward(f"{file}:long", device="cpu")
    with pytest.raises(ValueError, match=r"nowhere\.py does not exist"):
        load_reward(f"{tmp_path}/nowhere.py:short", device="cpu")
    with pytest.raises(ValueError, match="'no_such_module' cannot be imported"):
        load_reward("no_such_module:short", device="cpu")
