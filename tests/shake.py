"""Run the tests on other kinds of CPU, and each learning test on twenty seeds: `make test-shake`.

A kind of CPU is what torch and oneDNN are told to use of this one. Exits with 1 if a test fails on any kind, or a
learning test on more than one seed of twenty.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
SEEDS, NEEDED = 20, 19
KINDS = {
    "no vector instructions": {"ATEN_CPU_CAPABILITY": "default"},
    "no vector instructions, two threads": {"ATEN_CPU_CAPABILITY": "default", "RLHF_PPO_TEST_THREADS": "2"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "AVX2, oneDNN too": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "this CPU, oneDNN at AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "this CPU": {},
    "this CPU, two threads": {"RLHF_PPO_TEST_THREADS": "2"},
}


def pytest(*arguments: str, environment: dict[str, str] | None = None) -> tuple[bool, str]:
    """Run pytest in another process; returns whether all passed, and its last lines."""
    command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **(environment or {})}, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, "\n  ".join([lines[-1] if lines else done.stderr, *failed])


def learning() -> bool:
    """Run every learning test on each seed and print how often it passes."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        chosen = ["-m", "learning", f"--learning-seeds={SEEDS}", f"--junit-xml={report}"]
        pytest(*chosen)
        passed: Counter[str] = Counter()
        for case in ElementTree.parse(report).iter("testcase"):
            name = re.sub(r"seed\d+-?|-?seed\d+", "", f"{case.get('classname')}::{case.get('name')}").replace("[]", "")
            passed[name] += not any(case.iter("failure")) and not any(case.iter("error"))
    for name, count in sorted(passed.items(), key=lambda item: item[1]):
        print(f"{count:3d} of {SEEDS}  {name}")
    return bool(passed) and min(passed.values()) >= NEEDED


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=["kinds", "learning", "all"], nargs="?", default="all")
    part = parser.parse_args().part
    good = True
    for kind, environment in KINDS.items() if part != "learning" else ():
        passed, said = pytest("-m", "not slow", environment=environment)
        print(f"{kind}: {said}", flush=True)
        good = good and passed
    if part != "kinds":
        good = learning() and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
