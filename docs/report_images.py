"""Make the pictures of docs/report.md from runs: python docs/report_images.py runs/demo runs/CartPole-v1-seed0

Needs Chromium (apt-get install chromium). Each picture is a real page, or one of its parts, as people see it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from rlhf_ppo.runtime.report.page import write_report

IMAGES = Path(__file__).parent / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def screenshot(page: Path, image: Path, *, width: int, height: int, part: str = "", dark: bool = False) -> None:
    """Photograph what a window of this size shows of a page, or of one of its parts."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit("Chromium is needed: apt-get install chromium")
    # A browser without a window does not draw what it has scrolled to.
    alone = f"main > :not(#{part}), .top, footer {{ display: none }} section {{ margin-top: 28px }}" if part else ""
    shown = page.with_name("shown.html")
    shown.write_text(page.read_text(encoding="utf-8").replace("</head>", f"<style>{alone}</style></head>"), "utf-8")
    flags = "--headless --no-sandbox --disable-gpu --hide-scrollbars".split()
    flags += [f"--window-size={width},{height}"]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    with tempfile.NamedTemporaryFile(suffix=".png") as whole:
        command = [browser, *flags, f"--screenshot={whole.name}", f"{shown.resolve().as_uri()}"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        Image.open(whole.name).convert("RGB").save(image, lossless=True)
    print(f"{image}  {image.stat().st_size / 1e3:.0f} kB")


def main(language: str, control: str) -> None:
    """Make the pictures from a language model's run and a control task's."""
    with tempfile.TemporaryDirectory() as folder:
        pages = [write_report([run], Path(folder) / f"{i}.html") for i, run in enumerate((language, control))]
        screenshot(pages[0], IMAGES / "report.webp", width=1280, height=640)
        screenshot(pages[0], IMAGES / "report-tokens.webp", width=1280, height=620, part="tokens", dark=True)
        screenshot(pages[1], IMAGES / "report-cartpole.webp", width=1280, height=900)


if __name__ == "__main__":
    main(*sys.argv[1:])
