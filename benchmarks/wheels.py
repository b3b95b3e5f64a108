"""Wheels for a machine without a network: download here what it may lack, install there what is missing.

benchmarks/gpu_kit.sh calls it. ``python benchmarks/wheels.py carry`` downloads into build/wheels the versions that this
environment has; ``python benchmarks/wheels.py install FOLDER`` installs of these what the interpreter lacks, into a
folder for PYTHONPATH.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "build/wheels"
LIMIT_MIB = 48
"""Most that is carried: with the repository it stays below 64 MiB."""

TESTS = ("pytest", "pytest-xdist", "hypothesis")
PEER = "trl==1.12.0"
NOT_CARRIED = frozenset(
    "torch transformers tokenizers safetensors huggingface-hub numpy matplotlib pandas pyarrow".split()
)
"""Large, and in every image for training on GPUs; what they need is theirs."""
RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux_2_5_x86_64", "any")


def wanted() -> list[Requirement]:
    """Return what the tests and benchmarks import directly: this project's dependencies, test tools and TRL."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in (*project["dependencies"], *TESTS, PEER)]


@dataclass(frozen=True)
class Distribution:
    """A distribution, installed or as a wheel."""

    version: Version
    requires: tuple[Requirement, ...]
    wheel: Path | None = None

    @classmethod
    def of(cls, version: str, lines: Iterable[str], wheel: Path | None = None, python: str = RUNNING) -> Distribution:
        """Make one from the lines of its metadata, with the needs that apply to a Python version."""
        where = {"extra": "", "python_version": python, "python_full_version": f"{python}.0"}
        needs = tuple(r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate(where))
        return cls(Version(version), needs, wheel)


def installed(name: str, python: str = RUNNING) -> Distribution | None:
    """Return what this interpreter has under a name."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    return Distribution.of(found.version, found.requires or (), python=python)


def carried(folder: Path = WHEELS) -> dict[str, Distribution]:
    """Read the wheels in a folder that fit this interpreter, by name."""
    found, fits = {}, set(sys_tags())
    for file in sorted(folder.glob("*.whl")):
        name, version, _, tags = parse_wheel_filename(file.name)
        if tags & fits:
            with zipfile.ZipFile(file) as wheel:
                inside = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
                lines = HeaderParser().parsestr(wheel.read(inside).decode()).get_all("Requires-Dist") or ()
            found[name] = Distribution.of(str(version), lines, file)
    return found


def missing(wheels: Mapping[str, Distribution]) -> tuple[list[Path], list[str]]:
    """Find what the interpreter lacks.

    Returns:
        (the wheels to install, the requirements that neither it nor a wheel meets).
    """
    chosen: dict[str, Path] = {}
    lacking: list[str] = []
    queue = wanted()
    for need in queue:  # which grows
        name = canonicalize_name(need.name)
        here, wheel = installed(name), wheels.get(name)
        if name in chosen or (here is not None and need.specifier.contains(here.version, prereleases=True)):
            continue
        if wheel is None or wheel.wheel is None or not need.specifier.contains(wheel.version, prereleases=True):
            lacking.append(str(need))
            continue
        chosen[name] = wheel.wheel
        queue += wheel.requires
    return [*chosen.values()], lacking


def install(folder: Path) -> int:
    """Install what is missing; say what stays missing."""
    shutil.rmtree(folder, ignore_errors=True)
    files, lacking = missing(carried())
    if files:
        options = ["--no-index", "--no-deps", "--no-compile", "--quiet", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", folder, *files], check=True)
    print(f"installed from {WHEELS.relative_to(ROOT)}: {', '.join(f.name.split('-')[0] for f in files) or 'nothing'}")
    if lacking:
        print(f"missing here and not carried (benchmarks/gpu_kit.sh carry, with a network): {', '.join(lacking)}")
    return 0


def to_carry(python: str) -> dict[str, str]:
    """Return name and version of what is carried: what is wanted with all of its needs, as this environment has it."""
    versions: dict[str, str] = {}
    queue = wanted()
    for need in queue:  # which grows
        name = canonicalize_name(need.name)
        if name in NOT_CARRIED or name in versions:
            continue
        here = installed(name, python)
        if here is None and str(need) != PEER:
            raise SystemExit(f"{name} is not installed in {sys.executable}: run `make env`, and carry from there")
        versions[name] = PEER.partition("==")[2] if here is None else str(here.version)
        queue += () if here is None else here.requires
    return versions


def carry(python: str) -> int:
    """Download the wheels, and check how much they are."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check"]
    target = ["--python-version", python, "--implementation", "cp", *platforms, "--dest", str(WHEELS)]
    names = [f"{name}=={version}" for name, version in to_carry(python).items()]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options, *target, *names], check=False)
    if done.returncode != 0:
        return done.returncode
    sizes = {file: file.stat().st_size / 2**20 for file in WHEELS.glob("*.whl")}
    total = sum(sizes.values())
    print(f"{len(sizes)} wheels for Python {python}, {total:.1f} MiB, in {WHEELS.relative_to(ROOT)}")
    if total > LIMIT_MIB:
        largest = ", ".join(f"{file.name} {sizes[file]:.0f}" for file in sorted(sizes, key=lambda f: -sizes[f])[:3])
        print(f"that is more than {LIMIT_MIB} MiB; the largest: {largest}. Put their names into NOT_CARRIED")
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Carry or install."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("carry").add_argument("--python", default="3.12", help="version of that machine's Python")
    commands.add_parser("install").add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    return carry(args.python) if args.command == "carry" else install(args.folder)


if __name__ == "__main__":
    sys.exit(main())
