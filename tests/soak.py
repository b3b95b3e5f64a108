"""Kills tiny runs again and again, resumes each with "auto", and compares its end with a run never killed.

``python tests/soak.py matrix`` kills at one file-system step of a run after another (every open, fsync, rename and
deletion in its folder, and tensors half written); ``python tests/soak.py random`` at random times and random steps.
Both do so with either frontend, print their figures and exit with 1 if anything was lost. The faults come from outside:
an audit hook, and a wrapped ``os.fsync`` and ``save_file``. With ``--processes 2`` the language model's runs have two
processes, of which either is killed; the other must end by itself.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import rlhf_ppo.runtime.checkpoints.stored_tensors
from rlhf_ppo.runtime.checkpoints.checkpoint import list_checkpoints, verify_checkpoint
from rlhf_ppo.runtime.processes.join import leave_processes

# Not an import: beside this file lies a folder rlhf_ppo, of tests, so that its folder is no place to import from.
FRONTENDS = runpy.run_path(str(Path(__file__).with_name("soak_runs.py")))["FRONTENDS"]
Train = Callable[[Path, int, int], None]


def in_children(count: int, work: Callable[[int, list[int]], None], log: Path) -> list[int]:
    """Fork ``count`` joined processes, run ``work(rank, pids)`` in each; return their process ids by rank.

    Imports are paid for once. The first process is forked last, and knows the ids of the others.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = [0] * count
    for rank in reversed(range(count)):
        launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        pids[rank] = in_child(partial(work, rank, pids), log, {name: str(x) for name, x in launch.items()})
    return pids


def in_child(work: Callable[[], None], log: Path, launch: dict[str, str]) -> int:
    """Fork, run ``work`` there as a launcher would, and return the child's process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(launch)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        work()
        code = 0
        leave_processes()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def steps_in(folder: Path, at_step: Callable[[int, str], None]) -> None:
    """Call ``at_step(number, what)`` before each file-system step of this process in ``folder``; for a child."""
    count = 0
    inside = str(folder.resolve())

    def step(what: str, *paths: object) -> None:
        nonlocal count
        names = [os.path.abspath(os.fsdecode(p)) for p in paths if isinstance(p, (str, bytes, os.PathLike))]
        if any(name.startswith(inside) for name in names):
            count += 1
            at_step(count, f"{what} {os.path.relpath(names[0], inside)}")

    def audit(event: str, args: tuple) -> None:
        if event == "open" and (args[2] & (os.O_WRONLY | os.O_RDWR) or args[1] not in ("r", "rb", None)):
            step("open", args[0])
        elif event in ("os.remove", "os.rmdir") and args[1] >= 0:  # rmtree names files relative to their folder
            step(event, os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), os.fsdecode(args[0])))
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
            step(event, *args[:2])

    fsync, save_file = os.fsync, rlhf_ppo.runtime.checkpoints.stored_tensors.save_file

    def fsync_step(handle: int) -> None:
        step("fsync", os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def torn_save(tensors, file, metadata=None) -> None:
        save_file(tensors, file, metadata)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])  # its open and this point: a file half written
        step("half of", file)
        save_file(tensors, file, metadata)

    sys.addaudithook(audit)
    os.fsync = fsync_step
    rlhf_ppo.runtime.checkpoints.stored_tensors.save_file = torn_save


def kill_at(number: int, victim: int) -> Callable[[int, str], None]:
    """Kill process ``victim`` (0: this one) at a step."""

    def at_step(count: int, what: str) -> None:
        if count == number:
            os.write(2, f"killed before step {count}: {what}\n".encode())
            os.kill(victim or os.getpid(), signal.SIGKILL)

    return at_step


def wait(pids: list[int]) -> list[int]:
    """The children's exit codes, negative for the signal that ended one."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def kept(run: Path) -> dict[str, bytes]:
    """What a run leaves: lines, weights, and all of its newest checkpoint but the manifest, which names the folder."""
    files = [*run.glob("*.jsonl"), *run.glob("*.safetensors"), *run.glob("best/*.safetensors")]
    files += [*run.glob("tokens/*.parquet"), *run.glob("responses/*.parquet"), *list_checkpoints(run)[-1].iterdir()]
    left = [file for file in files if file.name not in ("manifest.json", "timings.jsonl")]
    found = {str(file.relative_to(run)): file.read_bytes() for file in left}
    if "episodes.jsonl" in found:  # says how long each took
        found["episodes.jsonl"] = re.sub(rb'"seconds": [0-9.]+', b"", found["episodes.jsonl"])
    return found


def differences(run: Path, whole: Path) -> list[str]:
    """How a run's end differs from that of the run never killed: weights, moments, generators, environment, lines."""
    one, two = kept(run), kept(whole)
    wrong = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    for folder in list_checkpoints(run):
        wrong += [f"{folder.name}: {problem}" for problem in verify_checkpoint(folder)]
    return wrong


def newest(run: Path) -> int:
    """The step of a run's newest good checkpoint, -1 if there is none."""
    good = [folder for folder in list_checkpoints(run) if not verify_checkpoint(folder)]
    return int(good[-1].name.rpartition("-")[2]) if good else -1


def undisturbed(train: Train, folder: Path, rollouts: int, seed: int, log: Path, count: int) -> list[list[str]]:
    """Run without a kill; returns each process's file-system steps."""
    notes = [folder.with_suffix(f".steps{rank}") for rank in range(count)]

    def work(rank: int, pids: list[int]) -> None:
        handle = os.open(notes[rank], os.O_WRONLY | os.O_CREAT)
        steps_in(folder, lambda count, what: os.write(handle, f"{what}\n".encode()))
        train(folder, rollouts, seed)

    if any(wait(in_children(count, work, log))):
        sys.exit(f"the undisturbed run failed:\n{log.read_text()}")
    return [file.read_text().splitlines() for file in notes]


def one_of_each_kind(steps: list[str]) -> list[int]:
    """Numbers of the last step of each kind in a commit and its rotation: what is done, to which kind of folder."""
    commit = re.compile(r"(\S+).* (\.tmp-(?=\d)|\.tmp-old-|checkpoint-|\.$)")
    found = [(commit.match(what), number) for number, what in enumerate(steps, 1)]
    return sorted({kind.groups(): number for kind, number in found if kind}.values())


def of_commit(steps: list[str], number: int) -> list[int]:
    """Numbers of the steps of a checkpoint's commit, from its first file to the end of the rotation after it."""
    its = [i for i, what in enumerate(steps) if re.search(rf"\.tmp-{number}\b", what)]
    after = [i for i, what in enumerate(steps) if its and i > its[0] and ".tmp-old-" in what]
    return [i + 1 for i in range(its[0], max(its + after) + 1)] if its else []


def chosen_steps(steps: list[str], which: str, at: str, last: int) -> list[int]:
    """Numbers of the steps to kill at; ``last``: the last checkpoint's."""
    every = list(range(1, len(steps) + 1))
    numbers = {"all": every, "cover": one_of_each_kind(steps), "commit": of_commit(steps, last)}[which]
    return [number for number in numbers if re.search(at, steps[number - 1])]


def matrix(train: Train, root: Path, rollouts: int, seed: int, count: int, *, which: str, at: str) -> bool:
    """Kill at the chosen steps of the run, and each time resume to the end. Whether nothing was lost.

    Each process is killed at its own steps, and the others at those of the first.
    """
    log, started = root / "log.txt", time.monotonic()
    whole = root / "whole"
    steps = undisturbed(train, whole, rollouts, seed, log, count)
    cases = [
        (stepping, number, victim)
        for stepping, named in enumerate(steps)
        for number in chosen_steps(named, which, at, rollouts)
        for victim in (range(count) if stepping == 0 else [stepping])
    ]
    lost = 0
    for stepping, number, victim in cases:
        run = root / "run"
        shutil.rmtree(run, ignore_errors=True)

        def killed(
            rank: int, pids: list[int], run: Path = run, case: tuple[int, int, int] = (stepping, number, victim)
        ):
            if rank == case[0]:
                steps_in(run, kill_at(case[1], 0 if rank == case[2] else pids[case[2]]))
            train(run, rollouts, seed)

        codes = wait(in_children(count, killed, log))
        assert codes[victim] == -signal.SIGKILL, f"step {number} ended with {codes}:\n{log.read_text()}"
        named = steps[0][: number - 1] if stepping == 0 else []
        commits = [found[1] for what in named if (found := re.fullmatch(r"os.rename \.tmp-(\d+)", what))]
        newest_kept = newest(run)
        after = wait(in_children(count, lambda rank, pids, run=run: train(run, rollouts, seed), log))
        wrong = [f"exit codes {after}: {log.read_text()[-2000:]}"] if any(after) else differences(run, whole)
        wrong += [] if all(codes) else [f"a process did not end: {codes}"]
        if commits and newest_kept < int(commits[-1]):
            wrong.append(f"checkpoint-{commits[-1]} was committed, and the newest good one was {newest_kept}")
        if wrong:
            lost += 1
            print(f"process {victim} at step {number}, {steps[stepping][number - 1]}: {', '.join(wrong)}")
    shutil.rmtree(whole)
    seconds = time.monotonic() - started
    done = f"{len(cases)} kills at {sum(map(len, steps))} file-system steps of a run of {rollouts} rollouts"
    print(f"{done}{_by(count)} ({seconds:.0f} s): {lost} lost")
    return not lost


def _by(count: int) -> str:
    return f" by {count} processes" if count > 1 else ""


def random_kills(train: Train, root: Path, kills: int, rollouts: int, seed: int, count: int) -> bool:
    """Kill ``kills`` times, half at a random time and half at a random step, over as many runs as that takes."""
    draw = random.Random(seed)
    log, started = root / "log.txt", time.monotonic()
    done = runs = lost = 0
    while done < kills:
        whole, run = root / f"whole-{runs}", root / f"run-{runs}"
        begun = time.monotonic()
        undisturbed(train, whole, rollouts, runs, log, count)
        length = time.monotonic() - begun
        codes, last, fell_back = [-signal.SIGKILL], -1, []
        while -signal.SIGKILL in codes:
            by_time, victim = done < kills and draw.random() < 0.5, draw.randrange(count)
            number = draw.randrange(1, 150) if done < kills and not by_time else 0

            def work(rank: int, pids: list[int], run=run, number=number, seed=runs, victim=victim) -> None:
                if rank == 0:
                    steps_in(run, kill_at(number, pids[victim]))
                train(run, rollouts, seed)

            pids = in_children(count, work, log)
            if by_time:
                time.sleep(draw.uniform(0, length / 4))
                os.kill(pids[victim], signal.SIGKILL)  # a zombie, if it has ended by itself
            codes = wait(pids)
            done += -signal.SIGKILL in codes
            if newest(run) < last:
                fell_back.append(f"checkpoint-{last} was there and is lost")
            last = newest(run)
        wrong = [f"exit codes {codes}: {log.read_text()[-2000:]}"] if any(codes) else differences(run, whole)
        wrong += fell_back
        lost += bool(wrong)
        runs += 1
        print(f"run {runs}: {done} kills so far, {', '.join(wrong) or 'end bit-equal'}", flush=True)
        shutil.rmtree(whole)
        shutil.rmtree(run)
    minutes = (time.monotonic() - started) / 60
    of = f"{done} kills in {runs} runs of {rollouts} rollouts{_by(count)}"
    print(f"{of} ({minutes:.0f} min): {lost} runs lost or different")
    return not lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("matrix", "random"))
    parser.add_argument("--frontend", choices=tuple(FRONTENDS), help="this one alone")
    parser.add_argument(
        "--steps",
        choices=("all", "cover", "commit"),
        default="all",
        help="matrix: at each step of the run, at one of each kind in a commit, or at each of the last commit",
    )
    parser.add_argument("--at", default="", help="matrix: at steps that this regular expression finds alone")
    parser.add_argument("--kills", type=int, default=200, help="random: how many, of each frontend")
    parser.add_argument("--rollouts", type=int, help="length of a run (matrix: 3, random: 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="the language model's runs have so many")
    parser.add_argument("--sharding", default="none", help="how those share the weights: none, full")
    args = parser.parse_args()
    good = True
    chosen = [args.frontend] if args.frontend else ["language"] if args.processes > 1 else list(FRONTENDS)
    for name in chosen:
        print(f"{name}:")
        train = FRONTENDS[name](args.sharding) if name == "language" else FRONTENDS[name]()
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder).resolve()
            if args.mode == "matrix":
                given = {"which": args.steps, "at": args.at}
                good &= matrix(train, root, args.rollouts or 3, args.seed, args.processes, **given)
            else:
                good &= random_kills(train, root, args.kills, args.rollouts or 60, args.seed, args.processes)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
