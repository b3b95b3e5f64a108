"""What every test shares: one torch thread, no network, no window."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch

# Tiny networks on a shared machine: a second thread costs more than it brings.
torch.set_num_threads(1)

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would what they start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
