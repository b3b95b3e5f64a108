"""Write the tables of other projects' arguments into their pages (`make docs`)."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_ppo.config.migration_table import FATES, SOURCES, rows_of
from rlhf_ppo.migration.arguments import PAGES, classes_of

HEADING = "## Every field\n"


def field_tables(source: str) -> str:
    """Render the table of every field of a project, in Markdown."""
    rows, project = rows_of(source), SOURCES[source]
    text = f"{HEADING}\nThe defaults of {project} stand in parentheses.\n\n"
    text += "\n".join(f"- **{fate}**: {meaning}." for fate, meaning in FATES.items()) + "\n"
    for cls, facts in classes_of(source).items():
        text += f"\n### {cls}\n\n| {project} | ours | | note |\n|---|---|---|---|\n"
        for row in dict.fromkeys(rows[name] for name in sorted(facts, key=list(rows).index)):
            names = ", ".join(f"`{name}` ({json.dumps(facts[name]['default'])})" for name in row.names if name in facts)
            text += f"| {names} | {' '.join(f'`{name}`' for name in row.ours)} | {row.fate} | {row.note} |\n"
    return text


def write_pages(root: Path) -> None:
    """Write each project's table at the end of its page."""
    for source, name in PAGES.items():
        page = root / name
        guide = page.read_text(encoding="utf-8").partition(HEADING)[0]
        page.write_text(guide + field_tables(source), encoding="utf-8")


if __name__ == "__main__":
    write_pages(Path(__file__).parents[2])
