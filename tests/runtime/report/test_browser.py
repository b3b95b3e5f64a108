"""Reports in a real Chromium: no error, no sideways scrolling, readable in both themes, by pointer and by keyboard."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rlhf_ppo.runtime.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")

CHECKS = Path(__file__).with_name("checks.js").read_text(encoding="utf-8")


def look(page: Path, width: int) -> tuple[str, str]:
    """Open a page in a window of this width; returns its elements afterwards, and what the browser complains of."""
    assert BROWSER is not None
    flags = (
        "--headless --no-sandbox --disable-gpu --dump-dom --enable-logging=stderr --virtual-time-budget=5000".split()
    )
    done = subprocess.run(
        [BROWSER, *flags, f"--window-size={width},900", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def checked(page: Path, width: int) -> dict:
    """Run the checks in a copy of the page, whose policy would not let them."""
    copy = page.with_name(f"checked-{width}.html")
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    copy.write_text(source.replace("</body>", f"<script>{CHECKS}</script></body>"), encoding="utf-8")
    elements, complaints = look(copy, width)
    assert not complaints
    match = re.search(r'<pre id="found">(.*?)</pre>', elements, re.S)
    assert match, elements[-2000:]
    return json.loads(html.unescape(match[1]))


@pytest.mark.parametrize("width", [360, 1600])
def test_a_report_is_readable_and_reachable(language_run, control_run, width):
    runs = [language_run("a"), language_run("b", seed=1), language_run("c", kl_coef=0.3, gain=0.01), control_run()]
    found = checked(write_report(runs), width)
    assert found["wide"] <= 0 and found["hacked"] == 0 and found["names"]
    for theme in ("light", "dark"):
        assert found[f"{theme} scheme"] == theme
        texts = {name: x for name, x in found.items() if name.startswith(theme) and isinstance(x, list)}
        assert len(texts) > 5
        # WCAG AA: 4.5 for text, 3 for what one must see to read a chart.
        assert not {name: x for name, x in texts.items() if x[0] < 4.5}
        assert found[f"{theme} lines"] >= 3
    assert found["hovered"] != found["last"] == found["left"] != found["first"] and found["cursor"] >= 1
    assert "at 32 responses" in found["first"]
    assert '2: "' in found["token"] and "advantage" in found["token"] and "KL" in found["token"]
    assert found["focused"] == found["selected"] == 1 and found["stops"] == 1 and found["by"]


def test_the_page_works_under_its_own_policy(language_run):
    elements, complaints = look(write_report([language_run()]), 800)
    assert not complaints
    assert re.search(r'<button type="button" class="theme">', elements)  # its script ran
    assert 'id="found"' not in elements


def test_a_script_that_got_into_a_page_would_not_run(language_run):
    page = write_report([language_run()])
    page.write_text(page.read_text().replace("</body>", "<script>document.title = 'hacked'</script></body>"))
    elements, complaints = look(page, 800)
    assert "<title>hacked" not in elements and "Content Security Policy" in complaints
