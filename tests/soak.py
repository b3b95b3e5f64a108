"""Kills tiny runs again and again, resumes each with "auto", and compares its end with a run never killed.

``python tests/soak.py matrix`` kills at one file-system step of a run after another (every open, fsync, rename and
deletion in its folder, and tensors half written); ``python tests/soak.py random`` at random times and random steps.
Both do so with either frontend, print their figures and exit with 1 if anything was lost. The faults come from outside:
an audit hook, and a wrapped ``os.fsync`` and ``save_file``.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import rlhf_ppo.runtime.stored_tensors
from rlhf_ppo.runtime.checkpoint import list_checkpoints, verify_checkpoint

# Not an import: beside this file lies a folder rlhf_ppo, of tests, so that its folder is no place to import from.
FRONTENDS = runpy.run_path(str(Path(__file__).with_name("soak_runs.py")))["FRONTENDS"]
Train = Callable[[Path, int, int], None]


def in_child(work: Callable[[], None], log: Path) -> int:
    """Fork, run ``work`` there, and return the child's process id; imports are paid for once."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        work()
        code = 0
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

    fsync, save_file = os.fsync, rlhf_ppo.runtime.stored_tensors.save_file

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
    rlhf_ppo.runtime.stored_tensors.save_file = torn_save


def kill_at(number: int) -> Callable[[int, str], None]:
    """Die at a step."""

    def at_step(count: int, what: str) -> None:
        if count == number:
            os.write(2, f"killed before step {count}: {what}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    return at_step


def wait(pid: int) -> int:
    """The child's exit code, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kept(run: Path) -> dict[str, bytes]:
    """What a run leaves: lines, weights, and all of its newest checkpoint but the manifest, which names the folder."""
    files = [*run.glob("*.jsonl"), *run.glob("*.safetensors"), *run.glob("best/*.safetensors")]
    files += list_checkpoints(run)[-1].iterdir()
    left = [file for file in files if file.name not in ("manifest.json", "timings.jsonl")]
    return {str(file.relative_to(run)): file.read_bytes() for file in left}


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


def undisturbed(train: Train, folder: Path, rollouts: int, seed: int, log: Path) -> list[str]:
    """Run without a kill; returns its file-system steps."""
    notes = folder.with_suffix(".steps")

    def work() -> None:
        handle = os.open(notes, os.O_WRONLY | os.O_CREAT)
        steps_in(folder, lambda count, what: os.write(handle, f"{what}\n".encode()))
        train(folder, rollouts, seed)

    if wait(in_child(work, log)):
        sys.exit(f"the undisturbed run failed:\n{log.read_text()}")
    return notes.read_text().splitlines()


def one_of_each_kind(steps: list[str]) -> list[int]:
    """Numbers of the last step of each kind in a commit and its rotation: what is done, to which kind of folder."""
    commit = re.compile(r"(\S+).* (\.tmp-(?=\d)|\.tmp-old-|checkpoint-|\.$)")
    found = [(commit.match(what), number) for number, what in enumerate(steps, 1)]
    return sorted({kind.groups(): number for kind, number in found if kind}.values())


def matrix(train: Train, root: Path, rollouts: int, seed: int, *, cover: bool) -> bool:
    """Kill at every step of the run, or at one of each kind; each time resume to the end. Whether nothing was lost."""
    log, started = root / "log.txt", time.monotonic()
    whole = root / "whole"
    steps = undisturbed(train, whole, rollouts, seed, log)
    chosen = one_of_each_kind(steps) if cover else range(1, len(steps) + 1)
    lost = 0
    for number in chosen:
        run = root / "run"
        shutil.rmtree(run, ignore_errors=True)

        def killed(run: Path = run, number: int = number) -> None:
            steps_in(run, kill_at(number))
            train(run, rollouts, seed)

        code = wait(in_child(killed, log))
        assert code == -signal.SIGKILL, f"step {number} ended with {code}:\n{log.read_text()}"
        commits = [found[1] for what in steps[: number - 1] if (found := re.fullmatch(r"os.rename \.tmp-(\d+)", what))]
        newest_kept = newest(run)
        code = wait(in_child(lambda run=run: train(run, rollouts, seed), log))
        wrong = [f"exit code {code}: {log.read_text()[-2000:]}"] if code else differences(run, whole)
        if commits and newest_kept < int(commits[-1]):
            wrong.append(f"checkpoint-{commits[-1]} was committed, and the newest good one was {newest_kept}")
        if wrong:
            lost += 1
            print(f"step {number}, {steps[number - 1]}: {', '.join(wrong)}")
    shutil.rmtree(whole)
    seconds = time.monotonic() - started
    done = f"{len(chosen)} kills at {len(steps)} file-system steps of a run of {rollouts} rollouts"
    print(f"{done} ({seconds:.0f} s): {lost} lost")
    return not lost


def random_kills(train: Train, root: Path, kills: int, rollouts: int, seed: int) -> bool:
    """Kill ``kills`` times, half at a random time and half at a random step, over as many runs as that takes."""
    draw = random.Random(seed)
    log, started = root / "log.txt", time.monotonic()
    done = runs = lost = 0
    while done < kills:
        whole, run = root / f"whole-{runs}", root / f"run-{runs}"
        begun = time.monotonic()
        undisturbed(train, whole, rollouts, runs, log)
        length = time.monotonic() - begun
        code, last, fell_back = -signal.SIGKILL, -1, []
        while code == -signal.SIGKILL:
            by_time = done < kills and draw.random() < 0.5
            number = draw.randrange(1, 150) if done < kills and not by_time else 0

            def work(run: Path = run, number: int = number, seed: int = runs) -> None:
                steps_in(run, kill_at(number))
                train(run, rollouts, seed)

            pid = in_child(work, log)
            if by_time:
                time.sleep(draw.uniform(0, length / 4))
                os.kill(pid, signal.SIGKILL)  # a zombie, if it has ended by itself
            code = wait(pid)
            done += code == -signal.SIGKILL
            if newest(run) < last:
                fell_back.append(f"checkpoint-{last} was there and is lost")
            last = newest(run)
        wrong = [f"exit code {code}: {log.read_text()[-2000:]}"] if code else differences(run, whole)
        wrong += fell_back
        lost += bool(wrong)
        runs += 1
        print(f"run {runs}: {done} kills so far, {', '.join(wrong) or 'end bit-equal'}", flush=True)
        shutil.rmtree(whole)
        shutil.rmtree(run)
    minutes = (time.monotonic() - started) / 60
    print(f"{done} kills in {runs} runs of {rollouts} rollouts ({minutes:.0f} min): {lost} runs lost or different")
    return not lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("matrix", "random"))
    parser.add_argument("--frontend", choices=tuple(FRONTENDS), help="this one alone")
    parser.add_argument("--cover", action="store_true", help="matrix: at one step of each kind in a commit alone")
    parser.add_argument("--kills", type=int, default=200, help="random: how many, of each frontend")
    parser.add_argument("--rollouts", type=int, help="length of a run (matrix: 3, random: 60)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    good = True
    for name in [args.frontend] if args.frontend else FRONTENDS:
        print(f"{name}:")
        train = FRONTENDS[name]()
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder).resolve()
            if args.mode == "matrix":
                good &= matrix(train, root, args.rollouts or 3, args.seed, cover=args.cover)
            else:
                good &= random_kills(train, root, args.kills, args.rollouts or 60, args.seed)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
