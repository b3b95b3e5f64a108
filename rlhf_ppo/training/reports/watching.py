"""Watching: ask judges about some responses, warn of symptoms while a run trains, or stop it."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping

from rlhf_ppo.config.rlhf import RLHFConfig
from rlhf_ppo.config.run_groups import SafetySettings
from rlhf_ppo.generation.rollout import Rollout
from rlhf_ppo.rewards.scoring import score_responses, total_score
from rlhf_ppo.rewards.validation import RewardError
from rlhf_ppo.runtime.diagnosis.advice import Advice, in_words
from rlhf_ppo.runtime.diagnosis.run_watch import RunWatch
from rlhf_ppo.runtime.diagnosis.symptoms import WATCHED
from rlhf_ppo.runtime.errors import UnhealthyRunError
from rlhf_ppo.runtime.logs.lines import LOGGER, warn_once
from rlhf_ppo.runtime.seeding import global_rng_state, restore_rng_state
from rlhf_ppo.training.experience import Estimates
from rlhf_ppo.training.recorded.token_records import record_tokens
from rlhf_ppo.training.rollouts.collect import decoding_of, responses_of
from rlhf_ppo.training.run import Run
from rlhf_ppo.training.stability import require_no_drift
from rlhf_ppo.training.state import TrainState


def observe(state: TrainState, run: Run, rollout: Rollout, estimates: Estimates, args: RLHFConfig) -> dict[str, float]:
    """Record a rollout's tokens where that is due, and ask the judges; returns their metrics."""
    with run.stopwatch.phase("record"):
        record_tokens(state, run, rollout, estimates, args)
    return ask_judges(run, rollout)


def ask_judges(run: Run, rollout: Rollout) -> dict[str, float]:
    """Have the judges score ``judge_responses`` of a rollout's responses; {} without judges.

    A judge that fails is warned of, once, and missing in the metrics: it must not end a run that is not trained on it.
    """
    if not run.judges:
        return {}
    count = len(rollout.prompts)
    rows = list(range(0, count, max(1, count // run.args.judge_responses)))[: run.args.judge_responses]
    # What judges draw from global generators must not shift what the run draws.
    generators = global_rng_state()
    with run.stopwatch.phase("judge"):
        try:
            scores = score_responses(
                run.judges,
                responses_of(rollout).take(rows),
                decode_of=decoding_of(run, rollout, rows),
                timeout_s=run.args.reward_timeout_s,
                needs_scores=False,
                processes=run.processes,
                own=run.processes.block(len(rows)),
            )
        except RewardError as error:
            warn_once(f"judge failed, and the run goes on: {error}")
            return {}
        finally:
            restore_rng_state(generators)
    means: dict[str, float] = {}
    for name, given in scores.items():
        totals = [total for score in given if (total := total_score(score)) is not None]
        if totals:
            means[name] = statistics.fmean(totals)
    if not means:
        return {}
    parts = {f"judge/part/{name}": mean for name, mean in means.items()} if len(run.judges) > 1 else {}
    return {"judge/score_mean": statistics.fmean(means.values()), **parts}


def begin_watch(run: Run, before: RunWatch | None = None) -> RunWatch | None:
    """Start watching a run, or the rest of one that is resumed, or rolled back (``before``); None: it is not watched.

    What watch.jsonl holds is not said again, except what may stop the run.
    """
    if run.args.watch == "off" or not run.processes.first:
        return None
    settings = {**dataclasses.asdict(run.args), "fingerprints": {"bf16": run.bf16}}
    rows = run.folder.read("watch.jsonl")
    stops = WATCHED if run.args.watch == "stop" else run.args.stop_on
    said = [row.get("rule", "") for row in rows if row.get("symptom") not in stops]
    return RunWatch(settings, run.folder.read(), said, 0 if before is None else before.updates)


def require_health(run: Run, watch: RunWatch | None, metrics: Mapping[str, float], args: SafetySettings) -> None:
    """Check the settings' bounds; warn of the symptoms that an update's metrics confirm, and write watch.jsonl.

    Raises:
        PolicyDriftError: the metrics are outside the bounds.
        UnhealthyRunError: a symptom stops the run, on all processes.
    """
    require_no_drift(metrics, args)
    if run.args.watch == "off":
        return

    def look() -> list[str]:
        finite = {name: x for name, x in metrics.items() if math.isfinite(x)}
        found = [] if watch is None else watch.add(finite)
        for advice in found:
            _report(run, advice, int(metrics["progress/iteration"]))
        return [in_words(a) for a in found if run.args.watch == "stop" or a.rule.watched in run.args.stop_on]

    stops = run.processes.on_first(look)
    if stops:
        raise UnhealthyRunError(stops[0])


def _report(run: Run, advice: Advice, iteration: int) -> None:
    changes = {setting: {"now": now, "try": better} for setting, (now, better) in advice.changes.items()}
    row = {"symptom": advice.rule.watched, "rule": advice.rule.name, "seen": advice.seen, "try": changes}
    run.folder.append("watch.jsonl", {"iteration": iteration, **row})
    LOGGER.warning("after %d updates: %s", iteration, in_words(advice))
