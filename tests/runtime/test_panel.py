"""The panel: sparklines, what is outside its healthy range, targets, a sample; it fits the terminal, however narrow."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from rlhf_ppo.runtime.logs.panel import AGENT, LANGUAGE_MODEL, MOST, RunPanel, compress, sparkline
from rlhf_ppo.runtime.logs.progress import ProgressDisplay
from rlhf_ppo.runtime.texts import printable

NUMBERS = {
    "score/mean": 0.712,
    "kl/reference_nats_per_response": 4.21,
    "policy/entropy": 1.83,
    "response/length_tokens": 48.0,
    "policy/clip_fraction": 0.104,
    "value/explained_variance": 0.31,
    "speed": 512.3,
}
SAMPLE = ("Once upon a time, there was", "a little boy named Tim. He was happy.", 0.93)


def shown(panel: RunPanel, width: int = 80, *, styles: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, record=True, force_terminal=True)
    console.print(panel)
    return console.export_text(styles=styles)


def test_a_sparkline_has_a_block_for_each_number_or_for_means_of_neighbours():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 10) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█" and sparkline([3, 3.01], 5) == "▁▁"
    assert sparkline([], 5) == "" == sparkline([1.0], 0)
    assert compress([1, 3, 5, 7, 9], 2) == [2, 7]


def test_numbers_stand_beside_their_targets_and_curves():
    panel = RunPanel(LANGUAGE_MODEL, {"kl_target": 6.0})
    for i in range(5):
        panel.add({**NUMBERS, "score/mean": i / 4}, SAMPLE)
    text = shown(panel)
    assert re.search(r"score +1 ▁▃▅▆█", text) and "4.21 of 6" in text and re.search(r"tokens/s +512", text)
    assert "Once upon a time, there was a little boy named Tim. He was happy.  0.93" in text
    assert "judge" not in text  # there is none
    panel.add({**NUMBERS, "judge/score_mean": 0.5})
    assert re.search(r"judge +0\.5", shown(panel))


def test_what_is_outside_its_healthy_range_is_yellow():
    panel = RunPanel(LANGUAGE_MODEL, {})
    panel.add(NUMBERS)
    assert "\x1b[33m" not in shown(panel, styles=True)
    panel.add({**NUMBERS, "policy/clip_fraction": 0.5})
    assert "\x1b[33m          0.5\x1b[0m" in shown(panel, styles=True)


@pytest.mark.parametrize("width", [30, 50, 68, 80, 200])
def test_it_fits_the_terminal(width):
    panel = RunPanel(LANGUAGE_MODEL, {"kl_target": 6.0})
    for i in range(300):
        panel.add({**NUMBERS, "score/mean": -i / 1000}, ("word " * 100, "said " * 100, -12345.0))
    lines = shown(panel, width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= (4 if width >= 68 else 7) + 3


def test_a_long_run_keeps_few_numbers():
    panel = RunPanel(AGENT, {})
    for i in range(10 * MOST):
        panel.add({"episode/return_mean": float(i)})
    assert len(panel._curves["episode/return_mean"]) <= MOST
    assert re.search(r"return +2\.56e\+03 ▁[▁▂▃▄▅▆▇█]*█", shown(panel))


def test_a_terminal_shows_the_panel_and_plain_output_its_lines(capsys):
    panel = RunPanel(AGENT, {})
    progress = ProgressDisplay("CartPole-v1", 40, panel=panel)
    screen = io.StringIO()
    progress.console = Console(file=screen, force_terminal=True, width=80)
    progress._bar.live.console = progress.console
    with progress:
        progress.show({"episode/return_mean": 21.5})
        progress.update(10, kl=0.25)
        progress._bar.refresh()
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "10/40" in said and "return" in said and "21.5" in said and "kl 0.25" not in said
    with ProgressDisplay("CartPole-v1", 40, panel=RunPanel(AGENT, {})) as plain:
        plain.show({"episode/return_mean": 21.5})
        plain.update(10, kl=0.25)
    assert re.fullmatch(r"CartPole-v1 10/40  .*kl 0\.25\n", capsys.readouterr().err)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_an_update_whose_numbers_are_not_finite_leaves_a_gap(odd):
    panel = RunPanel(LANGUAGE_MODEL, {})
    for value in (1.0, odd, 2.0):
        panel.add({**NUMBERS, "policy/entropy": value}, SAMPLE)
    assert re.search(r"entropy +2 ▁█", shown(panel))
    panel.add({**NUMBERS, "policy/entropy": odd}, SAMPLE)
    assert "entropy" not in shown(panel) and "score" in shown(panel)
    assert sparkline([1, odd, 2], 10) == "▁█" and sparkline([odd], 10) == ""


def test_what_cannot_be_shown_ends_no_run(monkeypatch):
    panel = RunPanel(LANGUAGE_MODEL, {})
    panel.add(NUMBERS)
    monkeypatch.setattr(panel, "_cells", lambda row, width: 1 / 0)
    assert "these numbers cannot be shown: ZeroDivisionError" in shown(panel)


def test_what_a_model_writes_commands_no_terminal():
    panel = RunPanel(LANGUAGE_MODEL, {})
    panel.add(NUMBERS, ("a\x1b[2Jb", "c\x9b31md\x07\x85e", 0.5))
    assert "a\ufffd[2Jb c\ufffd31md\ufffd e  0.5" in shown(panel)
    assert printable("a\tb\r\nc\n\x00é") == "a\tb\nc\n\ufffdé"
