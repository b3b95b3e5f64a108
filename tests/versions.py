"""Run the tests with the oldest and the newest libraries that pyproject.toml allows: `make test-versions`.

torch stays as pinned. Each set of versions gets an environment in build/versions. Exits with 1 if a test fails.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "versions"
LIBRARIES = ("transformers", "peft", "datasets", "gymnasium")
FOLLOWING = ("accelerate", "huggingface_hub", "tokenizers", "safetensors")
"""What these libraries need in versions of their own."""


def floors() -> dict[str, str]:
    """Return the oldest version of each library that pyproject.toml promises to work with."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    found = (re.fullmatch(r"([\w-]+)>=([\d.]+)", line) for line in listed)
    return {match[1]: match[2] for match in found if match and match[1] in LIBRARIES}


def constraints(oldest: bool) -> str:
    """Return constraints.txt with these libraries at their oldest version, or free to be the newest."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.partition("==")[0] not in (*LIBRARIES, *FOLLOWING)]
    return "\n".join(kept + ([f"{name}=={version}.*" for name, version in floors().items()] if oldest else [])) + "\n"


def run(name: str, arguments: list[str]) -> bool:
    """Make the environment of ``name`` ("oldest" or "newest") and run the tests in it."""
    folder = FOLDER / name
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    file = FOLDER / f"{name}.txt"
    file.write_text(constraints(name == "oldest"), encoding="utf-8")
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    subprocess.run([*install, "--constraint", str(file), "--editable", ".[dev]"], cwd=ROOT, check=True)
    shown = "import sys, importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in sys.argv[1:]), sep=', ')"
    subprocess.run([python, "-c", shown, *LIBRARIES], check=True)
    tests = [python, "-m", "pytest", "-n", "2", "-m", "not slow", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(tests, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=["oldest", "newest"])
    known, others = parser.parse_known_args()
    passed = [run(name, others) for name in ("oldest", "newest") if known.only in (None, name)]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
