"""`rlhf-ppo migrate`: convert another project's PPO run to YAML for `rlhf-ppo train`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path

from rlhf_ppo.config.arguments.commands import MigrateArgs
from rlhf_ppo.config.arguments.train import TrainArgs
from rlhf_ppo.migration import llama_factory, ms_swift, trl, trl_0x
from rlhf_ppo.migration.converted import Converted
from rlhf_ppo.migration.reading import Given, read_given
from rlhf_ppo.migration.yaml_text import as_yaml
from rlhf_ppo.runtime.command_line.settings import read_yaml

CONVERTERS: dict[str, Callable[[Given, int | None], Converted]] = {
    "trl": trl.convert,
    "trl-0x": trl_0x.convert,
    "llama-factory": llama_factory.convert,
    "ms-swift": ms_swift.convert,
}
"""Project -> how its arguments are converted; the second argument is the number of rows of its data, if given."""

PLACEHOLDERS = {"model": "m", "dataset": "d", "reward": "r", "output_dir": "o", "total_episodes": "1"}
"""Stand for settings that are left to fill in, so that the others can be checked."""


def migrate(args: MigrateArgs) -> str:
    """Convert a run to YAML, check it with `rlhf-ppo train`'s own loader, and write it to ``args.output`` if set.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_given` and the projects' ``convert``; or ``output`` exists.
    """
    given = read_given(args)
    converted = CONVERTERS[given.source](given, args.rows)
    output = None if args.output is None else Path(args.output)
    prompts = Path("prompts.jsonl") if output is None else output.with_name(f"{output.stem}-prompts.jsonl")
    if converted.prompts is not None:
        converted.settings["dataset"] = [str(prompts)]
    defaults = {field.name: field.default for field in fields(TrainArgs) if field.default is not MISSING}
    text = as_yaml(given, converted, defaults)
    with tempfile.TemporaryDirectory() as folder:
        checked = Path(folder) / "settings.yaml"
        filled = "".join(f"{name}: {PLACEHOLDERS[name]}\n" for name in converted.missing)
        checked.write_text(text + filled, encoding="utf-8")
        TrainArgs(**read_yaml(checked, TrainArgs))
    if output is not None:
        for file in (output, prompts) if converted.prompts is not None else (output,):
            if file.exists():
                raise ValueError(f"output {file} exists: name another file, or remove it")
        output.write_text(text, encoding="utf-8")
        if converted.prompts is not None:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in converted.prompts)
            prompts.write_text("".join(lines), encoding="utf-8")
    return text


def migrate_command(args: MigrateArgs) -> None:
    """Run the `migrate` command."""
    text = migrate(args)
    print(text if args.output is None else f"settings  {args.output}", end="" if args.output is None else "\n")
