"""Other libraries' noise: silent inside a command, as it was afterwards, and what matters is still said."""

from __future__ import annotations

import logging
import sys
import warnings

import datasets
import pytest
from huggingface_hub import utils as hub
from transformers.utils import logging as transformers_logging

from rlhf_ppo.cli import main
from rlhf_ppo.models.quiet_libraries import quiet_libraries, without_library_bars


def bars() -> tuple[bool, bool, bool]:
    return (
        transformers_logging.is_progress_bar_enabled(),
        not datasets.are_progress_bars_disabled(),
        not hub.are_progress_bars_disabled(),
    )


@pytest.fixture
def bars_on():
    before = bars()
    transformers_logging.enable_progress_bar()
    datasets.enable_progress_bars()
    yield
    for was, library in zip(before, (transformers_logging, datasets), strict=False):
        if not was:
            getattr(library, "disable_progress_bar", getattr(library, "disable_progress_bars", None))()


def test_bars_are_off_inside_and_as_they_were_afterwards(bars_on):
    with pytest.raises(KeyError), without_library_bars():
        assert bars() == (False, False, True)  # what a download draws stays
        raise KeyError
    assert bars() == (True, True, True)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with without_library_bars():
        assert bars() == (False, False, False)
    assert bars() == (False, False, False)


def warn(category: type[Warning], module: str, text: str = "soon") -> None:
    warnings.warn_explicit(text, category, f"{module}.py", 1, module=module)


def test_a_library_s_future_is_not_shown_and_the_user_s_own_is(monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet_libraries():
            warn(FutureWarning, "transformers.modeling_utils")
            warn(FutureWarning, "rlhf_ppo.training.update")  # a library's, said of the line that called it
            warn(FutureWarning, "my_reward", "mine")
            warn(FutureWarning, "torchy", "of another package")
            warn(
                UserWarning,
                "peft.tuners",
                "fan_in_fan_out is set to False but the target module is `Conv1D`. And so on",
            )
            warn(UserWarning, "peft.tuners", "the adapter is empty")
        warn(FutureWarning, "transformers.modeling_utils", "afterwards")
    said = [str(warning.message) for warning in seen]
    assert said == ["mine", "of another package", "the adapter is empty", "afterwards"]


def test_python_w_brings_all_of_them_back(monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", ["always"])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet_libraries():
            warn(FutureWarning, "transformers.modeling_utils")
    assert len(seen) == 1


def test_transformers_log_says_what_matters_and_no_more(monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", [])
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with quiet_libraries():
            logger.warning("`loss_type=None` was set in the config but it is unrecognized.")
            logger.warning("weights are MISSING")
        logger.warning("`loss_type=None` again")
    finally:
        logger.removeHandler(handler)
    assert said == ["weights are MISSING", "`loss_type=None` again"]


def test_commands_are_quiet_and_leave_nothing_changed(monkeypatch, bars_on):
    seen = []
    monkeypatch.setattr("rlhf_ppo.runtime.checkpoints.resume.check", lambda args: seen.append(bars()) or 0)
    filters = list(warnings.filters)
    assert main(["check", "folder"]) == 0
    assert seen == [(False, False, True)] and bars() == (True, True, True) and warnings.filters == filters
