"""Peers: the environments in which other libraries run beside this one, made on first use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def peer_python(name: str, *pins: str, beside: str | None = None) -> Path:
    """Return the interpreter of an environment that has these packages.

    Args:
        name: of its folder in build/.
        pins: what it has, for pip.
        beside: a package without its dependencies that lies in the folder ``old``, not in the environment.
    """
    folder = ROOT / "build" / name
    interpreter = folder / "bin/python"
    if not (folder / ".ready").exists():
        print(f"installing {', '.join(pins)} into {folder.relative_to(ROOT)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *pins], check=True)
        if beside is not None:
            subprocess.run([*install, "--no-deps", "--target", folder / "old", beside], check=True)
        (folder / ".ready").touch()
    return interpreter
