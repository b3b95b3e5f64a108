"""What every test shares: one torch thread, no network, no window."""

from __future__ import annotations

import os
import signal
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

# Tiny networks on a shared machine: a second thread costs more than it brings.
torch.set_num_threads(int(os.environ.get("RLHF_PPO_TEST_THREADS", "1")))

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would what they start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--learning-seeds", type=int, default=1, help="run each learning test on this many seeds")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that learns takes ``learning_seed``: 0, or each of --learning-seeds."""
    if "learning_seed" in metafunc.fixturenames:
        seeds = range(metafunc.config.getoption("--learning-seeds"))
        metafunc.parametrize("learning_seed", seeds, ids=[f"seed{seed}" for seed in seeds])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "learning_seed" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.learning)
        if item.get_closest_marker("cuda") is not None and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


DRAWING = {
    "rlhf_ppo.training.reports.reporting": "plot_at_end",
    "rlhf_ppo.pipeline.labelled.reward_training": "plot_calibration",
    "rlhf_ppo.trainer": "report_run",
    "classic.explain": "report_at_end",
    "classic.report": "plot_at_end",
    "classic.commands": "record_still",
}


@pytest.fixture
def pictures() -> None:
    """Draw pictures in this test."""


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these runs: only tests that ask for ``pictures`` draw."""
    if "pictures" not in request.fixturenames:
        for module, function in DRAWING.items():
            if module in sys.modules:
                monkeypatch.setattr(sys.modules[module], function, lambda *_, **__: None)
