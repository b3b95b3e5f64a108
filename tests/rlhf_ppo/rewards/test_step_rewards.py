"""Scores of single tokens and of steps: where they land, whatever the tokenizer made of the text."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf_ppo import StepRewards
from rlhf_ppo.pipeline.labelled.new_model import train_tokenizer
from rlhf_ppo.rewards.scoring import Responses, score, score_responses
from rlhf_ppo.rewards.step_rewards import step_rewards_per_token
from rlhf_ppo.rewards.validation import RewardError, coerce_scores
from rlhf_ppo.training.experience import estimate
from rlhf_ppo.training.rewards import shape_rewards


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Byte-level BPE that has seen English alone: an accent takes two tokens, an emoji four."""
    return train_tokenizer(["the cat sat on the mat with the hat"] * 50, 280, 64)


def decoder(tokenizer):
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))


def place(tokenizer, text: str, steps: list[tuple[int, float]]) -> tuple[list[float], list[str]]:
    """Rewards per token, and the text up to and with each token."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decode = decoder(tokenizer)
    assert decode(ids) == text
    rewards = step_rewards_per_token(StepRewards(steps), ids, text, decode)
    return rewards, [decode(ids[: k + 1]) for k in range(len(ids))]


@pytest.mark.parametrize(
    "text", ["the cat sat", "naïve café, the end", "😀 the cat 😀😀", "数学は楽しい", "a\u0301 the"]
)
def test_steps_of_multi_byte_text_are_placed_on_the_token_that_completes_them(byte_tokenizer, text):
    for end in range(1, len(text) + 1):
        rewards, upto = place(byte_tokenizer, text, [(end, 1.5)])
        (at,) = [k for k, reward in enumerate(rewards) if reward]
        assert upto[at].startswith(text[:end])
        assert at == 0 or not upto[at - 1].startswith(text[:end])


def test_an_emoji_is_complete_with_the_last_of_its_bytes(byte_tokenizer):
    ids = byte_tokenizer("😀x", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5  # four bytes and a letter
    rewards = step_rewards_per_token(StepRewards([(1, 2.0), (2, -1.0)]), ids, "😀x", decoder(byte_tokenizer))
    assert rewards == [0.0, 0.0, 0.0, 2.0, -1.0]


def test_steps_skip_special_tokens_and_add_up(tokenizer):
    """ "ab", end of text, "c": ids 3, 4, 0, 5; the third character is the fourth token. 0 at the end adds no text."""
    decode = decoder(tokenizer)
    steps = StepRewards([(2, 1.0), (3, 0.25), (3, 0.5)])
    assert step_rewards_per_token(steps, [3, 4, 0, 5, 0], "abc", decode) == [0.0, 1.0, 0.0, 0.75, 0.0]
    assert step_rewards_per_token(StepRewards([]), [0], "", decode) == [0.0]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([(0, 1.0)], r"ends at character 0, outside 1\.\.3"),
        ([(4, 1.0)], r"ends at character 4, outside 1\.\.3"),
        ([(1.5, 1.0)], r"ends at character 1\.5"),
        ([(1, "good")], "has the score 'good', which is not a number"),
        ([1], r"a step must be a pair \(end, score\), got 1"),
    ],
)
def test_invalid_steps_name_function_and_completion(tokenizer, steps, message):
    def judge(prompts, completions):
        return [StepRewards(steps)]

    with pytest.raises(RewardError, match=f"'judge', completion 'abc': .*{message}"):
        score(judge, ["p"], ["abc"], {}, completion_ids=[[3, 4, 5]], decode=decoder(tokenizer))


def test_steps_need_ids_that_belong_to_the_text(tokenizer):
    with pytest.raises(ValueError, match="not the text of its token ids"):
        step_rewards_per_token(StepRewards([(3, 1.0)]), [3, 4], "abc", decoder(tokenizer))
    with pytest.raises(RewardError, match="returned StepRewards"):
        coerce_scores([StepRewards([])], 1, "fn")


@pytest.mark.parametrize(
    "answer",
    [[[1.0, 2.0], None, 3.0], ((1, 2), None, 3), [torch.tensor([1.0, 2.0]), None, 3.0], [np.array([1, 2]), None, 3]],
)
def test_fault_12_lists_of_one_number_per_token_are_read(answer):
    assert coerce_scores(answer, 3, "fn", [2, 2, 5]) == [[1.0, 2.0], None, 3.0]


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        ([[1.0], 1.0], "returned 1 token rewards for a completion of 2 tokens at index 0"),
        ([[1.0, None], 1.0], "returned list .*at index 0"),
        ([[1.0, "2"], 1.0], "returned str '2' at index 0"),
        ([[1.0, [2.0]], 1.0], "returned list"),
        ([torch.ones(1, 2), 1.0], "returned Tensor"),
    ],
)
def test_fault_12_token_rewards_of_another_shape_are_an_error(answer, got):
    with pytest.raises(RewardError, match=got) as error:
        coerce_scores(answer, 2, "fn", [2, 5])
    assert "lists of one number per token, StepRewards (or None), one per completion" in str(error.value)


def test_fault_13_a_non_finite_token_reward_is_an_error_or_dropped():
    def fn(prompts, completions):
        return [[0.0, math.nan], [1.0]]

    given = (["p", "q"], ["ab", "c"], {})
    with pytest.raises(RewardError, match=r"'fn' scored \[0\.0, nan\] for prompt 'p'"):
        score(fn, *given, completion_ids=[[3, 4], [5]])
    assert score(fn, *given, completion_ids=[[3, 4], [5]], drop_nonfinite=True) == [None, 1.0]


def each_letter(prompts, completions, completion_ids, **columns):
    """0.1 for the first token, 0.2 for the second, and so on."""
    return [[0.1 * (k + 1) for k in range(len(ids))] for ids in completion_ids]


def whole(prompts, completions, **columns):
    return [float(i) for i in range(len(completions))]


def some_steps(prompts, completions, **columns):
    """Half a point for the first letter, for every second response; the others are scored as a whole."""
    return [StepRewards([(1, 0.5)]) if i % 2 and text else 1.0 for i, text in enumerate(completions)]


def test_mixed_rewards_are_weighted_and_placed_on_their_tokens(make_trainer, prompts):
    """Advantages without a critic, discount or KL are the rewards from each token to the end."""
    trainer = make_trainer(
        reward_funcs=[each_letter, whole, some_steps],
        reward_weights=(2.0, 1.0, -1.0),
        objective="reinforce",
        kl_coef=0.0,
        normalize_advantages=False,
    )
    rollout = trainer.rollout(prompts)
    estimates = estimate(rollout, shape_rewards(rollout, trainer.args, 0.0), trainer.args)
    old, metrics = estimates.experience, estimates.metrics
    stepped = 0
    for i, ids in enumerate(rollout.token_counts):
        n = ids[1]
        rewards = [0.2 * (k + 1) for k in range(n)]
        if i % 2 and rollout.completions[i]:
            rewards[0] -= 0.5  # one token a character: the first completes the step
            stepped += 1
        else:
            rewards[-1] -= 1.0
        rewards[-1] += i
        assert float(rollout.scores[i]) == pytest.approx(sum(rewards))
        to_go = [sum(rewards[k:]) for k in range(n)]
        assert old.advantages[i, :n].tolist() == pytest.approx(to_go, abs=1e-5)
    assert stepped > 1
    assert metrics["score/part/each_letter"] == pytest.approx(np.mean(rollout.score_parts["each_letter"]))
    assert metrics["score/mean"] == pytest.approx(float(rollout.scores.mean()))
    assert torch.equal(rollout.token_scores[~rollout.mask], torch.zeros(int((~rollout.mask).sum())))


def test_whole_scores_alone_leave_no_token_scores(make_trainer, prompts):
    assert make_trainer(reward_funcs=whole).rollout(prompts).token_scores is None


@pytest.mark.slow
def test_a_run_learns_from_token_rewards(make_trainer, learning_seed):
    """The same toy task as with one score a response: letters before n, each rewarded where it stands."""

    def early(prompts, completions, completion_ids, **columns):
        return [[float(3 <= token < 16) / 6 for token in ids] for ids in completion_ids]

    trainer = make_trainer(
        reward_funcs=early,
        total_episodes=640,
        rollout_batch_size=32,
        learning_rate=5e-3,
        num_minibatches=4,
        kl_coef=0.01,
        stop_token_ids=(0,),
        seed=learning_seed,
    )
    trainer.train()
    means = [row["score/mean"] for row in trainer.run.read()]
    assert means[0] < 0.6 and sum(means[-3:]) / 3 > 0.8


def test_rewards_are_scored_by_name_and_none_for_all_is_refused():
    responses = Responses(["p", "q"], ["a", "b"])
    parts = score_responses({"x": lambda p, c: [1, None], "y": lambda p, c: [True, 2]}, responses)
    assert parts == {"x": [1.0, None], "y": [1.0, 2.0]}
    with pytest.raises(RewardError, match="'x' scored none of the 2"):
        score_responses({"x": lambda p, c: [None, None]}, responses)
