"""Search: resumable trials, the settings as they are among them, early stops, the file of the best, bad input."""

from __future__ import annotations

import sys

import pytest
import yaml

import classic
from classic.cli import TuneCommand, main
from classic.tune import SPACES, Search, Trial, _settings, _write_best, describe, tune

INSTALL = "pip install 'rlhf-ppo[optuna]'"


@pytest.fixture
def search(small, tmp_path):
    def make(**changes):
        settings = {
            "env": "tests/Match-v0",
            "args": small(total_timesteps=192, gamma=0.5),
            "names": ("learning_rate", "num_steps", "num_minibatches"),
            "trials": 3,
            "seeds": 1,
            "evaluations": 3,
            "episodes": 2,
            "folder": tmp_path / "search",
        }
        return Search(**{**settings, **changes})

    return make


def test_trials_continue_where_they_stopped_and_the_first_takes_the_settings_as_they_are(search):
    pytest.importorskip("optuna", reason=INSTALL)
    lines = []
    first = tune(search(), show=lines.append)
    assert len(first) == 3 and len(lines) == 3 and "trial 0 (1 of 3): return" in lines[0]
    assert next(trial for trial in first if trial.number == 0).settings == {}
    assert all(set(trial.settings) == set(search().names) for trial in first if trial.number)
    again = tune(search(trials=4), show=lines.append)
    assert len(again) == 4 and len(lines) == 4 and set(map(describe_one, first)) < set(map(describe_one, again))
    assert tune(search(trials=2), show=lines.append) == again and len(lines) == 4
    best = yaml.safe_load((search().folder / "best.yaml").read_text())
    assert best["gamma"] == 0.5 and best["total_timesteps"] == 192
    assert again[0].value == max(trial.value for trial in again if trial.value is not None)
    with pytest.raises(ValueError, match="holds a search with other settings than these"):
        tune(search(seeds=2))


def describe_one(trial):
    return trial.number, trial.value, describe(trial.settings)


def test_an_unpromising_trial_stops_early_and_a_diverged_one_counts(search, monkeypatch):
    optuna = pytest.importorskip("optuna", reason=INSTALL)
    monkeypatch.setattr(optuna.trial.Trial, "should_prune", lambda self: self.number == 1)

    said = []

    def learn(agent, *args, **kwargs):
        if agent.args.learning_rate == 1e-9:
            raise classic.NonFiniteGradientError("lower learning_rate")
        return original(agent, *args, **kwargs)

    original = classic.PPO.learn
    monkeypatch.setitem(SPACES, "learning_rate", lambda trial, args: 1e-9 if trial.number == 2 else 1e-3)
    monkeypatch.setattr(classic.PPO, "learn", learn)
    trials = tune(search(names=("learning_rate",)), show=said.append)
    assert {trial.number: trial.value is None for trial in trials} == {0: False, 1: True, 2: True}
    assert any("training diverged" in line for line in said) and any("stopped early" in line for line in said)


def test_an_interrupted_trial_is_repeated(search, monkeypatch):
    pytest.importorskip("optuna", reason=INSTALL)

    def stop(trial, args):
        if hasattr(trial, "study"):  # not where a search is tried out
            raise KeyboardInterrupt
        return 1e-3

    with monkeypatch.context() as patch:
        patch.setitem(SPACES, "learning_rate", stop)
        with pytest.raises(KeyboardInterrupt):
            tune(search(names=("learning_rate",), trials=2), show=str)
    trials = tune(search(names=("learning_rate",), trials=2), show=str)
    assert [trial.value is not None for trial in trials] == [True, True]


class FixedTrial:
    """Chooses each setting's lowest or first value."""

    def suggest_float(self, name, low, high, log=False):
        return low

    def suggest_int(self, name, low, high):
        return high

    def suggest_categorical(self, name, options):
        return options[0]


def test_every_searchable_setting_is_one_and_its_values_are_valid(small):
    args = small(total_timesteps=10_000).resolve("tests/Aim-v0")
    chosen = {name: space(FixedTrial(), args) for name, space in SPACES.items()}
    resolved = classic.PPO("tests/Aim-v0", classic.PPOArgs(**{**vars(small()), **chosen, "num_minibatches": 2})).args
    assert {name: getattr(resolved, name) for name in chosen if name != "num_minibatches"} == {
        name: value for name, value in chosen.items() if name != "num_minibatches"
    }
    assert chosen["gamma"] == 1 - 1e-4 and chosen["num_steps"] == 512  # four rollouts of four copies in 10,000 steps


def test_minibatches_are_as_many_as_a_rollout_can_fill(search):
    args = _settings(search(), {"num_steps": 16, "num_minibatches": 64}, seed=3)
    assert args.num_minibatches == 4 * 8 and args.seed == 3  # NEXT_STEP may spend every second step
    recurrent = search(args=classic.PPOArgs(num_envs=4, recurrent="gru"))
    assert _settings(recurrent, {"num_minibatches": 64}, seed=0).num_minibatches == 4


def test_the_best_settings_become_a_file_to_train_with(search, tmp_path, capsys):
    chosen = {"learning_rate": 0.01, "num_steps": 32, "hidden_sizes": (8, 8)}
    made = search()
    made.folder.mkdir()
    _write_best(made, Trial(5, 4.5, chosen))
    file = made.folder / "best.yaml"
    assert "The best of 3 trials on tests/Match-v0: trial 5, mean return 4.5 over one seed." in file.read_text()
    words = ["train", "tests/Match-v0", "--config", str(file), "--output-dir", str(tmp_path / "run"), "--quiet"]
    assert main([*words, "--eval-episodes", "2"]) == 0
    saved = classic.PPO.load(tmp_path / "run").args
    assert (saved.learning_rate, saved.num_steps, saved.hidden_sizes, saved.gamma) == (0.01, 32, (8, 8), 0.5)


def test_bad_input_is_one_sentence(search, capsys, monkeypatch):
    with pytest.raises(ValueError, match=r"tune needs --trials, the number of settings to try"):
        TuneCommand(env="CartPole-v1")
    with pytest.raises(ValueError, match="seeds must be 1 or more, got 0"):
        TuneCommand(env="CartPole-v1", trials=1, seeds=0)
    assert main(["tune", "CartPole-v1", "--trials", "2", "--search", "learning_rat"]) == 2
    assert "search='learning_rat' cannot be searched; did you mean 'learning_rate'?" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["tune", "CartPole-v1", "--trials", "2"]) == 2
    assert INSTALL in capsys.readouterr().err


def test_an_unknown_environment_is_refused_before_a_folder_is_made(search, capsys):
    pytest.importorskip("optuna", reason=INSTALL)
    with pytest.raises(ValueError, match="cannot make environment 'CartPol-v1'"):
        tune(search(env="CartPol-v1"))
    assert not search().folder.exists()


def test_the_command_line_searches_and_shows_the_best_beside_the_settings_as_they_are(tmp_path, capsys):
    pytest.importorskip("optuna", reason=INSTALL)
    words = ["tune", "tests/Match-v0", "--trials", "2", "--output-dir", str(tmp_path), "--total-timesteps", "64"]
    words += [
        "--num-envs",
        "2",
        "--num-steps",
        "8",
        "--num-minibatches",
        "2",
        "--eval-episodes",
        "2",
        "--search",
        "gamma",
    ]
    assert main([*words, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "2 trials" in out and "the settings as they are" in out and "gamma=" in out
    assert f"best     {tmp_path / 'best.yaml'}" in out


def test_the_settings_as_they_are_are_measured_although_that_trial_was_interrupted(search, monkeypatch):
    pytest.importorskip("optuna", reason=INSTALL)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("classic.tune._score", stop)
        with pytest.raises(KeyboardInterrupt):
            tune(search(trials=2), show=str)
    trials = tune(search(trials=2), show=str)
    assert sorted(bool(trial.settings) for trial in trials) == [False, True]


@pytest.mark.parametrize(
    ("names", "words"), [((), "search is empty, so every trial would be the same"), (("log_std_init",), "log_std_init")]
)
def test_an_impossible_search_is_refused_before_a_folder_is_made(names, words, search):
    pytest.importorskip("optuna", reason=INSTALL)
    with pytest.raises(ValueError, match=words):
        tune(search(names=names))
    assert not search().folder.exists()
