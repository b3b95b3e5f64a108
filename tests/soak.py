"""Kills a tiny run again and again, resumes it with "auto" each time, and compares its end with a run never killed.

``python tests/soak.py matrix`` kills at one file-system step of the run after another (every open, fsync, rename and
deletion in its folder, and tensors half written); ``python tests/soak.py random`` at random times and random steps.
Both print their figures and exit with 1 if anything was lost. The faults come from outside: an audit hook, and a
wrapped ``os.fsync`` and ``save_file``.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

import rlhf_ppo.runtime.checkpoint
import rlhf_ppo.trainer
from rlhf_ppo import PPOTrainer, RLHFConfig
from rlhf_ppo.runtime.checkpoint import list_checkpoints, verify_checkpoint

LETTERS = "abcdefghijklmnopqrstuvwxyz "
KEPT = ("metrics.jsonl", "samples.jsonl", "eval_samples.jsonl")


# The picture at a run's end, when everything is saved, takes longer than the run.
rlhf_ppo.trainer.plot_curves = lambda *_, **__: None


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {character: i for i, character in enumerate(["<end>", *LETTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", model_max_length=32)


def early_letters(prompts, completions, **columns):
    """Letters before n, plus noise from Python's global generator, which a resumed run must go on with."""
    return [sum("a" <= x < "n" for x in text) / 6 + 0.1 * random.random() for text in completions]


def train(folder: Path, rollouts: int, seed: int) -> None:
    """The run, from wherever it is."""
    torch.manual_seed(seed)
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 28, "eos_token_id": 0}
    trainer = PPOTrainer(
        AutoModelForCausalLM.from_config(GPT2Config(**sizes)),
        early_letters,
        RLHFConfig(
            output_dir=str(folder),
            total_episodes=4 * rollouts,
            rollout_batch_size=4,
            num_epochs=1,
            num_minibatches=2,
            max_new_tokens=6,
            learning_rate=1e-3,
            kl_target=1.0,
            normalize_scores=True,
            eval_every=4,
            save_every=1,
            save_best=True,
            save_total_limit=1,
            seed=seed,
            device="cpu",
            precision="fp32",
            quiet=True,
        ),
        train_dataset=[{"prompt": text} for text in ("once", "the cat", "a", "blue moon", "no")],
        eval_dataset=[{"prompt": text} for text in ("to be", "or")],
        processing_class=tokenizer(),
    )
    trainer.train(resume_from_checkpoint="auto")


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

    fsync, save_file = os.fsync, rlhf_ppo.runtime.checkpoint.save_file

    def fsync_step(handle: int) -> None:
        step("fsync", os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def torn_save(tensors, file) -> None:
        save_file(tensors, file)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])  # its open and this point: a file half written
        step("half of", file)
        save_file(tensors, file)

    sys.addaudithook(audit)
    os.fsync = fsync_step
    rlhf_ppo.runtime.checkpoint.save_file = torn_save


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


def differences(run: Path, whole: Path) -> list[str]:
    """How a run's end differs from that of the run never killed: weights, moments, generators, lines."""
    wrong = [name for name in KEPT if (run / name).read_bytes() != (whole / name).read_bytes()]
    ends = [list_checkpoints(folder)[-1] for folder in (run, whole)]
    for folder in list_checkpoints(run):
        wrong += [f"{folder.name}: {problem}" for problem in verify_checkpoint(folder)]
    pairs = [tuple(end / name for end in ends) for name in ("trainable", "optimizer", "rng")]
    pairs = [(a.with_suffix(".safetensors"), b.with_suffix(".safetensors")) for a, b in pairs]
    for a, b in [*pairs, (run / "model.safetensors", whole / "model.safetensors")]:
        one, two = load_file(a), load_file(b)
        if one.keys() != two.keys() or not all(torch.equal(one[name], two[name]) for name in one):
            wrong.append(a.name)
    if (ends[0] / "state.json").read_bytes() != (ends[1] / "state.json").read_bytes():
        wrong.append("state.json")
    return wrong


def newest(run: Path) -> int:
    """The step of a run's newest good checkpoint, -1 if there is none."""
    good = [folder for folder in list_checkpoints(run) if not verify_checkpoint(folder)]
    return int(good[-1].name.rpartition("-")[2]) if good else -1


def undisturbed(folder: Path, rollouts: int, seed: int, log: Path) -> list[str]:
    """Run without a kill; returns its file-system steps."""
    notes = folder.with_suffix(".steps")

    def work() -> None:
        handle = os.open(notes, os.O_WRONLY | os.O_CREAT)
        steps_in(folder, lambda count, what: os.write(handle, f"{what}\n".encode()))
        train(folder, rollouts, seed)

    if wait(in_child(work, log)):
        sys.exit(f"the undisturbed run failed:\n{log.read_text()}")
    return notes.read_text().splitlines()


def matrix(root: Path, stride: int, rollouts: int) -> int:
    """Kill at every ``stride``-th step of the run; each time resume to the end."""
    log = root / "log.txt"
    whole = root / "whole"
    steps = undisturbed(whole, rollouts, 0, log)
    chosen = range(1, len(steps) + 1, stride)
    lost = 0
    for number in chosen:
        run = root / "run"
        shutil.rmtree(run, ignore_errors=True)

        def killed(run: Path = run, number: int = number) -> None:
            steps_in(run, kill_at(number))
            train(run, rollouts, 0)

        code = wait(in_child(killed, log))
        assert code == -signal.SIGKILL, f"step {number} ended with {code}:\n{log.read_text()}"
        commits = [found[1] for what in steps[: number - 1] if (found := re.fullmatch(r"os.rename \.tmp-(\d+)", what))]
        kept = newest(run)
        code = wait(in_child(lambda run=run: train(run, rollouts, 0), log))
        wrong = [f"exit code {code}: {log.read_text()[-2000:]}"] if code else differences(run, whole)
        if commits and kept < int(commits[-1]):
            wrong.append(f"checkpoint-{commits[-1]} was committed, and the newest good one was {kept}")
        if wrong:
            lost += 1
            print(f"step {number}, {steps[number - 1]}: {', '.join(wrong)}")
    print(f"{len(chosen)} kills at {len(steps)} file-system steps of a run of {rollouts} rollouts: {lost} lost")
    return min(lost, 1)


def random_kills(root: Path, kills: int, rollouts: int, seed: int) -> int:
    """Kill ``kills`` times, half at a random time and half at a random step, over as many runs as that takes."""
    draw = random.Random(seed)
    log, started = root / "log.txt", time.monotonic()
    done = runs = lost = 0
    while done < kills:
        whole, run = root / f"whole-{runs}", root / f"run-{runs}"
        begun = time.monotonic()
        undisturbed(whole, rollouts, runs, log)
        length = time.monotonic() - begun
        code, kept, fell_back = -signal.SIGKILL, -1, []
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
            if newest(run) < kept:
                fell_back.append(f"checkpoint-{kept} was there and is lost")
            kept = newest(run)
        wrong = [f"exit code {code}: {log.read_text()[-2000:]}"] if code else differences(run, whole)
        wrong += fell_back
        lost += bool(wrong)
        runs += 1
        print(f"run {runs}: {done} kills so far, {', '.join(wrong) or 'end bit-equal'}", flush=True)
        shutil.rmtree(whole)
        shutil.rmtree(run)
    minutes = (time.monotonic() - started) / 60
    print(f"{done} kills in {runs} runs of {rollouts} rollouts ({minutes:.0f} min): {lost} runs lost or different")
    return min(lost, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("matrix", "random"))
    parser.add_argument("--stride", type=int, default=1, help="matrix: kill at every so many-th step")
    parser.add_argument("--kills", type=int, default=200, help="random: how many")
    parser.add_argument("--rollouts", type=int, help="length of a run (matrix: 3, random: 60)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        if args.mode == "matrix":
            return matrix(root, args.stride, args.rollouts or 3)
        return random_kills(root, args.kills, args.rollouts or 60, args.seed)


if __name__ == "__main__":
    sys.exit(main())
