"""Write the table of TRL's fields in docs/migrating-from-trl.md (`make docs`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rlhf_ppo.config.trl_names import CLASSES, FATES
from rlhf_ppo.trl.arguments import known_fields

HEADING = "## Every field\n"


def field_tables() -> str:
    """Render the table of every field, in Markdown."""
    facts = known_fields()
    text = f"{HEADING}\nTRL's defaults stand in parentheses.\n\n"
    text += "\n".join(f"- **{fate}**: {meaning}." for fate, meaning in FATES.items()) + "\n"
    for cls, rows in CLASSES.items():
        text += f"\n### {cls}\n\n| TRL | ours | | note |\n|---|---|---|---|\n"
        for row in rows:
            names = ", ".join(f"`{name}` ({json.dumps(facts[name]['default'])})" for name in row.names)
            text += f"| {names} | {' '.join(f'`{name}`' for name in row.ours)} | {row.fate} | {row.note} |\n"
    return text


if __name__ == "__main__":
    page = Path(sys.argv[1])
    guide = page.read_text(encoding="utf-8").partition(HEADING)[0]
    page.write_text(guide + field_tables(), encoding="utf-8")
