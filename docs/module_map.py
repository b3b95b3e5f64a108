"""Write the module map of docs/architecture.md: each package and module with the first line of its docstring."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
START = "<!-- module map: made by `make docs` -->\n"
PACKAGES = "core runtime config data models generation rewards training pipeline migration verify".split()


def first_line(file: Path) -> str:
    """Return the first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def section(folder: Path) -> str:
    """Return a package's heading and a table of its modules."""
    name, line = folder.relative_to(ROOT), first_line(folder / "__init__.py")
    rows = [
        f"| [{file.name}](../{file.relative_to(ROOT)}) | {first_line(file)} |"
        for file in sorted(folder.glob("*.py"))
        if file.name != "__init__.py"
    ]
    return "\n".join([f"### `{name}/`", "", line, "", "| module | |", "|---|---|", *rows, ""])


def rooms(package: Path) -> list[Path]:
    """Return the packages inside a package."""
    return sorted(file.parent for file in package.glob("*/__init__.py"))


def module_map() -> str:
    """Return the whole map, packages in the order of their imports."""
    roots = [*(ROOT / "rlhf_ppo" / name for name in PACKAGES), ROOT / "rlhf_ppo", ROOT / "classic"]
    folders = [folder for root in roots for folder in [root, *(rooms(root) if root.name != "rlhf_ppo" else ())]]
    return "\n".join(section(folder) for folder in folders)


def page() -> str:
    """Return docs/architecture.md with the map as it should be."""
    return PAGE.read_text(encoding="utf-8").partition(START)[0] + START + "\n" + module_map()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
