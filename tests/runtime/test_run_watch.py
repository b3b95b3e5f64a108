"""The watch: it warns of each symptom once, soon after it begins, of none in a healthy run, and late symptoms too."""

from __future__ import annotations

import pytest

from rlhf_ppo import RLHFConfig
from rlhf_ppo.runtime.diagnosis.rules import RULES
from rlhf_ppo.runtime.diagnosis.run_watch import PATIENCE, RunWatch
from rlhf_ppo.runtime.diagnosis.symptoms import WATCHED

SETTINGS = {"total_episodes": 1000, "kl_coef": 0.1, "learning_rate": 3e-4, "kl_target": 6.0}
HEALTHY = {
    "policy/loss": -0.01,
    "policy/clip_fraction": 0.1,
    "policy/approx_kl": 0.01,
    "policy/entropy": 2.0,
    "value/explained_variance": 0.5,
    "value/return_mean": 1.0,
    "advantage/std": 1.0,
    "score/mean": 0.5,
    "score/std": 0.3,
    "kl/reference_nats_per_response": 5.0,
    "response/length_tokens": 30.0,
    "response/eos_fraction": 0.9,
    "response/repeated_fraction": 0.05,
    "judge/score_mean": 0.5,
}
BROKEN = {
    "no_signal": {"score/std": 0.0},
    "too_fast": {"policy/approx_kl": 0.2},
    "collapse": {"policy/entropy": 0.01},
    "critic": {"value/explained_variance": -0.5},
    "kl": {"kl/reference_nats_per_response": 20.0},
    "length": {"response/length_tokens": 90.0},
    "endless": {"response/eos_fraction": 0.1},
    "repetition": {"response/repeated_fraction": 0.7},
    "judge": {"judge/score_mean": 0.1, "score/mean": 0.9},
}


def watched(updates: int, broken: dict[str, float], since: int, settings=SETTINGS) -> list[tuple[int, str]]:
    """(update, symptom) of each warning in a run that is broken from an update on; scores alternate a little."""
    watch, found = RunWatch(settings), []
    for i in range(1, updates + 1):
        row = {**HEALTHY, **(broken if i >= since else {})}
        row["score/mean"] += 0.01 * (i % 2)
        row = {"progress/iteration": i, "progress/episodes": 10 * i, **row}
        found += [(i, str(advice.rule.watched)) for advice in watch.add(row)]
    return found


def test_a_healthy_run_is_not_warned_of():
    assert watched(60, {}, 0) == []


def test_every_watched_symptom_is_here():
    assert set(WATCHED) == {rule.watched for rule in RULES if rule.watched is not None} == set(BROKEN)


@pytest.mark.parametrize("name", BROKEN)
def test_a_symptom_that_begins_in_the_middle_is_warned_of_soon_and_once(name):
    ((update, symptom),) = {symptom: (i, symptom) for i, symptom in reversed(watched(80, BROKEN[name], 41))}.values()
    assert symptom == name and 41 + PATIENCE - 1 <= update <= 41 + 10 + PATIENCE


def test_each_rule_speaks_once():
    assert [name for _, name in watched(90, BROKEN["critic"], 0)] == ["critic"]


def test_a_passing_symptom_is_not_warned_of():
    watch = RunWatch(SETTINGS)
    for i in range(1, 40):
        row = {**HEALTHY, **(BROKEN["collapse"] if i in (20, 21) else {})}
        assert not watch.add({"progress/iteration": i, "progress/episodes": 10 * i, **row})


def test_a_resumed_run_is_compared_with_its_start_and_warned_again():
    earlier = [{"progress/iteration": i, "progress/episodes": 10 * i, **HEALTHY} for i in range(1, 31)]
    watch, found = RunWatch(SETTINGS, earlier), []
    for i in range(31, 61):
        row = {**HEALTHY, **BROKEN["length"]}
        found += watch.add({"progress/iteration": i, "progress/episodes": 10 * i, **row})
    (advice,) = found
    assert advice.rule.watched == "length" and advice.seen == "responses went from 30 to 90 tokens"


def test_the_critics_warm_up_does_not_count():
    settings = {**SETTINGS, "critic_warmup_rollouts": 30}
    assert watched(32, BROKEN["no_signal"], 0, settings) == []
    assert watched(60, BROKEN["no_signal"], 0, settings)


def test_an_agent_that_has_solved_its_task_may_be_certain_late_but_text_may_not():
    def warned(since: int, key: str) -> list[str]:
        watch, found = RunWatch({"total_timesteps": 1000}), []
        for i in range(1, 101):
            row = {"policy/loss": 0.0, "policy/entropy": 0.01 if i >= since else 1.0, key: 1.0 + 0.01 * (i % 2)}
            found += watch.add({"progress/iteration": i, "progress/env_steps": 10 * i, **row})
        return [advice.rule.watched for advice in found]

    assert warned(80, "episode/return_mean") == []
    assert warned(30, "episode/return_mean") == ["collapse"]
    assert warned(80, "score/mean") == ["collapse"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop_on": ("entropy",)}, "stop_on names 'entropy', which is no symptom: take some of no_signal, .* judge"),
        ({"stop_on": ("kl",), "watch": "stop"}, "watch='stop' stops at every symptom"),
        ({"stop_on": ("kl",), "watch": "off"}, "watch='off' looks for none"),
        ({"judge_responses": 0}, "judge_responses"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RLHFConfig(output_dir="x", **settings)


def test_what_was_said_before_is_not_said_again_and_a_rolled_back_run_goes_on_counting():
    earlier = [{"progress/iteration": i, "progress/episodes": 10 * i, **HEALTHY} for i in range(1, 31)]
    rule = next(rule for rule in RULES if rule.watched == "no_signal")
    broken = {**HEALTHY, **BROKEN["no_signal"]}
    rows = [{"progress/iteration": i, "progress/episodes": 10 * i, **broken} for i in range(31, 51)]
    watch = RunWatch(SETTINGS, earlier, [rule.name])
    assert not [found for row in rows for found in watch.add(row)]
    watch = RunWatch(SETTINGS, earlier, updates=rule.after)
    assert watch.updates == rule.after
    late = {**HEALTHY, **BROKEN["too_fast"], "policy/approx_kl": 5.0}
    found = [watch.add({"progress/iteration": i, "progress/episodes": 10 * i, **late}) for i in range(31, 41)]
    first = next(i for i, advice in enumerate(found, start=1) if advice)
    assert first == PATIENCE and not RunWatch(SETTINGS, earlier).add(rows[0])


@pytest.mark.parametrize(("same", "symptoms"), [(False, []), (True, ["no_signal"])])
def test_a_single_score_a_rollout_is_compared_over_updates(same, symptoms):
    watch, found = RunWatch({**SETTINGS, "rollout_batch_size": 1}), []
    for i in range(1, 31):
        row = {**HEALTHY, "score/std": 0.0, "score/mean": 0.5 if same else 0.5 + 0.1 * (i % 2)}
        found += watch.add({"progress/iteration": i, "progress/episodes": i, **row})
    assert [advice.rule.watched for advice in found] == symptoms


@pytest.mark.parametrize("size", [1, 8])
def test_scores_of_tokens_that_differ_in_place_alone_are_a_signal(size):
    settings = {**SETTINGS, "rollout_batch_size": size}
    watch = RunWatch(settings)
    for i in range(1, 31):
        row = {**HEALTHY, "score/std": 0.0, "score/token_std": 0.2}
        assert not watch.add({"progress/iteration": i, "progress/episodes": i, **row})
