"""Lines: what a run says beside its results, by the logger "rlhf_ppo"; on standard error by default."""

from __future__ import annotations

import logging
import sys
from functools import cache

from rlhf_ppo.runtime.processes.voice import may_say

LOGGER = logging.getLogger("rlhf_ppo")
"""INFO: what a run does; WARNING: what you should look at."""


class _PlainLines(logging.Handler):
    """Write each line to standard error, unless the program has handlers of its own, which then get them."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            print(prefix + self.format(record), file=sys.stderr, flush=True)


LOGGER.addHandler(_PlainLines())
LOGGER.setLevel(logging.INFO)


@cache
def _say(text: str) -> None:
    if may_say(text):
        LOGGER.warning("%s", text)


def warn_once(text: str) -> None:
    """Warn of something, once in the program, and by one of several processes."""
    _say(text)
