"""Silence other libraries: their progress bars, deprecation warnings, and warnings that need no action."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from huggingface_hub import utils as hub
from transformers.utils import logging as transformers_logging

LIBRARIES = r"(accelerate|datasets|huggingface_hub|peft|torch|transformers|rlhf_ppo|classic)(\.|$)"
"""Modules whose deprecation warnings are not for the user to act on."""

HARMLESS = (
    "fan_in_fan_out is set to False but the target module is `Conv1D`",  # PEFT then corrects it
    "Could not find a config file in",  # PEFT, saving an adapter of a model without a folder
    "`loss_type=None` was set in the config",  # transformers then uses the default
)
"""First words of warnings that need no action."""


class _Harmless(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(HARMLESS)


@contextmanager
def without_library_bars() -> Iterator[None]:
    """Hide the progress bars of transformers and datasets; downloads from the hub keep theirs."""
    transformers_had = transformers_logging.is_progress_bar_enabled()
    datasets_had = not datasets.are_progress_bars_disabled()
    hub_had = not hub.are_progress_bars_disabled()

    def restore_hub() -> None:  # transformers switches the hub's bars along with its own
        if hub_had:
            hub.enable_progress_bars()

    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    restore_hub()
    try:
        yield
    finally:
        if transformers_had:
            transformers_logging.enable_progress_bar()
        if datasets_had:
            datasets.enable_progress_bars()
        restore_hub()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide bars, and warnings that a command's user cannot act on (``python -W`` shows them all)."""
    handlers = logging.getLogger("transformers").handlers
    harmless = _Harmless()
    with without_library_bars(), warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.filterwarnings("ignore", category=FutureWarning, module=LIBRARIES)
            for message in HARMLESS:
                warnings.filterwarnings("ignore", message=message.replace("`", "."), category=UserWarning)
            for handler in handlers:
                handler.addFilter(harmless)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(harmless)
