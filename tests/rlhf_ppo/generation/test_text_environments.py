"""Environment classes: reset opens each conversation, step answers and rewards its turns, and mistakes are named."""

from __future__ import annotations

import asyncio
import math
import threading

import pytest

from rlhf_ppo.generation.multi_turn import RespondError
from rlhf_ppo.rewards.validation import RewardError


class CountWords:
    """Ask for words with the row's letter: a point for each turn that has it; ends at the second such turn."""

    made: list[CountWords]

    def __init__(self):
        self.made.append(self)
        self.hits, self.closed = 0, 0

    def reset(self, row):
        self.row = row
        return f"say {row['letter']}" if "prompt" not in row else None

    def step(self, messages):
        hit = self.row["letter"] in messages[-1]["content"]
        self.hits += hit
        return " go on", hit, self.hits == 2

    def close(self):
        self.closed += 1


class Waiting(CountWords):
    """The same with a coroutine for each method."""

    async def reset(self, row):
        await asyncio.sleep(0)
        return super().reset(row)

    async def step(self, messages):
        await asyncio.sleep(0)
        return super().step(messages)

    async def close(self):
        super().close()


class Mixed(CountWords):
    """One method is a coroutine, the other is not."""

    async def reset(self, row):
        return super().reset(row)


@pytest.fixture(autouse=True)
def fresh():
    CountWords.made = []


ROWS = [{"letter": letter} for letter in "etaoinsh"]


@pytest.fixture
def play(make_trainer):
    """A trainer for games of up to three turns."""

    def make(environment=CountWords, **settings):
        small = {"train_dataset": ROWS, "reward_funcs": None, "max_turns": 3, "max_new_tokens": 8}
        return make_trainer(environment=environment, **{**small, "stop_token_ids": (), **settings})

    return make


def rollout_of(trainer, rows=ROWS):
    return trainer.rollout([row.get("prompt") for row in rows], letter=[row["letter"] for row in rows])


@pytest.mark.parametrize("kind", [CountWords, Waiting, Mixed, lambda: CountWords()])
def test_each_turn_is_answered_and_rewarded_and_reset_says_the_prompt(play, kind):
    trainer = play(kind)
    rollout = rollout_of(trainer)
    assert rollout.prompts == [f"say {row['letter']}" for row in ROWS]
    for i, (messages, letter) in enumerate(zip(rollout.conversations, "etaoinsh", strict=True)):
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        points = [float(letter in turn) for turn in said]
        assert len(said) == 3 or sum(points) == 2
        assert rollout.scores[i] == sum(points)
        # On the last token of each turn.
        turns, rewards = (x[i][rollout.mask[i]].tolist() for x in (rollout.turns, rollout.token_scores))
        ends = [n + 1 == len(turns) or turns[n + 1] != turn for n, turn in enumerate(turns)]
        assert rewards == [points[turn] if last else 0.0 for turn, last in zip(turns, ends, strict=True)]
    assert len(set(rollout.scores.tolist())) > 1
    assert len(CountWords.made) == 8 and all(game.closed == 1 for game in CountWords.made)
    prompt = trainer.fixed.tokenizer("say e")["input_ids"]
    assert rollout.prompt_ids[0][rollout.prompt_mask[0]].tolist() == prompt
    assert trainer.step(rollout)["policy/first_minibatch_max_abs_log_ratio"] < 1e-5


def test_the_rows_own_prompt_stands_if_reset_returns_none(play):
    rows = [{"prompt": f"the {letter}", "letter": letter} for letter in "etaoinsh"]
    trainer = play(train_dataset=rows)
    assert rollout_of(trainer, rows).prompts == [row["prompt"] for row in rows]
    assert CountWords.made[0].row.keys() == {"prompt", "letter"}


def test_a_whole_run_without_prompts_trains_evaluates_and_resumes(play):
    """With a reward function beside the environment's: weights are in the order environment, functions."""

    def length(prompts, completions, *, letter, **columns):
        return [float(len(text)) for text in completions]

    settings = {"reward_funcs": length, "reward_weights": (1.0, 0.01), "respond_concurrency": 1}
    trainer = play(**settings, eval_dataset=ROWS[:3], total_episodes=24, save_every=2, turn_credit="turn")
    metrics = trainer.train()
    assert {"eval/score_mean", "response/turns"} <= set(metrics)
    row = trainer.run.read("samples.jsonl")[0]
    assert row["prompt"].startswith("say ")
    rollout = rollout_of(trainer)
    parts = rollout.score_parts
    assert list(parts) == ["environment", "length"]
    expected = [a + 0.01 * b for a, b in zip(parts["environment"], parts["length"], strict=True)]
    assert rollout.scores.tolist() == pytest.approx(expected)
    again = play(**settings, eval_dataset=ROWS[:3], total_episodes=24, save_every=2, turn_credit="turn")
    again.train(trainer.run.path / "checkpoint-2")
    assert again.run.read()[-1] == trainer.run.read()[-1]


def test_one_turn_is_enough(play):
    rollout = rollout_of(play(max_turns=1))
    assert (rollout.turns == 0).all() and not rollout.environment.any() and rollout.token_scores is not None


def test_a_slow_reset_does_not_stop_the_others(play):
    """Row 0 is reset only when another has been answered: waiting for all resets would never end."""
    stepped = threading.Event()

    class Slow(CountWords):
        def reset(self, row):
            assert row["letter"] != "e" or stepped.wait(60)
            return super().reset(row)

        def step(self, messages):
            stepped.set()
            return super().step(messages)

    assert len(rollout_of(play(Slow)).prompts) == 8


def test_a_chat_may_be_extended_and_answered_with_any_role(play, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] + '.' }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )

    class Chat(CountWords):
        def reset(self, row):
            self.row = row
            return [{"role": "system", "content": "be kind"}, *row["prompt"]]

        def step(self, messages):
            assert [message["role"] for message in messages[:2]] == ["system", "user"]
            return {"role": "tool", "content": "4"}, None, False

    rows = [{"prompt": [{"role": "user", "content": "hi"}], "letter": letter} for letter in "etaoinsh"]
    rollout = rollout_of(play(Chat, train_dataset=rows, processing_class=tokenizer, max_turns=2), rows)
    assert rollout.completions[0][1] == {"role": "tool", "content": "4"}
    assert rollout.scores.tolist() == [0.0] * 8  # None counts as 0


# Mistakes


def environment(reset=lambda self, row: "say", step=lambda self, messages: (" no", 0.0, False)):
    return type("Game", (), {"reset": reset, "step": step})


ENDLESS: list = []
ENDLESS.append(ENDLESS)


def fails(*_):
    raise OSError("gone")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (environment(reset=fails), r"Game\.reset raised OSError: gone, for conversation \d, of the row \{'letter'"),
        (environment(step=fails), r"Game\.step raised OSError: gone, in conversation \d: \[\{'role': 'user'"),
        (environment(reset=lambda self, row: row["task"]), r"reset raised KeyError: 'task'.*columns are \['letter'\]"),
        (environment(reset=lambda self, row: None), r"reset returned None, which means the row's own prompt"),
        (environment(reset=lambda self, row: ("say", {})), r"reset must return messages or text.*it returned tuple"),
        (environment(reset=lambda self, row: ""), r"reset must return messages or text.*it returned str ''"),
        (environment(reset=lambda self, row: "a" * 70), r"reset returned a prompt that cannot be used.*70 tokens"),
        (environment(step=lambda self, m: "no"), r"step must return \(reply, reward, done\); it returned str 'no'"),
        (environment(step=lambda self, m: (3, 0.0, False)), r"step must return text, a message.*returned int 3"),
        (environment(step=lambda self, m: (None, 0.0, False)), r"step returned no reply .*although done is false"),
        (environment(step=lambda self, m: (" no", "1", False)), r"must return a number as reward.*returned str '1'"),
        (environment(reset=lambda self, row: [{"role": "user", "content": "", "of": ENDLESS}]), r"what JSON can hold"),
        (lambda: object(), r"returned object, which has no method reset and no step"),
        (lambda: fails(), r"<lambda>\(\) raised OSError: gone"),
    ],
)
def test_an_environment_that_fails_is_named(play, broken, message):
    trainer = play(broken)
    with pytest.raises(RespondError, match=message) as error:
        rollout_of(trainer)
    assert len(trainer.run.read("failed_rollout.jsonl")) == len(error.value.conversations) == 8


def test_a_prompt_longer_than_the_context_is_cut_if_the_settings_say_so(play):
    trainer = play(environment(reset=lambda self, row: "a" * 70), overlong_prompts="truncate", max_turns=1)
    assert rollout_of(trainer).prompt_mask.sum(dim=1).tolist() == [64 - 8] * 8


@pytest.mark.parametrize("method", ["reset", "step"])
def test_an_environment_that_hangs_is_named_and_the_others_are_closed(play, method):
    never = threading.Event()

    class Hangs(CountWords):
        def reset(self, row):
            if method == "reset" and row["letter"] == "o":
                never.wait()
            return super().reset(row)

        def step(self, messages):
            if method == "step" and self.row["letter"] == "o":
                never.wait()
            return super().step(messages)

    with pytest.raises(RespondError, match=rf"Hangs\.{method} did not return within respond_timeout_s=0\.2.*on 3"):
        rollout_of(play(Hangs, respond_timeout_s=0.2))
    never.set()
    assert all(game.closed == 1 for game in CountWords.made)


def test_an_environment_that_is_made_only_after_the_rollout_has_failed_is_closed(play):
    failed, never = threading.Event(), threading.Event()

    def make():
        first = not CountWords.made
        game = CountWords()
        if first:
            game.reset = fails
            return game
        failed.wait()
        return game

    with pytest.raises(RespondError, match="gone"):
        rollout_of(play(make))
    failed.set()
    assert any(never.wait(0.01) or [game.closed for game in CountWords.made] == [1] * 8 for _ in range(3000))


def test_a_reward_that_is_not_finite_is_an_error_or_dropped(play):
    class Game(CountWords):
        def step(self, messages):
            return " no", math.nan if self.row["letter"] == "t" else 1.0, False

    with pytest.raises(RewardError, match=r"'environment'.*nan"):
        rollout_of(play(Game))
    rollout = rollout_of(play(Game, drop_nonfinite_scores=True))
    assert rollout.scored.tolist() == [letter != "t" for letter in "etaoinsh"]


class Needs(CountWords):
    def __init__(self, size):
        pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"environment": CountWords.__new__(CountWords)}, "a function that makes one.*it is an environment itself"),
        ({"environment": 3}, "a function that makes one .*it is int 3"),
        ({"environment": type("Game", (), {"reset": fails})}, "environment Game has no method step"),
        ({"environment": Needs}, r"Needs is made without arguments.*takes \(size\).*pass lambda: Needs\(\.\.\.\)"),
        ({"environment": CountWords, "respond": lambda messages: None}, "respond and environment both answer"),
        ({"environment": None}, r"needs respond.* or an environment"),
        ({"environment": None, "max_turns": 1}, "reward_funcs is empty"),
        ({"args": None}, "args must be an RLHFConfig"),
    ],
)
def test_what_cannot_be_an_environment_is_refused_before_models_are_loaded(play, given, message):
    from rlhf_ppo import PPOTrainer

    if "args" in given:
        with pytest.raises(TypeError, match=message):
            PPOTrainer("no-such-model", environment=CountWords)
        return
    rows = [{"prompt": "a", "letter": "e"}] * 8
    with pytest.raises(ValueError, match=message):
        play(**{"model": "no-such-model" if "reward" not in message else None, "train_dataset": rows, **given})


def test_rows_without_a_prompt_need_an_environment(make_trainer):
    with pytest.raises(ValueError, match="no column 'prompt'"):
        make_trainer(train_dataset=ROWS)
