"""Progress: plain lines without a terminal, a bar with one, nothing when quiet; the phase, and how long it takes."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

import rlhf_ppo.runtime.logs.progress
from rlhf_ppo.runtime.logs.progress import ProgressDisplay


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until ``clock.now`` is moved."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(rlhf_ppo.runtime.logs.progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def on_screen(progress: ProgressDisplay, width: int) -> io.StringIO:
    screen = io.StringIO()
    progress.console = Console(file=screen, force_terminal=True, width=width)
    progress._bar.live.console = progress.console
    return screen


def test_plain_lines_without_a_terminal(capsys, clock):
    with ProgressDisplay("episodes", 40, every_s=1000.0) as progress:
        progress.phase("generate")
        clock.now += 5
        progress.update(10, score=0.123456, kl_nats=12345.0)  # the first count comes at once
        clock.now += 5
        progress.update(20, score=0.2)  # too soon for another line
        clock.now += 990
        progress.update(30, score=0.3)  # 995 s after the last line
        progress.update(40, score=1.0)  # the end is always shown
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "episodes 0/40  generating",
        "episodes 10/40  0:00:15 left  5.0 s/iteration  score 0.123  kl nats 1.23e+04",
        "episodes 40/40  0:04:10/iteration  score 1",
    ]


def test_time_left_is_that_of_the_work_without_what_is_aside(capsys, clock):
    """An evaluation of 100 s before it and one in between leave 2 s for each of 10."""
    with ProgressDisplay("episodes", 40, each="step", every_s=0.0) as progress:
        with progress.aside("evaluating"):
            clock.now += 100
            progress.phase("generate")  # of the evaluation, which is what is shown
        progress.phase("generate")
        clock.now += 2
        progress.update(10)
        with progress.aside("evaluating"):
            clock.now += 1000
        clock.now += 2
        progress.update(20)
    assert capsys.readouterr().err.splitlines() == [
        "episodes 0/40  evaluating",
        "episodes 0/40  generating",
        "episodes 10/40  0:00:06 left  2.0 s/step",
        "episodes 10/40  evaluating",
        "episodes 20/40  0:00:04 left  2.0 s/step",
    ]


def test_a_run_that_goes_on_is_measured_from_where_it_does(capsys, clock):
    with ProgressDisplay("episodes", 100) as progress:
        progress.start(90)
        clock.now += 3
        progress.update(91)
    assert capsys.readouterr().err == "episodes 91/100  0:00:27 left  3.0 s/iteration\n"


def test_time_left_follows_the_pace_of_the_last_steps(capsys, clock):
    with ProgressDisplay("steps", 1000, every_s=0.0) as progress:
        for done in range(1, 101):
            clock.now += 10 if done <= 50 else 1
            progress.update(done)
    assert capsys.readouterr().err.splitlines()[-1] == "steps 100/1000  0:15:00 left  1.0 s/iteration"


def test_a_name_is_shown_as_it_is():
    progress = ProgressDisplay("x[/y]", 4)
    screen = on_screen(progress, 100)
    with progress:
        progress.update(4)
    assert "x[/y]" in screen.getvalue()


def test_quiet_shows_nothing(capsys):
    with ProgressDisplay("episodes", 2, quiet=True) as progress:
        progress.phase("update")
        with progress.aside("evaluating"):
            progress.update(2, score=1.0)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(capsys):
    progress = ProgressDisplay("episodes", 4)
    screen = on_screen(progress, 100)
    with progress:
        progress.phase("score")
        progress.update(3, score=0.5)
        progress._bar.refresh()
    assert "episodes" in screen.getvalue() and "3/4" in screen.getvalue() and "score 0.5" in screen.getvalue()
    assert "scoring" in screen.getvalue()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("description", "total"),
    [("episodes", 1536), ("prompts of a-model-with-a-name-longer-than-any", 100_000), ("Humanoid-v5", 10_000_000)],
)
def test_a_bar_fits_80_columns_with_all_that_it_shows(description, total, clock):
    progress = ProgressDisplay(description, total)
    screen = on_screen(progress, 80)
    with progress:
        clock.now += 36_000
        progress.phase("reference")
        progress.update(total // 2, score=-0.412, kl=-32.1, entropy=2.13, clipped=0.123)
        progress._bar.refresh()
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\x00", screen.getvalue())
    lines = [line.replace("\x00", "") for line in re.split(r"[\r\n]", shown)]
    assert max(map(len, lines)) <= 80
    last = [line for line in lines if f"/{total}" in line][-1]
    assert f"{total // 2}/{total}" in last and "10:00:00 left" in last and "reading reference" in last
    assert any("score -0.412  kl -32.1  entropy 2.13  clipped 0.123" in line for line in lines)
