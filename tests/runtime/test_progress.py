"""Progress: plain lines without a terminal, a bar with one, nothing when quiet."""

from __future__ import annotations

import io

from rich.console import Console

from rlhf_ppo.runtime.progress import ProgressDisplay


def test_plain_lines_without_a_terminal(capsys):
    with ProgressDisplay("episodes", 30, every_s=1000.0) as progress:
        progress.update(10, score=0.123456, kl_nats=12345.0)
        progress.update(20, score=0.2)  # too soon for another line
        progress.update(30, score=1.0)  # the end is always shown
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["episodes 10/30  score 0.123  kl nats 1.23e+04", "episodes 30/30  score 1"]


def test_a_name_is_shown_as_it_is():
    progress = ProgressDisplay("x[/y]", 4)
    screen = io.StringIO()
    progress.console = Console(file=screen, force_terminal=True, width=100)
    progress._bar.live.console = progress.console
    with progress:
        progress.update(4)
    assert "x[/y]" in screen.getvalue()


def test_quiet_shows_nothing(capsys):
    with ProgressDisplay("episodes", 2, quiet=True) as progress:
        progress.update(2, score=1.0)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(capsys):
    progress = ProgressDisplay("episodes", 4)
    screen = io.StringIO()
    progress.console = Console(file=screen, force_terminal=True, width=100)
    progress._bar.live.console = progress.console
    with progress:
        progress.update(3, score=0.5)
    assert "episodes" in screen.getvalue() and "3/4" in screen.getvalue() and "score 0.5" in screen.getvalue()
    assert capsys.readouterr().err == ""
