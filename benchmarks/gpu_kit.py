"""The steps of benchmarks/gpu_kit.sh: each in a process of its own, with a limit on its time; one table at the end.

What you will see: a line for each step as it ends, then the table. results.jsonl has each number as soon as it is
measured, so that a session that is cut off keeps them; log.txt has what the steps printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One question to the GPU."""

    name: str
    answers: str
    limit_s: int
    command: Sequence[str]
    needs: str | None = None
    """A module without which the step is left out."""
    read_log: Callable[[str], list[Row]] = lambda log: []
    """Finds results in what the command printed, where it does not write them into results.jsonl itself."""


def steps(device: str, *, tiny: bool, rows: Path) -> list[Step]:
    """Return the steps, the worthiest first; the limits add up to more than the session, but few steps need theirs."""
    small = ["--tiny"] if tiny else []
    python, jsonl = sys.executable, ["--jsonl", str(rows)]

    def script(name: str, *words: str) -> list[str]:
        return [python, str(HERE / name), *words, *jsonl]

    def iterations(model: str, *words: str) -> list[str]:
        return script("gpu.py", "--device", device, *small, "--models", model, *words)

    def beside(side: str) -> list[str]:
        return script("speed_worker.py", side, "tiny" if tiny else "G", "--device", device)

    ways = ["dynamic", "checkpointed", "offloaded", "sharded", "LoRA", "QLoRA"]
    # Most of a test on a GPU is compiling on the CPU.
    workers = ["-n", "4"] if device == "cuda" and importlib.util.find_spec("xdist") is not None else []
    pytest = [python, "-m", "pytest", *workers, "-vv", "-m", "cuda", "-p", "no:cacheprovider", "--tb=short"]
    return [
        Step(
            name="tests",
            answers="do the tests marked cuda pass",
            limit_s=150,
            command=[*pytest, "--continue-on-collection-errors", "tests"],
            read_log=read_tests,
        ),
        Step("gpt2", "GPT-2 124M by each decoding engine", 90, iterations("GPT-2 124M", "--iterations", "3")),
        Step("llama", "Llama 1.1B by each decoding engine", 120, iterations("Llama 1.1B", "--iterations", "2")),
        Step("peer", "TRL 1.12.0's PPO on GPT-2 124M, in bf16", 70, beside("peer"), needs="trl"),
        Step("ours", "the same iterations by this project as it comes", 60, beside("defaults")),
        Step("twice", "is a run reproducible to the bit", 60, script("twice.py", "--device", device, *small)),
        Step(
            name="memory",
            answers="Llama 1.1B: what saves memory, and what it costs",
            limit_s=120,
            command=iterations("Llama 1.1B", "--iterations", "1", "--ways", *ways),
        ),
        Step("compile", "GPT-2 124M: updates by compiled layers", 120, iterations("GPT-2 124M", "--ways", "compiled")),
    ]


def read_tests(log: str) -> list[Row]:
    """Return a row with the counts of pytest -vv, and one for each test that failed."""
    word = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL)"
    lines = rf"^(?:\[gw\d+\] \[ *\d+%\] {word} \S+::|\S+::.*? {word}\b)"  # of several workers, of one
    verdicts = [a or b for a, b in re.findall(lines, log, re.MULTILINE)]
    counts = {word: verdicts.count(word.upper()) for word in ("passed", "failed", "error", "skipped")}
    text = ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "no test ran"
    failures = re.findall(r"^(?:FAILED|ERROR) (\S.*?) - (.*)$", log, re.MULTILINE)
    return [{**counts, "text": text}, *({"test": name, "text": f"{name}: {why}"} for name, why in failures)]


def first_error(log: str) -> str:
    """Return the line that says what went wrong: the last exception's first line, or the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    return (errors or lines or ["it printed nothing"])[-1][:300]


def read_rows(file: Path, start: int) -> list[Row]:
    """Read the rows of results.jsonl from a byte on; a line that a kill cut off is left out."""
    whole, _, _ = (file.read_bytes() if file.exists() else b"")[start:].rpartition(b"\n")
    return [json.loads(line) for line in whole.splitlines()]


def add_row(file: Path, row: Row) -> None:
    """Append a row to results.jsonl, on a line of its own even if a kill cut the last one off."""
    with file.open("a+b") as handle:
        if handle.tell() and not file.read_bytes().endswith(b"\n"):
            handle.write(b"\n")
        handle.write(json.dumps(row).encode() + b"\n")


def run_step(step: Step, limit_s: float, out: Path) -> Row:
    """Run a step; returns its row, with the rows that it measured."""
    rows = out / "results.jsonl"
    start, started = rows.stat().st_size if rows.exists() else 0, time.monotonic()
    outcome, why, log = "left out", "", ""
    if step.needs is not None and importlib.util.find_spec(step.needs) is None:
        why = f"needs {step.needs}, which is not installed"
    elif limit_s < min(step.limit_s, 10):
        why = "no time is left"
    else:
        outcome, log = _run(step, limit_s, out / "log.txt")
        why = "" if outcome == "passed" else first_error(log)
    for row in step.read_log(log):
        add_row(rows, row)
    measured = [{"text": describe(row), **row} for row in read_rows(rows, start)]
    if outcome == "failed":
        why = next((f"{row['way']}: {row['why']}" for row in measured if row.get("outcome") == "failed"), why)
    took = round(time.monotonic() - started, 1)
    result = {"step": step.name, "answers": step.answers, "outcome": outcome, "why": why, "seconds": took}
    result["limit_seconds"] = round(limit_s)
    add_row(rows, result)
    return {**result, "rows": measured}


def _run(step: Step, limit_s: float, log: Path) -> tuple[str, str]:
    """Run a step's command, its output into the log; returns how it ended, and what it printed."""
    # A file, not a pipe: something that outlives the command would keep a pipe open.
    with log.open("ab") as file:
        file.write(f"\n##### {step.name}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(step.command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        try:
            outcome = "failed" if process.wait(timeout=limit_s) else "passed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.wait()
            outcome = "out of time"
    return outcome, log.read_bytes()[start:].decode(errors="replace")


def describe(row: Row) -> str:
    """Return a measured row in words."""
    if "side" in row:
        seconds = sorted(row["seconds"])[len(row["seconds"]) // 2]
        peak = f", peak {row['peak_gpu_bytes'] / 2**30:.1f} GiB" if "peak_gpu_bytes" in row else ""
        phases = ", ".join(f"{name} {share:.0%}" for name, share in row["phases"].items())
        return f"{seconds:.3g} s/iteration ({phases}){peak}"
    return f"{row['outcome']}: {row['why']}" if "why" in row else ""


def table(results: Sequence[Row]) -> str:
    """Return all results as one markdown table."""
    lines = ["| step | case | result | seconds |", "|---|---|---|---|"]
    for result in results:
        head = result["outcome"] + (f": {result['why']}" if result["why"] else "")
        seconds = f"{result['seconds']:.0f} of {result['limit_seconds']}"
        lines.append(f"| {result['step']} | {result['answers']} | {head} | {seconds} |")
        for row in result["rows"]:
            case = " ".join(str(row[key]) for key in ("model", "way", "run", "side") if key in row)
            lines.append(f"| | {case} | {row['text']} | |")
    seconds = {row["side"]: sum(row["seconds"]) for result in results for row in result["rows"] if "side" in row}
    if {"peer", "defaults"} <= seconds.keys():
        lines.append(f"| | TRL's time over ours | {seconds['peer'] / seconds['defaults']:.2f}x | |")
    return "\n".join(line.replace("\n", " ") for line in lines)


def machine(device: str) -> str:
    """Return the device and the versions; raises SystemExit without the device."""
    code = "import sys, torch; d = sys.argv[1]; torch.empty(0, device=d)\n"
    code += "print(torch.cuda.get_device_name(d) if d != 'cpu' else d, 'torch', torch.__version__)"
    done = subprocess.run([sys.executable, "-c", code, device], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(
            f"the kit needs a working {device} device: {first_error(done.stderr)} (--device cpu --tiny checks the kit "
            "alone)"
        )
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{done.stdout.strip()}, transformers {metadata.version('transformers')}, Python {python}"


def main(argv: list[str] | None = None) -> int:
    """Run the steps, print the table; return 1 if a step failed or ran out of time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in steps("cuda", tiny=False, rows=Path())]
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build/gpu_kit", help="folder of results, emptied of old ones"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand weights: only checks the code")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="of the whole kit; steps at the end get what is left"
    )
    parser.add_argument("--steps", nargs="+", default=names, choices=names, metavar="STEP", help=", ".join(names))
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("results.jsonl", "log.txt", "table.md"):
        (args.out / name).unlink(missing_ok=True)
    about = f"{time.strftime('%Y-%m-%d %H:%M')}, {machine(args.device)}"
    print(about, flush=True)
    add_row(args.out / "results.jsonl", {"machine": about, "tiny": args.tiny})
    results: list[Row] = []
    for step in steps(args.device, tiny=args.tiny, rows=args.out / "results.jsonl"):
        if step.name in args.steps:
            results.append(run_step(step, min(step.limit_s, end - time.monotonic()), args.out))
            row = results[-1]
            print(f"{row['step']}: {row['outcome']} {row['why']} ({row['seconds']} s)", flush=True)
    text = f"{about}\n\n{table(results)}\n"
    (args.out / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    return int(any(row["outcome"] in ("failed", "out of time") for row in results))


if __name__ == "__main__":
    sys.exit(main())
