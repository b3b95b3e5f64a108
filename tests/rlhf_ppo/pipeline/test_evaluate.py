"""Evaluation: measures known in advance, the run's reference and sampling settings, the judge, bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_ppo import RewardModel
from rlhf_ppo.cli import main
from rlhf_ppo.pipeline.evaluation.evaluate import EvaluateArgs, evaluate, print_evaluation
from rlhf_ppo.rewards.validation import RewardError

REWARDS = """
def vowels(prompts, completions, **columns):
    return [sum(c in 'aeiou' for c in t) for t in completions]

def length(prompts, completions, **columns):
    return [len(t) for t in completions]

def odd(prompts, completions, **columns):
    return [None if n % 2 else 1.0 for n in columns["number"]]

def nothing(prompts, completions, **columns):
    return [None for _ in completions]
"""


@pytest.fixture
def folder(tmp_path, make_model, tokenizer, monkeypatch) -> Path:
    """Two models, a reward file and ten prompts with numbers."""
    for name, seed in (("first", 0), ("second", 1)):
        make_model(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "reward.py").write_text(REWARDS)
    rows = [{"prompt": f"the {word}", "number": i} for i, word in enumerate("abcdefghij")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def quick(folder):
    def args(**settings) -> EvaluateArgs:
        small = {"reward": ("reward.py:vowels",), "dataset": "prompts.jsonl", "max_new_tokens": 5, "device": "cpu"}
        return EvaluateArgs(
            **{**small, "precision": "fp32", "batch_size": 4, "quiet": True, "output_dir": "e", **settings}
        )

    return args


def test_a_model_against_itself_ties_everywhere(quick):
    """Same weights, same draws: no KL, no difference, every prompt a tie."""
    report = evaluate(quick(model="first", ref_model="first"))
    assert report["win_rate"]["mean"] == 0.5 and report["win_rate"]["ties"] == report["prompts"] == 10
    assert all(value == {"mean": pytest.approx(0, abs=1e-5), "half_width": pytest.approx(0, abs=1e-5)}
               for value in report["difference"].values())  # fmt: skip
    assert report["model"]["distinct-2"] == report["against"]["distinct-2"]


def test_measures_are_those_of_the_samples(quick):
    report = evaluate(quick(model="second", ref_model="first", reward=("reward.py:vowels", "reward.py:length")))
    rows = [json.loads(line) for line in Path("e/evaluation_samples.jsonl").read_text().splitlines()]
    assert json.loads(Path("e/evaluation.json").read_text()) == json.loads(json.dumps(report))
    for side in ("model", "against"):
        vowels = [sum(c in "aeiou" for c in row[side]["completion"]) for row in rows]
        assert report[side]["reward: vowels"]["mean"] == pytest.approx(sum(vowels) / 10)
        assert [row[side]["rewards"]["length"] for row in rows] == [len(row[side]["completion"]) for row in rows]
    kl = report["model"]["KL to the reference, nats per response"]
    assert kl["mean"] > 0.5
    assert report["against"]["KL to the reference, nats per response"]["mean"] == pytest.approx(0, abs=1e-5)
    # Without a judge the sum of the rewards decides.
    wins = [row["model"]["score"] > row["against"]["score"] for row in rows]
    ties = [row["model"]["score"] == row["against"]["score"] for row in rows]
    assert report["win_rate"]["mean"] == pytest.approx((sum(wins) + 0.5 * sum(ties)) / 10)


def test_the_judge_decides_and_counts_for_no_reward(quick):
    report = evaluate(quick(model="second", ref_model="first", judge="reward.py:odd"))
    assert report["win_rate"]["judged"] == report["win_rate"]["ties"] == 5  # None on odd numbers, 1 on even ones
    assert not report["judge_was_trained_on"]
    rows = [json.loads(line) for line in Path("e/evaluation_samples.jsonl").read_text().splitlines()]
    assert rows[0]["model"]["score"] == rows[0]["model"]["rewards"]["vowels"]


def test_a_nonfinite_score_is_an_error_or_left_out(quick):
    """On odd numbers it is NaN."""
    Path("reward.py").write_text(REWARDS.replace("None if n % 2", "float('nan') if n % 2"))
    asked = {"model": "second", "ref_model": "first", "reward": ("reward.py:odd",)}
    with pytest.raises(RewardError, match="set drop_nonfinite_scores"):
        evaluate(quick(**asked))
    assert evaluate(quick(**asked, drop_nonfinite_scores=True))["win_rate"]["judged"] == 5


def test_reference_and_sampling_settings_come_from_the_run(folder, quick):
    (folder / "second" / "run.json").write_text(
        json.dumps({"model": "first", "ref_model": None, "temperature": 0.5, "max_new_tokens": 3, "reward": ["a:b"]})
    )
    report = evaluate(quick(model="second", max_new_tokens=None))
    assert report["reference"] == report["against"]["name"] == "first"
    assert report["model"]["length, tokens"]["mean"] <= 3
    # With a judge named in run.json, the win rate says that it was trained on.
    (folder / "second" / "run.json").write_text(json.dumps({"model": "first", "reward": ["reward.py:length"]}))
    assert evaluate(quick(model="second", judge="reward.py:length"))["judge_was_trained_on"]


def test_the_runs_reward_is_read_and_weighted_as_in_training(folder, quick, make_classifier, tokenizer):
    """With its chat template; a reward that the run did not have reads plain text."""
    make_classifier().save_pretrained("judge")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }}.{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained("judge")

    def score(**settings):
        asked = {"model": "second", "reward": ("judge", "reward.py:length"), **settings}
        report = evaluate(quick(**asked))
        rows = [json.loads(line)["model"] for line in Path("e/evaluation_samples.jsonl").read_text().splitlines()]
        return report, [row["rewards"]["judge"] for row in rows], [row["score"] for row in rows]

    settings = {"model": "first", "reward": ["judge", "reward.py:length"], "reward_weights": [1.0, 0.5]}
    Path("second/run.json").write_text(json.dumps({**settings, "reward_chat_template": "tokenizer"}))
    report, as_trained, sums = score()
    rows = [json.loads(line) for line in Path("e/evaluation_samples.jsonl").read_text().splitlines()]
    texts = [(row["prompt"], row["model"]["completion"]) for row in rows]
    chat = RewardModel("judge", chat_template="tokenizer")(*map(list, zip(*texts, strict=True)))
    assert as_trained == pytest.approx(chat, abs=1e-5) and report["judge_was_trained_on"]
    lengths = [len(completion) for _, completion in texts]
    assert sums == pytest.approx([a + 0.5 * b for a, b in zip(chat, lengths, strict=True)], abs=1e-5)

    # Beside another reward nothing says how the sum was weighed; where only others judge, it was not trained on them.
    _, again, sums = score(reward=("judge", "reward.py:vowels"))
    assert again == as_trained
    assert not score(judge="reward.py:odd")[0]["judge_was_trained_on"]
    Path("second/run.json").write_text(json.dumps({"model": "first", "reward": ["reward.py:odd"]}))
    report, as_text, _ = score()
    assert not report["judge_was_trained_on"] and as_text != pytest.approx(chat, abs=1e-3)
    assert score(reward_chat_template="tokenizer")[1] == pytest.approx(chat, abs=1e-5)


def test_another_opponent_keeps_the_reference(quick):
    report = evaluate(quick(model="first", ref_model="first", against="second"))
    assert report["model"]["KL to the reference, nats per response"]["mean"] == pytest.approx(0, abs=1e-5)
    assert report["against"]["KL to the reference, nats per response"]["mean"] > 0.5


def test_a_trained_run_and_an_adapter_evaluate_and_generate(folder, capsys):
    train = (
        "train --model first --reward reward.py:vowels --dataset prompts.jsonl --output-dir run --total-episodes 4 "
        "--rollout-batch-size 4 --max-new-tokens 4 --eval-size 0 --device cpu --num-minibatches 2"
    )
    flags = "evaluate --model run --reward reward.py:vowels --dataset prompts.jsonl --output-dir e --device cpu"
    for extra in ([], ["--lora-rank", "2"]):
        assert main([*train.split(), *extra]) == 0
        capsys.readouterr()
        assert main([*flags.split(), "--num-prompts", "6"]) == 0
        shown = capsys.readouterr().out
        assert "6 prompts, 95 % intervals" in shown and "win rate" in shown and "distinct-3" in shown
        assert "trained on the reward that judges here" in " ".join(shown.split())
        assert main(["generate", "--model", "run", "--prompt", "a cat", "--max-new-tokens", "3"]) == 0
        assert "a cat|" in capsys.readouterr().out


def test_names_with_brackets_are_shown_as_they_are(capsys):
    figure = {"mean": 1.0, "half_width": None}
    side = {"reward: r[/x]": figure, "distinct-1": 0.1, "distinct-2": 0.1, "distinct-3": 0.1}
    rate = {"mean": 0.5, "low": 0.4, "high": 0.6, "judged": 2, "ties": 0}
    report = {"prompts": 2, "judge": None, "judge_was_trained_on": False, "win_rate": rate}
    report |= {"model": {"name": "m/t[/y]", **side}, "against": {"name": "[bold]", **side}}
    print_evaluation({**report, "difference": {"reward: r[/x]": figure}}, console=Console(width=200))
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("reward: r[/x]", "m/t[/y]", "[bold]"))


def test_runs_from_python_say_what_they_started_from(make_trainer, tmp_path, make_model, tokenizer):
    make_model().save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    trainer = make_trainer(model=str(tmp_path / "start"), total_episodes=8)
    trainer.train()
    assert json.loads((trainer.run.path / "run.json").read_text())["model"] == str(tmp_path / "start")


@pytest.mark.parametrize(
    ("against", "message"),
    [
        ("nowhere", "model 'nowhere' cannot be loaded"),
        ("other", r"vocabularies differ, in tokens: model \(first\) 30, reference \(first\) 30, against \(other\) 31"),
    ],
)
def test_the_opponent_is_checked_before_any_prompt_is_sampled(quick, make_model, monkeypatch, against, message):
    make_model(vocab_size=31).save_pretrained("other")
    monkeypatch.setattr("rlhf_ppo.pipeline.evaluation.evaluate.sample", lambda *_: pytest.fail("sampled"))
    with pytest.raises(ValueError, match=message):
        evaluate(quick(model="first", ref_model="first", against=against))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--model nowhere", "model 'nowhere' cannot be loaded"),
        ("--model second", "does not say what it was trained from"),
        ("--model nowhere --ref-model first", "model 'nowhere' cannot be loaded"),
        ("--prompt-column promt --ref-model first", "did you mean 'prompt'"),
        ("--dataset none.jsonl --ref-model first", "none.jsonl does not exist"),
        ("--dataset empty.jsonl --ref-model first", "has no rows"),
        ("--judge reward.py:odds --ref-model first", "has no function 'odds'"),
        ("--judge reward.py:nothing --ref-model first", "scored no pair of responses"),
        ("--max-new-tokens 64 --ref-model first", "leaves no room for a prompt"),
        ("--ref-model first", None),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(folder, capsys, change, message):
    Path("empty.jsonl").write_text("")
    flags = "--model first --reward reward.py:vowels --dataset prompts.jsonl --output-dir e --device cpu".split()
    given = change.split()
    for name, value in zip(given[::2], given[1::2], strict=True):
        if name in flags:
            flags[flags.index(name) + 1] = value
        else:
            flags += [name, value]
    if "--max-new-tokens" not in flags:
        flags += ["--max-new-tokens", "4"]
    code = main(["evaluate", *flags])
    error = capsys.readouterr().err
    if message is None:
        assert code == 0
    else:
        assert code == 2 and re.search(f"^error: .*{message}", error, flags=re.MULTILINE), error


def test_a_reward_that_fails_ends_with_exit_code_1(folder, capsys):
    Path("reward.py").write_text("def vowels(prompts, completions, **columns):\n    return ['a'] * len(completions)\n")
    flags = "evaluate --model first --ref-model first --reward reward.py:vowels --dataset prompts.jsonl --device cpu"
    assert main(flags.split()) == 1
    assert "vowels" in capsys.readouterr().err


GAME = """
def reply(messages):
    return None if len(messages) > 4 else " and"

def turns(prompts, completions, conversations, **columns):
    return [sum(m["role"] == "assistant" for m in messages) for messages in conversations]
"""


@pytest.mark.parametrize("chat", [False, True])
def test_a_model_trained_with_turns_is_evaluated_with_them(folder, quick, tokenizer, chat):
    """The run says how many turns and who answers; its reply ends each conversation after the third of five turns."""
    (folder / "game.py").write_text(GAME)
    run = {"model": "first", "max_turns": 5, "respond": "game.py:reply", "respond_timeout_s": 9.0}
    (folder / "second" / "run.json").write_text(json.dumps(run))
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'][0] + m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}a{% endif %}"
        )
        for name in ("first", "second"):
            tokenizer.save_pretrained(folder / name)
        rows = [{"prompt": [{"role": "user", "content": f"the {word}"}]} for word in "abcdef"]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = evaluate(quick(model="second", reward=("game.py:turns",), max_new_tokens=3))
    assert report["model"]["turns"]["mean"] == report["model"]["reward: turns"]["mean"] == 3
    assert 0 < report["model"]["distinct-1"] <= 1
    once = evaluate(quick(model="second", max_turns=1))
    assert "turns" not in once["model"]


def test_several_turns_without_respond_are_refused(folder, quick):
    (folder / "second" / "run.json").write_text(json.dumps({"model": "first", "max_turns": 3}))
    with pytest.raises(ValueError, match=r"max_turns=3 needs respond.*second does not name them"):
        evaluate(quick(model="second"))
    with pytest.raises(ValueError, match=r"respond is given, but max_turns=1"):
        (folder / "game.py").write_text(GAME)
        evaluate(quick(model="second", max_turns=1, respond="game.py:reply"))
