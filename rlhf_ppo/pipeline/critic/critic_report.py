"""Run `rlhf-ppo critic report`: say in words, a table and a picture what a critic's values are worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf_ppo.config.arguments.critic_fit import CriticReportArgs
from rlhf_ppo.pipeline.critic.analysis import (
    Evidence,
    calibrate,
    explain,
    explain_by_position,
    explains,
    position_baseline,
)
from rlhf_ppo.pipeline.critic.data import CriticData, all_rows, gather_evidence, load_critic_data, recorded_values
from rlhf_ppo.pipeline.critic.lambdas import compare_lambdas, supported_lambda, words_baseline
from rlhf_ppo.pipeline.critic.models import load_fitted
from rlhf_ppo.pipeline.critic.plot import plot_critic
from rlhf_ppo.runtime.files import replace_text
from rlhf_ppo.runtime.machine.threads import torch_threads
from rlhf_ppo.runtime.processes.join import join_for
from rlhf_ppo.runtime.processes.voice import first_alone

Report = dict[str, Any]


def report_critic(args: CriticReportArgs) -> Report:
    """Judge the values of a recording, or those of a fitted critic on it; write critic_report.json and .png.

    They go into the folder of the recording's run, or into the fitted critic's.

    Returns:
        What critic_report.json holds (see :func:`judge_critic`).
    Raises:
        FileNotFoundError, ValueError: a bad recording or critic, or the two do not fit; says which.
    """
    processes = join_for(args)
    data = load_critic_data([args.rollouts], gamma=args.gamma, kl_coef=args.kl_coef, last=args.last)
    rows, notes = all_rows(data), []
    if args.critic is None:
        values = recorded_values(data)
        notes += _fresh(data)
        title, folder = f"the values recorded in {args.rollouts}", Path(args.rollouts)
    else:
        reader, facts = load_fitted(args.critic, args, data)
        with torch_threads(args.num_threads, reader.model):
            values = reader.values(data.rollouts, rows)
        title, folder = f"the critic {args.critic} on {args.rollouts}", Path(args.critic)
        if set(facts.recordings) & set(data.folders):
            notes.append(_seen(facts.held_out["explained_variance"]))
    evidence = gather_evidence(data.rollouts, values, rows, data.gamma, args.seed)
    report = {**judge_critic(evidence, title), "notes": notes + _shortened(evidence, data)}
    processes.on_first(lambda: write_report(report, folder))
    return report


def _seen(held_out: float) -> str:
    return (
        "this critic was fitted on these rollouts, most of which it has seen: on those held out then it explained "
        f"{held_out:.1%} of the variance"
    )


def _fresh(data: CriticData) -> list[str]:
    fresh = sum(part.rollout.value_scale is None for part in data.rollouts)
    if not fresh:
        return []
    return [f"in {fresh} of {len(data.rollouts)} rollouts the value head was new: their values are the mean return"]


def _shortened(evidence: Evidence, data: CriticData) -> list[str]:
    taken, whole = len(evidence.mask), data.num_responses
    return [f"{taken} of {whole} responses were read, scored ones chosen at random"] if taken < whole else []


def judge_critic(evidence: Evidence, title: str) -> Report:
    """Judge values against the returns that followed.

    Returns:
        title, responses, tokens, gamma; ``critic`` and ``baselines`` (see :func:`.explain`), ``by_tenth`` and
        ``by_position`` (:func:`.explain_by_position`), ``calibration`` (:func:`.calibrate`), ``lambdas``
        (:func:`.compare_lambdas`) and ``supported_lambda``.
    """
    mask, fold = evidence.mask, evidence.fold
    returns = evidence.returns[mask]
    words, brought = words_baseline(evidence)
    critic, lambdas = explain(evidence.values[mask], returns, fold), compare_lambdas(evidence, brought)
    bins, slope = calibrate(evidence)
    return {
        "title": title,
        "responses": len(mask),
        "tokens": len(returns),
        "gamma": evidence.gamma,
        "critic": critic,
        "baselines": {
            "position": explain(position_baseline(evidence), returns, fold),
            "words": explain(words, returns, fold),
        },
        "by_tenth": explain_by_position(evidence, relative=True),
        "by_position": explain_by_position(evidence, relative=False),
        "calibration": {"bins": bins, **slope},
        "lambdas": lambdas,
        "supported_lambda": supported_lambda(lambdas, critic),
    }


def write_report(report: Report, folder: Path) -> None:
    """Write critic_report.json and critic_report.png."""
    replace_text(folder / "critic_report.json", json.dumps(report, indent=2) + "\n")
    plot_critic(report, folder / "critic_report.png")


def say_report(report: Report) -> list[str]:
    """Say a report in sentences."""
    critic, tenths = report["critic"], report["by_tenth"]
    return [
        f"{report['title']}: {report['responses']} responses, {report['tokens']} tokens",
        *report.get("notes", []),
        _say_explained(critic),
        *_say_baselines(critic, report["baselines"], report["responses"]),
        "explained variance from the first to the last tenth of a response: "
        + ", ".join(f"{row['explained_variance']:.0%}" for row in tenths),
        _say_calibration(report["calibration"], critic),
        _say_lambda(report["lambdas"], report["supported_lambda"], critic),
    ]


def _say_explained(critic: dict[str, float]) -> str:
    share, off = critic["explained_variance"], critic["standard_error"]
    errors = f"its values are off by {critic['error']:.3g}, the mean return by {critic['error_of_mean']:.3g}"
    if explains(critic):
        return f"it explains {share:.1%} (± {off:.1%}) of the variance of the returns: {errors}"
    return f"it explains nothing ({share:.1%} ± {off:.1%} of the variance of the returns): {errors}"


def _say_baselines(critic: dict[str, float], baselines: dict[str, dict[str, float]], responses: int) -> list[str]:
    position, words = (baselines[name] for name in ("position", "words"))
    lines = [
        f"the mean return at each position explains {position['explained_variance']:.1%}, a linear model of the words "
        f"so far {words['explained_variance']:.1%}"
    ]
    gap = words["explained_variance"] - critic["explained_variance"]
    noise = 2 * (words["standard_error"] + critic["standard_error"])
    if gap > noise:
        lines.append("so there is more to learn than this critic has: train it longer, at a higher rate, or fit one")
    elif not explains(words) and not explains(critic):
        lines.append(
            f"so neither explains more than chance would in {responses} responses: record more, or a critic has little "
            "to learn here"
        )
    return lines


def _say_calibration(calibration: dict[str, Any], critic: dict[str, float]) -> str:
    slope, error = calibration["slope"], calibration["standard_error"]
    kind = "too far apart" if slope < 1 else "too close together"
    kind = "calibrated" if abs(slope - 1) <= 2 * error else kind
    side = "high" if critic["offset"] > 0 else "low"
    way = "higher" if slope >= 0 else "lower"
    return (
        f"where a value is higher by 1, returns are {way} by {abs(slope):.2f} (± {error:.2f}): values are {kind}; on "
        f"average they are {abs(critic['offset']):.3g} (± {critic['offset_error']:.2g}) too {side}"
    )


def _say_lambda(rows: list[dict[str, float]], supported: float, critic: dict[str, float]) -> str:
    if not explains(critic):
        return "it supports gae_lambda=1: values that explain nothing only add their errors below it"
    best = max(rows, key=lambda row: row["alignment"])["lambda"]
    return (
        f"it supports gae_lambda={supported:g}: the largest whose advantages go with what words bring as well as the "
        f"best's ({best:g}), within one standard error"
    )


def lambda_table(rows: list[dict[str, float]]) -> Table:
    """Return the lambdas as a table."""
    table = Table(title="advantages under each lambda, ± standard error", title_justify="left")
    table.add_column("lambda", justify="right")
    for heading in ("mean bias", "squared bias (≥)", "variance", "alignment"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row['lambda']:g}",
            f"{row['mean_bias']:+.2g} ± {row['mean_bias_error']:.1g}",
            *(f"{row[name]:.1%} ± {row[f'{name}_error']:.1%}" for name in ("squared_bias", "variance")),
            f"{row['alignment']:.3f} ± {row['alignment_error']:.3f}",
        )
    return table


def report_command(args: CriticReportArgs) -> None:
    """Run the `critic report` command."""
    report = report_critic(args)
    with first_alone():
        if args.json:
            print(json.dumps(report, indent=2))
            return
        for line in say_report(report):
            print(line)
        console = Console()
        console.print(lambda_table(report["lambdas"]))
        said = "bias and variance are shares of the variance under lambda 1, which has no bias"
        print(f"{said}; see docs/critic-laboratory.md")
        folder = args.rollouts if args.critic is None else args.critic
        print(f"report   {folder}/critic_report.json, critic_report.png")
