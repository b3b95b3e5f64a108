"""Run the commands of `classic-ppo`; their arguments are in cli.py."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from classic import compare as comparison
from classic import demonstrations
from classic import tune as search_settings
from classic.callbacks import evaluate_every, stop_at_return
from classic.cli import (
    CompareCommand,
    EvaluateCommand,
    ExplainCommand,
    ExportCommand,
    PushCommand,
    RecordCommand,
    TrainCommand,
    TuneCommand,
)
from classic.config import SCHEDULES, PPOArgs, filled
from classic.envs.errors import BrokenEnvironmentError
from classic.export import CHECKED
from classic.export import export as export_policy
from classic.hub import push_to_hub
from classic.ppo import PPO
from classic.schedules import is_function
from classic.video import record_video
from rlhf_ppo.runtime.checkpoints.checkpoint import list_checkpoints
from rlhf_ppo.runtime.errors import RunError, print_failure
from rlhf_ppo.runtime.machine.signals import Interrupted
from rlhf_ppo.runtime.report.heat import Told, explained_rows, make_views
from rlhf_ppo.runtime.report.page import write_heat_page

EXPLAINED_COPIES = 8
"""Environment copies that a page of `explain` shows."""


def train(command: TrainCommand) -> int:
    """Run `classic-ppo train ENV`: learn, save, evaluate, print where everything is.

    Returns:
        The exit code: 0, 1 for a run that failed, 130 after Ctrl-C, 143 after SIGTERM; the agent is saved in any case.
    """
    given = _args(command)
    given["output_dir"] = command.output_dir or f"runs/{_file_name(command.env)}-seed{command.seed}"
    agent = PPO(command.env, PPOArgs(**given))
    if command.warm_start is not None:
        learned = demonstrations.clone(agent, command.warm_start, epochs=command.warm_start_epochs)
        if not command.quiet:
            losses = f"{learned['loss_before']:.3f} -> {learned['loss_after']:.3f} nats"
            print(
                f"imitated {learned['steps']:,} steps of {command.warm_start}: -log pi(a|s) {losses}", file=sys.stderr
            )
    callbacks = [evaluate_every(command.eval_every, episodes=command.eval_episodes)] if command.eval_every else []
    callbacks += [] if command.stop_at_return is None else [stop_at_return(command.stop_at_return)]
    start, seconds, result = time.perf_counter(), 0.0, {}

    def save_and_evaluate(agent: PPO, metrics: Mapping[str, float]) -> None:
        nonlocal seconds, result
        seconds = time.perf_counter() - start
        agent.save(given["output_dir"])
        result = agent.evaluate(episodes=command.eval_episodes)
        evaluation = {f"eval/{key}": value for key, value in result.items()}
        agent.log({"progress/env_steps": agent.counters["env_steps"], **evaluation})
        if command.report:
            record_still(agent, Path(given["output_dir"]))

    try:
        agent.learn(
            callbacks=callbacks,
            at_end=save_and_evaluate,
            resume_from_checkpoint=command.resume,
            resume_override=command.resume_override,
        )
    except Interrupted as stop:
        print(f"{stop}; {_rescued(agent.network, agent.save, given['output_dir'])}", file=sys.stderr)
        return stop.exit_code
    except (RunError, OSError) as error:
        if agent.counters["iteration"] == 0:
            raise  # nothing was learned, or it was not even begun
        code = print_failure(error)
        print(_rescued(agent.network, agent.save, given["output_dir"]), file=sys.stderr)
        return code
    folder = given["output_dir"]
    table = Table(title=f"{command.env}: {agent.counters['env_steps']:,} steps in {seconds:.1f} s", show_header=False)
    for row in _result_rows(result, command.eval_episodes):
        table.add_row(*row)
    for what, file in (
        *(("model", "model.safetensors"), ("metrics", "metrics.jsonl"), ("curve", "curve.png")),
        ("report", "report.html"),
    ):
        if what != "report" or command.report:
            table.add_row(what, str(Path(folder) / file))
    _print(table)
    return 0


def evaluate(command: EvaluateCommand) -> None:
    """Run `classic-ppo evaluate FOLDER`: play episodes with a saved agent."""
    agent = PPO.load(command.folder, network=command.network)
    agent.args = dataclasses.replace(agent.args, num_threads=command.num_threads or agent.args.num_threads)
    result = agent.evaluate(command.episodes, deterministic=command.deterministic, seed=command.seed, env=command.env)
    table = Table(title=f"{command.env or agent.env_id} from {command.folder}", show_header=False)
    for row in _result_rows(result, command.episodes):
        table.add_row(*row)
    if command.video is not None:
        seed = 0 if command.seed is None else command.seed
        table.add_row("video", str(record_video(agent, command.video, seed=seed, deterministic=command.deterministic)))
    _print(table)


def explain(command: ExplainCommand) -> None:
    """Run `classic-ppo explain FOLDER`: rewards, values, advantages and ratios of one more update."""
    agent = PPO.load(command.folder, network=command.network)
    named = {name: getattr(agent.args, name) for name in SCHEDULES if is_function(getattr(agent.args, name))}
    if named:  # a page to look at an agent must not run what its folder names
        said = ", ".join(f"{name}={schedule!r}" for name, schedule in named.items())
        print(f"explained with constant instead of {said}: code that a folder names is not run", file=sys.stderr)
    constant: dict[str, Any] = dict.fromkeys(named, "constant")
    agent.args = dataclasses.replace(agent.args, output_dir=None, save_every=0, quiet=True, **constant)
    explanation = agent.learn(1).explain()  # one step rounds up to one rollout
    print(explanation.text(command.max_rows))
    if command.picture is not None:
        print(f"picture  {explanation.plot(command.picture)}")
    if command.html is not None:
        copies = sorted({row["sequence"] for row in explanation.rows})[:EXPLAINED_COPIES]
        told = [Told(explained_rows(explanation, copy, quoted=False), f"Copy {copy}") for copy in copies]
        lead = f"One more update of the agent in {command.folder}; the first {len(told)} environment copies"
        print(f"page     {write_heat_page(command.html, make_views(told), heading='Step by step', lead=lead)}")


def compare(command: CompareCommand) -> int:
    """Run `classic-ppo compare ENV --vary ...`: train the missing runs, then print the table and draw the picture."""
    args = PPOArgs(**_args(command))
    folder = Path(command.output_dir or f"runs/compare-{_file_name(command.env)}")
    changes = comparison.read_variants(command.vary)
    try:
        variants = comparison.compare(
            command.env, args, changes, seeds=command.seeds, episodes=command.eval_episodes, folder=folder
        )
    except KeyboardInterrupt as stop:
        print(f"interrupted; finished runs stay in {folder}; the same command continues from there", file=sys.stderr)
        return stop.exit_code if isinstance(stop, Interrupted) else 130
    table = Table(title=f"{command.env}, {max(variant.env_steps for variant in variants):,} steps a run")
    for column in ("variant", "seeds", "IQM of the return [95 %]", "mean +- standard error", "worst seed"):
        table.add_column(column)
    for row in comparison.rows(variants):
        table.add_row(*row)
    picture = comparison.draw(variants, folder / "comparison.png", title=command.env)
    _print(table)
    print(f"curves   {picture}")
    return 0


def record_still(agent: PPO, folder: Path) -> None:
    """Record a few moments of an episode for the report, where the environment has pictures."""
    try:
        record_video(agent, folder / "still.png")
    except (BrokenEnvironmentError, ModuleNotFoundError, ValueError, OSError):
        return  # the report says that there is none, and how to make one


def tune(command: TuneCommand) -> None:
    """Run `classic-ppo tune ENV --trials N`: the missing trials, then the best beside the settings as they are."""
    folder = Path(command.output_dir or f"runs/tune-{_file_name(command.env)}")
    search = search_settings.Search(
        env=command.env,
        args=PPOArgs(**{**_args(command), "output_dir": None}),
        names=command.search,
        trials=filled(command.trials),
        seeds=command.seeds,
        evaluations=command.evaluations,
        episodes=command.eval_episodes,
        folder=folder,
    )
    try:
        trials = search_settings.tune(search, show=(lambda line: None) if command.quiet else print)
    except KeyboardInterrupt:
        print(f"interrupted; finished trials stay in {folder}; the same command continues from there", file=sys.stderr)
        raise
    table = Table(title=f"{command.env}, {len(trials)} trials")
    for column in ("trial", "mean return", "settings"):
        table.add_column(column)
    for trial in [*trials[:5], *(trial for trial in trials[5:] if not trial.settings)]:
        value = "stopped early" if trial.value is None else f"{trial.value:.1f}"
        table.add_row(str(trial.number), value, search_settings.describe(trial.settings))
    _print(table)
    if trials[0].value is None:
        print("best     none: every trial was stopped early or diverged")
        return
    print(
        f"best     {folder / search_settings.BEST}; train with it: classic-ppo train {command.env} --config that file"
    )


def record(command: RecordCommand) -> None:
    """Run `classic-ppo record FOLDER FILE`: demonstrations of a saved agent."""
    agent = PPO.load(command.folder, network=command.network)
    file = demonstrations.record(
        agent, command.file, episodes=command.episodes, seed=command.seed, deterministic=command.deterministic
    )
    print(f"{command.episodes} episodes of {agent.env_id} in {file}; classic-ppo train ENV --warm-start {file}")


def export(command: ExportCommand) -> None:
    """Run `classic-ppo export FOLDER FILE`: the policy as ONNX or TorchScript."""
    file = export_policy(PPO.load(command.folder, network=command.network), command.file)
    print(f"{file}: checked on {CHECKED} random observations")


def push(command: PushCommand) -> None:
    """Run `classic-ppo push FOLDER USER/NAME`: the agent, its card and a video on the hub."""
    agent = PPO.load(command.folder, network=command.network)
    print(push_to_hub(agent, command.repo_id, private=command.private, video=command.video, episodes=command.episodes))


def _rescued(network: nn.Module, save: Callable[[str], Path], folder: str) -> str:
    """Save the agent of a run that ended early; return where it is and how to resume."""
    if not all(parameter.isfinite().all() for parameter in network.parameters()):
        said = "the agent was not saved: its weights are non-finite"
    else:
        try:
            said = f"the agent was saved in {save(folder)}"
        except OSError as error:  # most likely the full disk that ended the run
            said = f"the agent could not be saved: {error}"
    # Without save_every there are checkpoints only if a signal came.
    return said + ("; --resume auto continues" if list_checkpoints(folder) else "")


def _args(command: PPOArgs) -> dict[str, Any]:
    return {field.name: getattr(command, field.name) for field in dataclasses.fields(PPOArgs)}


def _file_name(env_id: str) -> str:
    return env_id.replace("/", "-").replace(":", "-")


def _result_rows(result: dict[str, float], episodes: int) -> list[tuple[str, str]]:
    return [
        (f"mean return, {episodes} episodes", f"{result['mean_return']:.1f} +- {result['std_return']:.1f}"),
        ("mean length, steps", f"{result['mean_length']:.1f}"),
    ]


def _print(table: Table) -> None:
    plain: dict[str, Any] = {"markup": False, "emoji": False}  # a name may hold [/x] or :x:
    console = Console(**plain)
    # A pipe or a log has no width: a path must not be wrapped there.
    (console if console.is_terminal else Console(width=200, **plain)).print(table)
