"""Adapters: Gymnasium's and OpenEnv's environments, and reasoning-gym's tasks, as text environments."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import gymnasium
import pytest

from rlhf_ppo.data import reasoning_gym
from rlhf_ppo.data.files import load_rows
from rlhf_ppo.generation.environments import ReasoningGym, gymnasium_environment, openenv_environment
from rlhf_ppo.rewards.reasoning_gym import reasoning_gym as reasoning_gym_reward

TEXT = gymnasium.spaces.Text(40, charset="abcdefghijklmnopqrstuvwxyz0123456789 .,:")


class Riddle(gymnasium.Env):
    """Say the letter that the seed chooses."""

    closed = 0
    action_space = observation_space = TEXT

    def __init__(self, hint: str = "a letter"):
        self.hint = hint

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.letter = "etao"[int(self.np_random.integers(4))]
        return f"{self.hint}, {self.letter}: ", {}

    def step(self, action):
        right = self.letter in action
        return " no, again: ", float(right), right, False, {}

    def close(self):
        type(self).closed += 1


class Numbers(Riddle):
    action_space = gymnasium.spaces.Discrete(3)

    def step(self, action):
        assert action in self.action_space
        return " no, again: ", 1.0, True, False, {}


@pytest.fixture
def registered():
    for name, kind in (("Riddle-v0", Riddle), ("Numbers-v0", Numbers)):
        gymnasium.register(id=name, entry_point=kind)
    Riddle.closed = 0
    yield
    for name in ("Riddle-v0", "Numbers-v0"):
        del gymnasium.registry[name]


def test_a_gymnasium_environment_asks_and_rewards(registered, make_trainer):
    """The row's seed is the environment's: equal seeds ask for one letter, and what it shows follows the prompt."""
    rows = [{"prompt": "say ", "seed": i // 2} for i in range(8)]
    trainer = make_trainer(
        environment=gymnasium_environment("Riddle-v0", hint="now"),
        reward_funcs=None,
        train_dataset=rows,
        max_turns=3,
        stop_token_ids=(),
    )
    made = Riddle.closed
    rollout = trainer.rollout(["say "] * 8, seed=[row["seed"] for row in rows])
    assert rollout.prompts[0] == rollout.prompts[1] and len(set(rollout.prompts)) > 1
    assert all(prompt.startswith("say now, ") for prompt in rollout.prompts)
    for prompt, messages, score in zip(rollout.prompts, rollout.conversations, rollout.scores.tolist(), strict=True):
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        assert score == float(prompt[-3] in said[-1])
    assert Riddle.closed - made == 8
    trainer.step(rollout)


def test_other_spaces_are_translated(registered, make_trainer):
    with pytest.raises(ValueError, match=r"'Numbers-v0' has the action space Discrete\(3\), not Text.*action=lambda"):
        gymnasium_environment("Numbers-v0")
    with pytest.raises(ValueError, match=r"'CartPole-v1' has the .* space .*, not Text: say how"):
        gymnasium_environment("CartPole-v1")
    with pytest.raises(ValueError, match="gymnasium environment 'Gone-v0' cannot be made"):
        gymnasium_environment("Gone-v0")
    numbers = gymnasium_environment("Numbers-v0", action=lambda said: len(said) % 3)
    trainer = make_trainer(environment=numbers, reward_funcs=None, train_dataset=[{"prompt": "say "}])
    assert trainer.rollout(["say "]).scores.tolist() == [1.0]


def test_a_turn_that_is_no_action_is_told_so_and_counted(registered, make_trainer, script):
    environment = gymnasium_environment("Numbers-v0", action={"e": 1, "d": 7}.__getitem__)
    game = environment()
    game.reset({"prompt": ""})
    told = [game.step([{"role": "assistant", "content": said}]) for said in "xde"]
    assert told == [
        ("Error: no action: 'x'; actions are Discrete(3)", 0.0, False),
        ("Error: no action: 7 is not in Discrete(3); actions are Discrete(3)", 0.0, False),
        (None, 1.0, True),
    ]
    rows = [{"prompt": "say "}]
    trainer = make_trainer(environment=environment, reward_funcs=None, train_dataset=rows, max_new_tokens=1)
    script([[trainer.fixed.tokenizer(letter)["input_ids"][-1]] for letter in "xe"])
    rollout = trainer.rollout(["say "] * 2)
    assert rollout.scores.tolist() == [0.0, 1.0]
    assert rollout.logged_metrics == {"invalid_actions_per_response": 0.5}


class Client:
    """A stand-in for an OpenEnv client."""

    async def reset(self, **options):
        return SimpleNamespace(observation={"text": f"guess {options}"}, reward=None, done=False)

    async def step(self, action):
        won = "e" in action["message"]
        return SimpleNamespace(observation={"text": " no"}, reward=2.0 if won else None, done=won)

    async def close(self):
        pass


CHAT = (
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] + '.' }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("so: ", "so: guess {}"),
        (None, [{"role": "user", "content": "guess {}"}]),
        (
            [{"role": "system", "content": "be kind"}, {"role": "user", "content": "play"}],
            [{"role": "system", "content": "be kind"}, {"role": "user", "content": "play\n\nguess {}"}],
        ),
        (
            [{"role": "system", "content": "be kind"}],
            [{"role": "system", "content": "be kind"}, {"role": "user", "content": "guess {}"}],
        ),
    ],
)
def test_an_openenv_client_plays_and_what_it_shows_follows_the_prompt(make_trainer, tokenizer, prompt, shown):
    tokenizer.chat_template = CHAT
    environment = openenv_environment(Client, text=lambda observation: observation["text"])
    rows = [{"prompt": prompt}] if prompt is not None else [{"task": 3}]
    settings = {"reward_funcs": None, "train_dataset": rows, "processing_class": tokenizer, "max_turns": 2}
    trainer = make_trainer(environment=environment, max_new_tokens=4, stop_token_ids=(), **settings)
    rollout = trainer.rollout([prompt] * 8)
    assert rollout.prompts == [shown] * 8
    for messages, score in zip(rollout.conversations, rollout.scores.tolist(), strict=True):
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        assert score == 2.0 * ("e" in said[-1])


def test_an_address_needs_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "openenv", None)
    monkeypatch.setitem(sys.modules, "openenv.core", None)
    with pytest.raises(ValueError, match=r"needs the package openenv: pip install 'rlhf-ppo\[openenv\]'"):
        openenv_environment("http://localhost:8000")


# reasoning-gym


@pytest.fixture
def stand_in(monkeypatch):
    """A stand-in for the package with one task: say the letter."""

    def create(name, *, size, seed, **options):
        if name != "letters":
            raise ValueError(f"Dataset '{name}' not registered")
        if options.keys() - {"first"}:
            raise TypeError(f"unexpected keyword argument {sorted(options)[0]!r}")
        first = options.get("first", 0)
        letters = ["etaoinsh"[(seed + i + first) % 8] for i in range(size)]
        facts = {"source_dataset": "letters", "difficulty": (1, 2)}
        return [{"question": f"say {letter}", "answer": letter, "metadata": facts} for letter in letters]

    def score(answer, entry):
        assert entry["metadata"]["difficulty"] == (1, 2)
        return 1.0 if answer == entry["answer"] else 0.01 * (entry["answer"] in answer)

    library = SimpleNamespace(create_dataset=create, get_score_answer_fn=lambda name: score)
    monkeypatch.setitem(sys.modules, "reasoning_gym", library)
    reasoning_gym._scorer.cache_clear()
    yield
    reasoning_gym._scorer.cache_clear()


def test_reasoning_gym_tasks_are_rows_with_options_in_the_name(stand_in):
    rows = load_rows("reasoning-gym:letters?size=5&seed=2&first=1")
    assert rows["prompt"] == rows["question"] == [f"say {letter}" for letter in "oinsh"]
    assert rows[0]["metadata"]["difficulty"] == (1, 2)
    assert len(load_rows("reasoning-gym:letters?size=5", "train[:3]")) == 3
    assert load_rows("reasoning-gym:letters?size=1&chat=true")["prompt"] == [[{"role": "user", "content": "say e"}]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reasoning-gym:numbers", "task 'numbers' .*not registered"),
        ("reasoning-gym:letters?last=1", "task 'letters'.*last"),
    ],
)
def test_a_reasoning_gym_task_or_option_that_does_not_exist_is_named(stand_in, source, message):
    with pytest.raises(ValueError, match=message):
        load_rows(source)


def test_reasoning_gym_is_named_if_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"pip install 'rlhf-ppo\[reasoning-gym\]'"):
        load_rows("reasoning-gym:leg_counting")


def test_reasoning_gym_scores_as_reward_and_as_environment(stand_in, make_trainer):
    """What is in the last answer tags counts, or else everything; a right answer ends the conversation."""
    rows = reasoning_gym.reasoning_gym_rows("letters", size=8)
    columns = {name: [row[name] for row in rows] for name in ("question", "answer", "metadata")}
    said = ["e", "t", "<answer>o</answer> <answer> a </answer>", "so", "x", [{"role": "assistant", "content": "n"}]]
    scores = reasoning_gym_reward([""] * 6, said, **{name: values[:6] for name, values in columns.items()})
    assert scores == [1.0, 1.0, 1.0, 0.01, 0.0, 1.0]

    class Easy(ReasoningGym):
        reply = " no. again: "

    settings = {"train_dataset": rows, "max_turns": 3, "max_new_tokens": 1, "stop_token_ids": ()}
    rollout = make_trainer(environment=Easy, reward_funcs=None, **settings).rollout(columns["question"], **columns)
    for messages, row, score in zip(rollout.conversations, rows, rollout.scores.tolist(), strict=True):
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert score == float(answers[-1] == row["answer"]) and (len(answers) == 3 or score == 1)
    make_trainer(reward_funcs=reasoning_gym_reward, train_dataset=rows).rollout(columns["question"], **columns)


def test_rows_of_another_kind_are_named_at_reset(stand_in, make_trainer, prompts):
    trainer = make_trainer(environment=ReasoningGym, reward_funcs=None)
    with pytest.raises(
        Exception, match=r"ReasoningGym\.reset raised ValueError: the row has no question and no answer"
    ):
        trainer.rollout(prompts)


def test_no_answer_is_run_as_code(monkeypatch, tmp_path):
    """Scorers that evaluate get literals and arithmetic alone, or are refused."""

    def evaluates(answer, entry):
        return float(eval(answer or "0") == 24)

    def evaluates_its_own(answer, entry):
        return float(answer == str(eval(entry["answer"])))

    scorers = {"puzzle24": evaluates, "simple_integration": evaluates, "number_sorting": evaluates_its_own}
    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(get_score_answer_fn=scorers.get))
    reasoning_gym._scorer.cache_clear()

    def score(task, answer):
        row = {"question": "?", "answer": "20 + 4", "metadata": {"source_dataset": task}}
        return reasoning_gym.reasoning_gym_score(answer, row)

    mark = tmp_path / "mark"
    for attack in (f"open({str(mark)!r}, 'w') and 24", f"__import__('pathlib').Path({str(mark)!r}).touch() or 24"):
        assert score("puzzle24", attack) == 0
    # Powers and repeated lists take all time or memory.
    for attack in ("9**9**9**9", "9* *9", "[0]*10**10", "(" * 9000, "1" * 9000, "()()", "(0).real", "len"):
        assert reasoning_gym._is_harmless(attack) == (attack in ("()()", "len")), attack
    assert not mark.exists()
    assert score("puzzle24", "(3 + 5) * 12 / 4") == score("number_sorting", "24") == 1
    assert all(map(reasoning_gym._is_harmless, ("_ Q _\nQ _ _", "[['Q', '_'], [1, -2.5]]", "ABCDE", "0 1\n1 0", "")))
    with pytest.raises(ValueError, match="scores 'simple_integration' by running the policy's answers as Python code"):
        score("simple_integration", "x")
    reasoning_gym._scorer.cache_clear()


def test_the_package_itself():
    pytest.importorskip("reasoning_gym", reason="pip install 'rlhf-ppo[reasoning-gym]'")
    rows = load_rows("reasoning-gym:leg_counting?size=20&seed=1&max_animals=4").to_list()
    assert len({row["question"] for row in rows}) > 10
    columns = {name: [row[name] for row in rows] for name in ("question", "answer", "metadata")}
    right = [f"so it is <answer>{row['answer']}</answer>" for row in rows]
    assert reasoning_gym_reward(rows, right, **columns) == [1.0] * 20
    assert max(reasoning_gym_reward(rows, ["none"] * 20, **columns)) < 1
    with pytest.raises(ValueError, match="task 'legs'"):
        load_rows("reasoning-gym:legs")
    for task in ("countdown", "n_queens", "spiral_matrix"):
        rows = load_rows(f"reasoning-gym:{task}?size=3").to_list()
        columns = {name: [row[name] for row in rows] for name in ("question", "answer", "metadata")}
        columns["answer"] = [row["metadata"].get("expression", row["answer"]) for row in rows]
        assert reasoning_gym_reward(rows, columns["answer"], **columns) == [1.0] * 3, task
