"""What a run records about its tokens: the update's own numbers, once for each rollout, and bounded."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch

from rlhf_ppo.runtime.logs.lines import LOGGER
from rlhf_ppo.runtime.logs.tables import read_table, table_numbers
from rlhf_ppo.training.recorded.token_records import is_recorded
from rlhf_ppo.training.reports.reporting import log_traffic


def contents(folder):
    return {
        f"{name}/{file.name}": file.read_bytes()
        for name in ("tokens", "responses")
        for file in (folder / name).iterdir()
    }


def test_tokens_have_the_numbers_of_their_update(make_trainer):
    trainer = make_trainer(total_episodes=8, samples_per_rollout=3, kl_coef=0.5, gamma=0.9)
    trainer.train()
    folder = trainer.run.path
    tokens, responses = (read_table(folder, name, 1) for name in ("tokens", "responses"))
    samples = trainer.run.read("samples.jsonl")
    assert responses["response"] == list(range(8)) and sorted(set(tokens["response"])) == [0, 1, 2]
    for i, sample in enumerate(samples):
        rows = [t for t, response in enumerate(tokens["response"]) if response == i]
        text = "".join(tokens["text"][t] for t in rows).removesuffix("<|endoftext|>")
        assert sample["completion"] == text and len(rows) == responses["tokens"][i] == sample["tokens"]
        assert sum(tokens["kl"][t] for t in rows) == pytest.approx(responses["kl"][i], abs=1e-5)
        # The rewards add up to the score, minus what the KL cost.
        paid = sum(tokens["reward"][t] for t in rows)
        assert paid == pytest.approx(sample["score"] - 0.5 * sample["kl_nats"], abs=1e-5)
        last = rows[-1]
        assert tokens["delta"][last] == pytest.approx(tokens["reward"][last] - tokens["value"][last], abs=1e-5)
    assert all(
        a == pytest.approx(x - y, abs=1e-5)
        for a, x, y in zip(*(tokens[n] for n in ("kl", "logprob", "ref_logprob")), strict=True)
    )
    # The update moved the policy: its ratios are those afterwards.
    assert any(abs(ratio - 1) > 1e-4 for ratio in tokens["ratio"])


def test_recording_changes_no_weight_and_no_draw(make_trainer):
    runs = [make_trainer(total_episodes=24, record_tokens_every=every) for every in (0, 1)]
    for trainer in runs:
        trainer.train()
    assert not (runs[0].run.path / "tokens").exists() and len(contents(runs[1].run.path)) == 6
    ours, theirs = (trainer.run.read() for trainer in runs)
    assert ours == theirs
    for (name, x), y in zip(runs[0].model.state_dict().items(), runs[1].model.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_about_twenty_rollouts_are_recorded_however_long_the_run(make_trainer):
    args = make_trainer().args
    for rollouts, most in ((1, 1), (20, 20), (48, 17), (1000, 21)):
        long = type(args)(**{**vars(args), "total_episodes": rollouts * args.rollout_batch_size})
        recorded = [i for i in range(1, rollouts + 1) if is_recorded(long, i)]
        assert recorded[0] == 1 and recorded[-1] == rollouts and len(recorded) == most


def test_a_resumed_run_records_what_the_whole_one_does(make_trainer, tmp_path):
    whole = make_trainer(total_episodes=32, save_every=1)
    whole.train()
    killed = make_trainer(total_episodes=32, save_every=1)
    killed.callbacks.append(lambda trainer, metrics: trainer.state.iteration == 3)
    killed.train()
    again = make_trainer(total_episodes=32, save_every=1, output_dir=str(killed.run.path))
    again.train(resume_from_checkpoint=str(killed.run.path / "checkpoint-2"))
    assert table_numbers(again.run.path, "tokens") == [1, 2, 3, 4]
    assert contents(again.run.path) == contents(whole.run.path)
    elsewhere = make_trainer(total_episodes=32, save_every=1, output_dir=str(tmp_path / "elsewhere"))
    elsewhere.train(resume_from_checkpoint=str(killed.run.path / "checkpoint-2"))
    assert contents(elsewhere.run.path) == contents(whole.run.path)


def test_a_run_ends_with_its_report(make_trainer, pictures, capsys):
    trainer = make_trainer(total_episodes=8, quiet=False)
    trainer.train()
    assert f"report: {trainer.run.path / 'report.html'}" in capsys.readouterr().err
    page = (trainer.run.path / "report.html").read_text()
    assert "Token by token" in page and "Too early to tell" in page
    without = make_trainer(total_episodes=8, report=False)
    without.train()
    assert not (without.run.path / "report.html").exists()


def test_a_full_disk_ends_no_run(make_trainer, monkeypatch):
    from rlhf_ppo.training.recorded import token_records

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_records, "write_table", full)
    trainer = make_trainer(total_episodes=8)
    with pytest.warns(UserWarning, match="rollout 1 are not recorded: No space left"):
        trainer.train()
    assert len(trainer.run.read()) == 1


def test_no_failure_of_recording_ends_a_run(make_trainer, monkeypatch):
    from rlhf_ppo.training.recorded import token_records

    def broken(*_):
        raise ValueError("mixed types")

    monkeypatch.setattr(token_records, "write_table", broken)
    trainer = make_trainer(total_episodes=8)
    with pytest.warns(UserWarning, match="rollout 1 are not recorded: ValueError: mixed types"):
        trainer.train()
    assert len(trainer.run.read()) == 1


def test_an_update_is_logged_whatever_observing_it_does(make_trainer, monkeypatch):
    def broken(*_):
        raise RuntimeError("judges are out")

    monkeypatch.setattr("rlhf_ppo.trainer.observe", broken)
    trainer = make_trainer(total_episodes=16)
    with pytest.raises(RuntimeError, match="judges are out"):
        trainer.train()
    assert [row["progress/iteration"] for row in trainer.run.read()] == [1]
    assert (trainer.run.path / "checkpoint-1").is_dir()


def test_a_picture_that_cannot_be_drawn_ends_no_run(make_trainer, pictures):
    trainer = make_trainer(total_episodes=8)
    (trainer.run.path / "curve.png").mkdir(parents=True)
    with pytest.warns(UserWarning, match="curve.png could not be drawn"):
        trainer.train()
    assert (trainer.run.path / "report.html").is_file()


def test_traffic_is_counted_over_rows_of_these_processes_alone(make_trainer, caplog):
    trainer = make_trainer(quiet=False)
    state, run = trainer.state, trainer.fixed
    for row in ({}, {"exchanged_bytes": 9e9}, {"exchanged_bytes": 1e6}, {"exchanged_bytes": 3e6}):
        run.folder.append("timings.jsonl", {"iteration": len(run.folder.read("timings.jsonl")) + 1, **row})
    several = dataclasses.replace(run, processes=types.SimpleNamespace(alone=False))
    with caplog.at_level("INFO", logger=LOGGER.name):
        log_traffic(state, several, since=3)
        assert not caplog.messages
        log_traffic(state, several, since=2)
    assert "each process contributed 2 MB an update" in caplog.text


def test_longer_responses_that_score_higher_show(make_trainer, prompts):
    trainer = make_trainer(reward_funcs=lambda prompts, completions, **_: [float(len(text)) for text in completions])
    metrics = trainer.step(trainer.rollout(prompts))
    assert metrics["score/length_correlation"] > 0.9 and 0 < metrics["response/distinct_2"] <= 1
    constant = make_trainer(reward_funcs=lambda prompts, completions, **_: [1.0] * len(completions))
    with pytest.warns(UserWarning, match="constant reward"):
        assert "score/length_correlation" not in constant.step(constant.rollout(prompts))
