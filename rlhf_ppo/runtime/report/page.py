"""Write reports: one HTML file that is complete in itself; the `report` command, and the file at the end of a run."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_ppo.runtime.command_line.commands import ReportArgs
from rlhf_ppo.runtime.files import replace_text
from rlhf_ppo.runtime.package import __version__
from rlhf_ppo.runtime.report.content import report_content
from rlhf_ppo.runtime.report.heat import HeatView
from rlhf_ppo.runtime.report.run_files import read_run_files

ASSETS = Path(__file__).parent / "assets"
FILE = "report.html"


def write_report(runs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write one HTML file about one or several runs, of either frontend.

    Args:
        runs: their folders; finished or not, damaged or not.
        output: the file; None: report.html in the run's folder, or for several beside the first one's.
    Returns:
        The file.
    Raises:
        FileNotFoundError: a folder does not exist, or holds no run.
        OSError: the file cannot be written.
    """
    folders = list(dict.fromkeys(Path(run) for run in runs))
    found = [read_run_files(folder) for folder in folders]
    content = report_content(found)
    file = Path(output) if output is not None else folders[0] / FILE if len(folders) == 1 else folders[0].parent / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, render("report.html", title=f"{content['heading']}: PPO report", **content))
    return file


def report_at_end(folder: str | Path, *, quiet: bool) -> None:
    """Write the report of a run that has just ended, and say where it is; a failure is a warning and ends no run."""
    try:
        file = write_report([folder])
    except Exception as error:  # whatever it is, the run is done and saved
        warnings.warn(f"report.html could not be written ({type(error).__name__}: {error})", stacklevel=2)
        return
    if not quiet:
        print(f"report: {file}", file=sys.stderr, flush=True)


def report_command(args: ReportArgs) -> None:
    """Run the `report` command."""
    print(f"report   {write_report(args.runs, args.output)}")


def render(template: str, **parts: Any) -> str:
    """Render one of the templates in assets/; whatever a model wrote is escaped there."""
    from markupsafe import Markup

    # Not "</": it would end the element; the files are ours, and tests look for it.
    style, script = (Markup((ASSETS / name).read_text(encoding="utf-8")) for name in ("report.css", "report.js"))
    # Only this script may run, whatever else gets into the page.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    fixed = {"style": style, "script": script, "script_hash": f"sha256-{digest}", "version": __version__}
    return _environment().get_template(template).render(**fixed, **parts)


def write_heat_page(file: str | Path, views: Sequence[HeatView], *, heading: str, lead: str) -> Path:
    """Write a page of heat views alone."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, render("heat.html", title=heading, heading=heading, lead=lead, views=views))
    return file


@cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["brief"] = brief
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    environment.filters["lower_first"] = lambda text: text[:1].lower() + text[1:]
    environment.globals["marks"] = {"good": "✓", "look": "!", "bad": "✕", "unknown": "…", "compare": "⇄"}
    return environment


def brief(x: Any) -> str:
    """Write a setting's value."""
    if x is None:
        return "-"
    text = x if isinstance(x, str) else json.dumps(x, ensure_ascii=False, default=str)
    return text if len(text) <= 300 else f"{text[:300]} …"
