"""Text environments: each conversation has its own, which replies to it and scores it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlhf_ppo.generation.environments import Environments, openenv_environment
from rlhf_ppo.generation.environments.episodes import Episodes
from rlhf_ppo.generation.multi_turn import RespondError
from rlhf_ppo.rewards.validation import RewardError


class GuessTheLetter:
    """Rewards 1 for a turn with the secret letter in it, and ends there; the secret is the prompt's last letter."""

    made: list[GuessTheLetter]

    def __init__(self, prompt, style: str = "gymnasium") -> None:
        self.prompt, self.said = prompt, []
        self.secret, self.style, self.steps, self.resets, self.closed = prompt[-1]["content"][-1], style, 0, 0, 0
        self.made.append(self)

    def reset(self):
        self.resets += 1
        return "guess", {}

    def step(self, action: str):
        self.steps += 1
        self.said.append(action)
        right = self.secret in action
        observation, reward = f" no {self.steps}", float(right)
        if self.style == "gymnasium":
            return observation, reward, right, False, {}
        if self.style == "truncating":
            return observation, 0.5, False, self.steps == 2, {}
        if self.style == "short":
            return observation, reward, right
        return SimpleNamespace(observation={"text": observation}, reward=reward if right else None, done=right)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def fresh():
    GuessTheLetter.made = []


def by_prompt(prompts):
    """The games in the order of their prompts, whose last letters are the secrets; threads may begin in another."""
    waiting = list(GuessTheLetter.made)
    return [waiting.pop(next(i for i, g in enumerate(waiting) if g.prompt[-1]["content"] == p)) for p in prompts]


def text(observation):
    return observation["text"]


@pytest.mark.parametrize(("style", "reads"), [("gymnasium", None), ("short", None), ("openenv", text)])
def test_each_conversation_has_an_environment_of_its_own(make_trainer, prompts, style, reads):
    games = Environments(lambda prompt: GuessTheLetter(prompt, style), text=reads)
    trainer = make_trainer(respond=games, reward_funcs=games.reward, max_turns=3, max_new_tokens=8, stop_token_ids=())
    # Equal prompts, of which each has its own game all the same.
    rollout = trainer.rollout(["once upon", "the cat"] * 4)
    heard = [(game.prompt[0]["content"], game.said) for game in GuessTheLetter.made]
    assert all(game.steps == len(game.said) and game.resets == game.closed == 1 for game in GuessTheLetter.made)
    for messages, score in zip(rollout.conversations, rollout.scores.tolist(), strict=True):
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        heard.remove((messages[0]["content"], said))
        assert score == float(messages[0]["content"][-1] in said[-1])
        assert len(said) == 3 or score == 1
        assert [m["content"] for m in messages if m["role"] == "user"][1:] == [
            f" no {n + 1}" for n in range(len(said) - 1)
        ]
    assert not heard and len(set(rollout.scores.tolist())) == 2
    assert not games._episodes._episodes
    trainer.step(rollout)


def test_an_episode_that_is_cut_ends_the_conversation(make_trainer, prompts):
    games = Environments(lambda prompt: GuessTheLetter(prompt, "truncating"))
    trainer = make_trainer(respond=games, reward_funcs=games.reward, max_turns=5)
    rollout = trainer.rollout(prompts)
    # Half a point for each turn, on its last token.
    for row in range(8):
        turns, rewards = (x[row][rollout.mask[row]].tolist() for x in (rollout.turns, rollout.token_scores))
        assert rewards == [0.5 * (i + 1 == len(turns) or turns[i + 1] != turn) for i, turn in enumerate(turns)]
    assert rollout.scores.tolist() == [1.0] * 8 and (rollout.turns.amax(dim=1) == 1).all()


@pytest.mark.slow
def test_a_game_is_learned(make_trainer, learning_seed):
    """Say an "e", whose share is 1 in 30 at first: three turns of two letters find it in 1 of 6 conversations."""
    games = Environments(lambda prompt: GuessTheLetter(prompt))
    trainer = make_trainer(
        respond=games,
        reward_funcs=games.reward,
        train_dataset=[{"prompt": "the"}] * 32,
        max_turns=3,
        max_new_tokens=2,
        stop_token_ids=(),
        rollout_batch_size=32,
        total_episodes=32 * 20,
        learning_rate=1e-2,
        kl_coef=0.0,
        seed=learning_seed,
    )
    scores: list[float] = []
    trainer.callbacks.append(lambda trainer, metrics: scores.append(metrics["score/mean"]))
    trainer.train()
    assert scores[0] < 0.6 and sum(scores[-4:]) / 4 > 0.9


@pytest.mark.parametrize(
    ("step", "text", "message"),
    [
        (lambda action: "text", None, "step must return"),
        (lambda action: (1, 2), None, "step must return"),
        (lambda action: ({"a": 1}, 0.0, False), None, "say how to read it"),
    ],
)
def test_an_environment_that_returns_something_else_is_named(make_trainer, prompts, step, text, message):
    games = Environments(lambda prompt: SimpleNamespace(reset=lambda: None, step=step), text=text)
    with pytest.raises(RespondError, match=message):
        make_trainer(respond=games, reward_funcs=games.reward, max_turns=2).rollout(prompts)


def test_methods_may_be_asynchronous_or_not_in_any_mixture(make_trainer, prompts):
    class Client(GuessTheLetter):
        async def reset(self):
            return super().reset()

        async def close(self):
            super().close()

    games = Environments(lambda prompt: Client(prompt))
    rollout = make_trainer(respond=games, reward_funcs=games.reward, max_turns=2).rollout(prompts)
    assert all(game.resets == game.closed == 1 for game in GuessTheLetter.made)
    assert all(
        game.steps == int(turns.max()) + 1 for game, turns in zip(by_prompt(prompts), rollout.turns, strict=True)
    )


def test_its_reward_without_its_turns_is_an_error(make_trainer, prompts):
    games = Environments(lambda prompt: GuessTheLetter(prompt))
    with pytest.raises(RewardError, match="pass them as respond, too"):
        make_trainer(respond=lambda messages: None, reward_funcs=games.reward, max_turns=2).rollout(prompts)


def test_a_server_of_openenv_itself():
    """Two games over its own client and server: "e" wins at the second turn of one, never in the other."""
    core = pytest.importorskip("openenv.core", reason="pip install 'rlhf-ppo[openenv]'")
    server_side = pytest.importorskip("openenv.core.env_server")
    import threading
    import time

    import uvicorn

    class Say(server_side.Action):
        message: str

    class Heard(server_side.Observation):
        text: str

    class Letter(server_side.Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed=None, episode_id=None, **settings):
            return Heard(text=f"guess {seed}", done=False, reward=None)

        def step(self, action, timeout_s=None, **settings):
            right = "e" in action.message
            return Heard(text=f" no {action.message}", reward=2.0 if right else None, done=right)

        @property
        def state(self):
            return server_side.State(episode_id="x", step_count=0)

    app = server_side.create_fastapi_app(Letter, Say, Heard, max_concurrent_envs=2)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    games = Environments(
        lambda prompt: core.GenericEnvClient(base_url=address).sync(),
        action=lambda text: core.GenericAction(message=text),
        text=lambda observation: observation["text"],
    )
    first, second = ([{"role": "user", "content": "play"}] for _ in range(2))
    for messages, said, reply in ((first, "abc", " no abc"), (second, "xyz", " no xyz"), (first, "he", None)):
        messages.append({"role": "assistant", "content": said})
        assert games(messages) == reply
        messages.append({"role": "user", "content": str(reply)})
    scores = games.reward(["", ""], ["", ""], conversations=[first, second], completion_turns=[[0, 0, 1], [0, 0]])
    assert scores == [[0.0, 0.0, 2.0], [0.0, 0.0]]
    games.close_episodes()
    # As an environment of PPOTrainer, through the address alone.
    episode = Episodes(openenv_environment(address, text=text)).new()
    assert episode.reset({"prompt": "play ", "seed": 5}) == "play guess 5"
    said = [{"role": "user", "content": "play"}, {"role": "assistant", "content": "abc"}]
    assert episode.step(said) == " no abc"
    said.append({"role": "assistant", "content": "he"})
    assert episode.step(said) is None and episode.rewards == [0.0, 2.0]
    server.should_exit = True


@pytest.mark.parametrize("fails", ["reward", "step", "other reward"])
def test_no_episode_stays_open(make_trainer, prompts, fails):
    """A rollout that fails, or whose rewards never ask, leaves no environment open; each is closed once."""
    games = Environments(lambda prompt: GuessTheLetter(prompt))
    reward = {"reward": lambda *_, **__: 1 / 0, "step": games.reward}.get(fails, lambda p, c, **_: [0.0, 1.0] * 4)
    trainer = make_trainer(respond=games, reward_funcs=reward, max_turns=3, max_new_tokens=2, stop_token_ids=())
    if fails == "step":
        step, calls = games.action, iter(range(100))
        games.action = lambda text: step(text) if next(calls) < 10 else 1 / 0
    if fails == "other reward":
        trainer.rollout(prompts)
    else:
        with pytest.raises((RewardError, RespondError), match="ZeroDivisionError"):
            trainer.rollout(prompts)
    assert len(GuessTheLetter.made) == 8 and all(game.closed == 1 for game in GuessTheLetter.made)
    assert not games._episodes._episodes


def test_an_environment_that_cannot_be_closed_keeps_no_other_open(recwarn):
    closed = []

    def close():
        closed.append(1)
        raise OSError("gone")

    games = Environments(lambda _: SimpleNamespace(reset=lambda: None, step=lambda _: ("x", 0, False), close=close))
    for _ in range(2):
        games([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    games.close_episodes()
    assert len(closed) == 2 and "OSError: gone" in str(recwarn[0].message)
