"""`classic-ppo compare`: variants, resumption, the table and the picture."""

from __future__ import annotations

import json

import numpy as np
import pytest

import classic
from classic import compare as comparison
from classic.cli import main
from classic.compare import Variant, read_variants

SMALL = "--num-envs 4 --num-steps 16 --num-minibatches 2 --hidden-sizes 16 --total-timesteps 130 --quiet".split()


@pytest.fixture
def trained(monkeypatch):
    """Seeds and epochs of every run that was really trained."""
    runs = []

    class Recorded(classic.PPO):
        def learn(self, *args):
            runs.append((self.args.num_epochs, self.args.seed))
            return super().learn(*args)

    monkeypatch.setattr("classic.compare.PPO", Recorded)
    return runs


def test_variants_are_read_as_values_of_the_settings():
    assert read_variants(["num_epochs=1,4", "normalize_advantages=true,false"]) == [
        {"num_epochs": epochs, "normalize_advantages": flag} for epochs in (1, 4) for flag in (True, False)
    ]
    assert read_variants(["hidden_sizes=[64,64],[32]"]) == [{"hidden_sizes": (64, 64)}, {"hidden_sizes": (32,)}]
    assert read_variants(["learning_rate=1e-3,2e-3"]) == [{"learning_rate": 1e-3}, {"learning_rate": 2e-3}]
    assert read_variants(["target_kl=null,0.02"]) == [{"target_kl": None}, {"target_kl": 0.02}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["num_epoch=1,2"], "name of a setting, got 'num_epoch=1,2'"),
        (["num_epochs"], "name=value,value"),
        (["seed=1,2"], "name of a setting"),
        (["num_epochs="], "no value"),
        (["num_epochs=one,two"], "num_epochs=one,two: Input should be a valid integer"),
        (["num_epochs=2,true"], "num_epochs=2,true: Input should be a number, not true or false"),
        (["objective=clip,trpo"], "objective=clip,trpo: "),
        (["hidden_sizes=[1"], "not a list of values"),
        (["num_epochs=1", "num_epochs=2"], "num_epochs twice"),
    ],
)
def test_settings_that_cannot_vary_are_refused(words, message):
    with pytest.raises(ValueError, match="--vary") as caught:
        read_variants(words)
    assert message in str(caught.value)


def test_compare_trains_every_variant_and_seed_once_and_continues_where_it_stopped(trained, tmp_path, capsys):
    command = ["compare", "tests/Match-v0", "--vary", "num_epochs=1,3", "--seeds", "2", "--eval-episodes", "3", *SMALL]
    command += ["--output-dir", str(tmp_path)]
    assert main(command) == 0
    assert trained == [(1, 0), (3, 0), (1, 1), (3, 1)]  # seed by seed
    first = capsys.readouterr().out
    assert "num_epochs=1" in first and "num_epochs=3" in first and "comparison.png" in first
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "num_epochs=3" / "seed1" / "result.json").read_text())
    assert result["settings"]["seed"] == 1 and 0 <= result["mean_return"] <= 5

    (tmp_path / "num_epochs=3" / "seed1" / "result.json").unlink()  # as though the power had gone
    trained.clear()
    assert main(command) == 0
    assert trained == [(3, 1)]
    assert capsys.readouterr().out == first  # one seed, one result

    # As an earlier version wrote it, which had no normalize_values.
    del result["settings"]["normalize_values"]
    (tmp_path / "num_epochs=3" / "seed1" / "result.json").write_text(json.dumps(result))
    assert main(command) == 2
    assert "finished with normalize_values=False, now it is True" in capsys.readouterr().err

    trained.clear()
    assert main([*command, "--gamma", "0.5"]) == 2
    assert "finished with gamma=0.99, now it is 0.5" in capsys.readouterr().err and not trained


def test_a_damaged_result_is_named_with_what_to_do(trained, tmp_path, capsys):
    command = ["compare", "tests/Match-v0", "--vary", "num_epochs=1", "--seeds", "1", *SMALL]
    command += ["--output-dir", str(tmp_path)]
    result = tmp_path / "num_epochs=1" / "seed0" / "result.json"
    result.parent.mkdir(parents=True)
    for text, why in (("{", "Expecting property name"), ("{}", "it has no env_id, episodes, settings")):
        result.write_text(text)
        assert main(command) == 2
        err = capsys.readouterr().err
        assert f"{result} is damaged ({why}" in err and "remove it, and the run is repeated" in err


def test_a_run_under_another_preset_is_not_taken_for_this_one(trained, tmp_path, capsys, monkeypatch):
    command = ["compare", "tests/Match-v0", "--vary", "num_epochs=1", "--seeds", "1", *SMALL]
    assert main([*command, "--output-dir", str(tmp_path)]) == 0
    monkeypatch.setattr("classic.presets.resolve.preset", lambda *_: {"gamma": 0.9})
    assert main([*command, "--output-dir", str(tmp_path)]) == 2
    assert "finished with gamma=0.99, now it is 0.9" in capsys.readouterr().err


def test_contradicting_variants_are_refused_before_any_training(trained, tmp_path, capsys):
    command = ["compare", "tests/Match-v0", "--vary", "objective=clip,reinforce", "--gae-lambda", "0.5", *SMALL]
    assert main([*command, "--output-dir", str(tmp_path)]) == 2
    assert "gae_lambda=0.5" in capsys.readouterr().err and not trained


def test_rows_of_the_table(tmp_path):
    """Four runs: the IQM is the mean of the middle two; the standard error is std / 2."""
    (row,) = comparison.rows([Variant("a=1", [], np.array([0.0, 10.0, 20.0, 90.0]), 100)])
    assert row[0] == "a=1" and row[1] == "4" and row[2].startswith("15.0 [")
    assert row[3] == f"30.0 +- {np.std([0, 10, 20, 90], ddof=1) / 2:.1f}" and row[4] == "0.0"


def test_one_variant_twice_is_refused_before_any_training(trained, tmp_path, capsys):
    for words in ("num_epochs=1,1", "learning_rate=3e-4,0.0003"):
        assert main(["compare", "tests/Match-v0", "--vary", words, *SMALL, "--output-dir", str(tmp_path)]) == 2
        assert "two variants are" in capsys.readouterr().err and not trained


def test_checkpoint_settings_work_with_the_default_folder(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [
        "compare",
        "tests/Match-v0",
        "--vary",
        "target_kl=None,0.01",
        "--seeds",
        "1",
        "--save-every",
        "1",
        *SMALL,
    ]
    assert main(command) == 0
    assert list((tmp_path / "runs/compare-tests-Match-v0/target_kl=None/seed0").glob("checkpoint-*"))
    # Nor is a name cut where there is no terminal.
    assert "target_kl=0.01" in capsys.readouterr().out
