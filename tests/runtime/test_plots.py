"""Curves become a PNG, whatever is missing from the records."""

from __future__ import annotations

import struct

import pytest

from rlhf_ppo.runtime.plots import plot_curves

PANELS = {"score/mean": "score", "policy/entropy": "entropy (nats)"}


def size(path) -> tuple[int, int]:
    """Width and height from a PNG's header."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_one_panel_a_metric(tmp_path):
    rows = [{"x": i, "score/mean": i / 10, "policy/entropy": 2.0} for i in range(20)]
    both = plot_curves(rows, tmp_path / "deep" / "both.png", x="x", panels=PANELS, title="t")
    one = plot_curves([{"x": 1, "score/mean": 0.5}], tmp_path / "one.png", x="x", panels=PANELS, title="t")
    assert both == tmp_path / "deep" / "both.png"
    # A panel without data is left out, so the picture is half as wide.
    assert size(both)[0] == pytest.approx(2 * size(one)[0], abs=2)


def test_rows_of_an_evaluation_and_nan_and_nothing_at_all(tmp_path):
    rows = [{"x": 0, "eval/score_mean": 1.0}, {"x": 1, "score/mean": float("nan")}, {"x": 2, "score/mean": 1.0}]
    assert size(plot_curves(rows, tmp_path / "a.png", x="x", panels=PANELS, title="t"))[0] > 100
    assert size(plot_curves([], tmp_path / "b.png", x="x", panels=PANELS, title="t"))[0] > 100
