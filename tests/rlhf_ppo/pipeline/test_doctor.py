"""The doctor: each finding is seen, by a reward or a setting made for it; nothing is left behind; exit codes; JSON."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import random
import re
import time
from pathlib import Path

import pytest

from rlhf_ppo.cli import main
from rlhf_ppo.config.arguments.doctor import DoctorArgs
from rlhf_ppo.config.engine import in_process
from rlhf_ppo.pipeline.doctor.arithmetic import rollout_in_words
from rlhf_ppo.pipeline.doctor.findings import Section
from rlhf_ppo.pipeline.doctor.preflight import check_folder, check_trackers, histogram
from rlhf_ppo.pipeline.doctor.reward import examine_reward
from rlhf_ppo.verify.subject import small_run

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def share(letters: str):
    def reward(prompts, completions, **columns):
        return [sum(letter in letters for letter in text) / (1 + len(text)) for text in completions]

    return reward


early = share(LETTERS[:13])


def good(prompts, completions, **columns):
    """The share of early letters, in an answer of its own and of at most twelve characters."""
    return [sum(letter < "n" for letter in text) / len(text) if allowed(prompts, text) else 0.3 for text in completions]


def allowed(prompts, text) -> bool:
    return 1 <= len(text) <= 12 and text not in prompts and text.isascii() and not set(text) & set("<.\\")


@pytest.fixture
def probe(make_trainer):
    """``probe(reward, **settings)``: the section about a reward, asked about 8 prompts with 4 responses each."""

    def examine(*rewards, **settings) -> Section:
        trainer = make_trainer(reward_funcs=list(rewards), **{"max_new_tokens": 12, **settings})
        section = Section("Reward")
        examine_reward(section, trainer.fixed, trainer.model, 8, 4)
        return section

    return examine


def said(section: Section, level: str) -> str:
    return "\n".join(f"{f.what} -> {f.remedy}" for f in section.findings if f.level == level)


def test_a_good_reward_has_nothing_against_it(probe):
    section = probe(good)
    assert {f.level for f in section.findings} == {"ok"}, section.findings
    ok = said(section, "ok")
    assert (
        "of the prompts can teach (their responses differ in score)" in ok and "scores a response alike each time" in ok
    )
    assert "responses end by themselves" in ok and "nats of KL a response (kl_coef=0.05)" in ok
    assert "none of the cheap tricks that were tried pays" in ok
    (answers, sides) = section.pages
    assert "\nempty                     0.3" in answers and "prompt: " in sides
    assert "best, " in sides and "worst, " in sides
    assert section.facts["responses"] == 32 and section.facts["exploits"] == []


def test_a_constant_reward_stops(probe):
    assert "every response scored 1: there is nothing to learn" in said(probe(lambda p, c: [1.0] * len(c)), "stop")


def test_a_reward_of_the_prompt_alone_stops(probe):
    section = probe(lambda p, c: [float(len(prompt)) for prompt in p])
    assert "no prompt's responses differ in score, so none can teach -> take prompts" in said(section, "stop")


def test_few_prompts_that_can_teach_are_warned_of(probe):
    def one(prompts, completions):
        pairs = zip(prompts, completions, strict=True)
        return [float(sum(map(ord, text))) if prompt == "dog and cow" else 0.0 for prompt, text in pairs]

    section = probe(one)
    assert "only 12% of the prompts can teach" in said(section, "warning"), section.findings


def test_a_random_reward_stops_and_a_noisy_one_is_warned_of(probe):
    draws = random.Random(0)
    section = probe(lambda p, c: [draws.random() for _ in c])
    assert "what PPO would learn from is chance" in said(section, "stop")
    section = probe(lambda p, c: [early([], [text])[0] + 0.02 * draws.random() for text in c])
    assert "scores the same response differently each time, by up to 0.0" in said(section, "warning")


def test_a_reward_that_depends_on_its_neighbours_is_warned_of(probe):
    def ranked(prompts, completions, **columns):
        best = early([], completions[:8])
        return [score - best[0] for score in early([], completions)]

    section = probe(ranked)
    assert "or by what it is scored beside -> seed it" in said(section, "warning")


def test_what_pays_is_said_in_words(probe):
    longer = probe(lambda p, c: [float(len(text)) for text in c])
    assert "score and length correlate by 1.00 within prompts" in said(longer, "warning")
    assert longer.facts["exploits"][0] == "to write longer"
    shorter = probe(lambda p, c: [-float(len(text)) for text in c])
    assert {"to write shorter", "to answer nothing"} <= set(shorter.facts["exploits"])
    assert "PPO would learn to write shorter, to answer nothing" in said(shorter, "warning")

    def paying(trick):
        return probe(lambda p, c: [x + trick(*pair) for x, *pair in zip(good(p, c), p, c, strict=True)]).facts[
            "exploits"
        ]

    assert paying(lambda prompt, text: prompt in text) == ["to repeat the prompt"]
    assert paying(lambda prompt, text: "<answer>" in text) == ["to write tags without content"]
    assert paying(lambda prompt, text: text.count((text.split() or ["-"])[0]) > 3) == [
        "to say the same again and again"
    ]
    assert paying(lambda prompt, text: "boxed" in text) == ["to box nothing"]
    assert paying(lambda prompt, text: text.isspace() or text == "...") == ["to write punctuation without words"]


@pytest.mark.parametrize(
    ("reward", "settings", "message"),
    [
        (lambda p, c: [float("nan")] * len(c), {}, "scored nan for prompt"),
        (lambda p, c: 1 / 0, {}, "raised ZeroDivisionError"),
        (lambda p, c: [1.0], {}, "returned 1 scores; expected 32 numbers"),
        (lambda p, c: time.sleep(5), {"reward_timeout_s": 0.05}, "did not return within reward_timeout_s=0.05"),
        (lambda p, c: [None] * len(c), {}, "scored none of the responses"),
    ],
)
def test_a_reward_that_fails_stops(probe, reward, settings, message):
    assert message in said(probe(reward, **settings), "stop")


class Game:
    """Rewards words of early letters, in one turn."""

    def reset(self, row):
        return f"say {row['prompt']}"

    def step(self, messages):
        return None, early([], [messages[-1]["content"]])[0], True


class BrokenGame(Game):
    def step(self, messages):
        raise ZeroDivisionError("no score")


GAMES = {"train_dataset": [{"prompt": word} for word in "the cat sat on a mat by night".split()], "reward_funcs": None}


def examine_game(make_trainer, game) -> Section:
    trainer = make_trainer(environment=game, max_new_tokens=12, max_turns=2, **GAMES)
    section = Section("Reward")
    examine_reward(section, trainer.fixed, trainer.model, 8, 4)
    return section


def test_an_environment_that_gives_the_reward_is_read_once(make_trainer):
    section = examine_game(make_trainer, Game)
    assert not said(section, "stop") and "of the prompts can teach" in said(section, "ok")
    assert section.facts["agreement_of_two_scorings"] == {}


def test_an_environment_that_fails_stops(make_trainer):
    (finding,) = examine_game(make_trainer, BrokenGame).findings
    assert finding.level == "stop" and "ZeroDivisionError: no score" in finding.what
    assert "failed_rollout" not in finding.what and "mend the environment" in finding.remedy


def test_scores_that_differ_by_token_alone_can_teach(probe):
    def placed(at):
        def reward(prompts, completions, completion_ids, **_):
            return [[float(i == at(ids)) for i in range(len(ids))] for ids in completion_ids]

        return reward

    somewhere, last = placed(lambda ids: sum(ids) % len(ids)), placed(lambda ids: len(ids) - 1)
    section = probe(somewhere)
    assert not said(section, "stop") and "every response scored 1 in sum, but their tokens" in said(section, "ok")
    assert "every response scored 1: there is nothing to learn" in said(probe(last), "stop")


def test_a_server_of_the_run_is_left_alone():
    run = {"generation": "vllm", "vllm_url": "http://127.0.0.1:9", "importance_weight_mode": "mask"}
    settings = {"model": "m", "reward": ["r"], "dataset": "d", "output_dir": "o", "rollouts_ahead": 1, **run}
    args = DoctorArgs(**settings)
    here = dataclasses.replace(args, **in_process(vars(args)))
    assert (here.generation, here.vllm_url, here.rollouts_ahead) == ("auto", None, 0)
    assert here.importance_level(foreign=False) == args.importance_level(foreign=False) == "token"
    assert small_run(args, 16, 64)["generation"] == "auto" and in_process(vars(here)) == {}


def test_a_reward_that_fails_on_an_odd_answer_is_warned_of(probe):
    section = probe(lambda p, c: [early([], [text])[0] + 0 / len(text) for text in c], min_new_tokens=2)
    assert "scoring the answer '' (empty) fails: reward function '<lambda>' raised ZeroDivisionError" in said(
        section, "warning"
    )


def test_unscored_responses_are_counted(probe):
    section = probe(lambda p, c: [None if i % 4 == 0 else early([], [text])[0] for i, text in enumerate(c)])
    assert "of the responses were not scored, and teach nothing" in said(section, "warning")


def test_a_slow_reward_is_most_of_an_iteration(probe, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("rlhf_ppo.pipeline.doctor.probe.time.perf_counter", lambda: clock[0])

    def slow(prompts, completions, **columns):
        clock[0] += 64.0
        return early(prompts, completions)

    section = probe(slow)
    assert "a rollout of 8 responses takes 16 s to score, 0 s to sample: the reward is most of it" in said(
        section, "warning"
    )


def test_the_scale_of_scores_is_compared_with_the_kl(probe):
    big = probe(lambda p, c: [1000 * x for x in early(p, c)])
    assert "the KL will hold nothing back -> set normalize_scores" in said(big, "warning")
    small = probe(lambda p, c: [0.001 * x for x in early(p, c)])
    assert "the KL will outweigh the reward" in said(small, "warning")


def test_the_parts_of_a_mixture_are_weighed(probe):
    def late(prompts, completions, **columns):
        return [1 - x for x in early(prompts, completions)]

    def tiny(prompts, completions, **columns):
        return [0.001 * x for x in share("aeiou")(prompts, completions)]

    section = probe(early, late, reward_weights=(1.0, 0.5))
    assert "reward and late disagree (correlation -1.00)" in said(section, "warning")
    assert section.facts["mixture"]["shares"] == pytest.approx({"reward": 2 / 3, "late": 1 / 3})
    assert "tiny is hardly heard -> set reward_weights, or normalize_scores" in said(probe(early, tiny), "warning")


def test_responses_that_never_end_or_end_at_once_are_warned_of(probe):
    assert "0% of 32 responses end by themselves, the rest at 12 tokens" in said(
        probe(early, stop_token_ids=(0,), min_new_tokens=12), "warning"
    )
    section = probe(
        lambda p, c, completion_ids: [float(ids[0]) for ids in completion_ids], stop_token_ids=(*range(30),)
    )
    assert "after 1.0 tokens -> check the prompts' form" in said(section, "warning")


# The whole command


@pytest.fixture
def words(tmp_path, make_model, tokenizer) -> list[str]:
    """The flags of a small run."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "reward.py").write_text(
        "def early(prompts, completions):\n"
        "    return [sum('a' <= x < 'n' for x in text) / (1 + len(text)) for text in completions]\n"
    )
    rows = [{"prompt": text} for text in ("once upon", "the cat", "a", "dog and cow", "she said", "blue", "no", "why")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--model {tmp_path}/model --reward {tmp_path}/reward.py:early --dataset {tmp_path}/prompts.jsonl"
    flags += f" --output-dir {tmp_path}/run --total-episodes 64 --rollout-batch-size 8 --eval-size 0"
    return f"{flags} --max-new-tokens 12 --stop-token-ids 0 12 16 20 --device cpu --precision fp32".split()


def test_a_run_is_examined_and_nothing_is_left_behind(words, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main(["doctor", *words]) == 0
    said = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    for text in (
        "8 responses = 16 optimizer steps of 2 responses, 4 epochs",
        "8 rollouts = 64 responses = 128 optimizer steps",
        "8 prompts, 8 a rollout: each is seen 8 times",
        "30 tokens; the model has 30",
        "8 prompts of 1 to 11 tokens, median ",
        "responses end at '<|endoftext|>', ",
        "GB of disk (0 checkpoints)",
        "fits. What breaks first when it grows: ",
        "the run's 8 about ",
        "0 reasons to stop",
    ):
        assert text in said, text


def test_a_run_that_cannot_learn_ends_with_1_also_as_json(words, tmp_path, capsys):
    (tmp_path / "reward.py").write_text("def early(prompts, completions):\n    return [1.0 for _ in completions]\n")
    assert main(["doctor", *words, "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["can_start"] is False and said["sections"][0]["title"] == "Preflight"
    (stop,) = [f for section in said["sections"] for f in section["findings"] if f["level"] == "stop"]
    assert stop["what"].startswith("every response scored 1") and stop["remedy"]


def test_what_train_refuses_is_a_reason_to_stop(words, capsys):
    assert main(["doctor", *words, "--prompt-column", "question"]) == 1
    said = capsys.readouterr().out
    assert "stop" in said and "question" in said and "correct this first" in said
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", *words, "--probe-responses", "1"])
    assert "probe_responses" in capsys.readouterr().err


def test_the_folder_of_a_running_run_is_not_touched(words, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("{}\n")
    with (run / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["doctor", *words]) == 0
    assert "a run is writing into" in capsys.readouterr().out
    assert sorted(file.name for file in run.iterdir()) == ["metrics.jsonl", "run.lock"]


# Preflight


def preflight(check, *given) -> Section:
    section = Section("Preflight")
    check(section, *given)
    return section


def test_the_folder_is_looked_at(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "is a file -> name a folder as output_dir" in said(preflight(check_folder, f"{tmp_path}/file/run"), "stop")
    assert "can be written" in said(preflight(check_folder, f"{tmp_path}/a/b"), "ok")
    (tmp_path / "metrics.jsonl").write_text("")
    assert "will be kept in previous-<n>/" in said(preflight(check_folder, str(tmp_path)), "ok")
    monkeypatch.setattr("rlhf_ppo.pipeline.doctor.preflight.os.access", lambda *_: False)
    assert "cannot be written" in said(preflight(check_folder, str(tmp_path)), "stop")


def test_a_tracker_that_would_ask_is_warned_of(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    section = preflight(check_trackers, ("wandb", "tensorboard"))
    assert "wandb has no API key" in said(section, "warning") and "tracker tensorboard" in said(section, "ok")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert "tracker wandb" in said(preflight(check_trackers, ("wandb",)), "ok")
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "tracker wandb" in said(preflight(check_trackers, ("wandb",)), "ok")


def test_batches_are_said_in_words():
    def words(**settings) -> str:
        return rollout_in_words(DoctorArgs(model="x", reward=("r.py:f",), dataset=("d",), output_dir="o", **settings))

    assert words(rollout_batch_size=32, num_minibatches=4, num_epochs=2) == (
        "32 responses = 8 optimizer steps of 8 responses, 2 epochs"
    )
    assert words(num_generations=4, num_epochs=1) == (
        "32 responses (8 prompts x 4) = 4 optimizer steps of 8 responses, 1 epoch"
    )
    assert words(num_epochs=1, critic_epochs=3, critic_minibatches=2).endswith("1 epoch, then 4 of the critic alone")


def test_a_histogram_counts_every_number():
    drawn = histogram([1, 1, 2, 9, 30])
    counts = [int(line.split()[-1]) for line in drawn.splitlines()]
    assert sum(counts) == 5 and counts[0] == 3 and counts[-1] == 1
    assert histogram([7, 7]) == "7-7  " + "#" * 40 + " 2"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--eval-size", "4"], "4 prompts, 8 a rollout: each is seen 16 times, some of them several times in one"),
        (["--num-minibatches", "8"], "a minibatch holds 1 responses: its gradient is noisy"),
        (["--save-every", "1", "--save-total-limit", "2"], "(2 checkpoints)"),
    ],
)
def test_settings_that_are_unusual_are_remarked_on(words, capsys, settings, message):
    words = [word for word in words if word not in ("--eval-size", "0")] if settings[0] == "--eval-size" else words
    assert main(["doctor", *words, *settings, "--probe-prompts", "2", "--probe-responses", "2"]) in (0, 1)
    assert message in capsys.readouterr().out


def test_a_full_disk_stops(words, monkeypatch, capsys):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(1, 1, 1000)
    monkeypatch.setattr("rlhf_ppo.pipeline.doctor.preflight.shutil.disk_usage", lambda *_: usage)
    assert main(["doctor", *words, "--probe-prompts", "2", "--probe-responses", "2"]) == 1
    assert "of disk (0 checkpoints), and 1e-06 GB are free" in capsys.readouterr().out


def test_text_for_a_chat_model_and_chat_for_its_template(words, tmp_path, capsys):
    config = tmp_path / "model" / "chat_template.jinja"
    config.write_text("{% for m in messages %}{{ m['content'] }}.{% endfor %}")
    small = ["--probe-prompts", "2", "--probe-responses", "2"]
    assert main(["doctor", *words, *small]) in (0, 1)
    assert "the tokenizer has a chat template, but the prompts are plain text" in capsys.readouterr().out
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("the cat", "a dog")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["doctor", *words, *small]) in (0, 1)
    assert "the chat template ends a prompt in 'the cat.'" in capsys.readouterr().out
    # A row's own template variables are in what is shown and measured.
    config.write_text("{% for m in messages %}{{ m['content'] }}.{{ more }}{% endfor %}")
    rows = [{**row, "chat_template_kwargs": {"more": " " + "dog " * 5}} for row in rows]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = tmp_path / "reward.py"
    reward.write_text(reward.read_text().replace("completions):", "completions, **columns):"))
    assert main(["doctor", *words, *small]) in (0, 1)
    told = capsys.readouterr().out
    assert "dog dog '" in told and int(re.search(r"2 prompts of (\d+) to", told)[1]) > 20


def test_the_page_of_the_doctor_names_every_part():
    page = (Path(__file__).parents[3] / "docs" / "doctor.md").read_text(encoding="utf-8")
    for name in ("Preflight", "Reward", "Plan", "probe_prompts", "--json"):
        assert name in page
