"""What every test shares: one torch thread, no network, no window."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch

# Tiny networks on a shared machine: a second thread costs more than it brings.
torch.set_num_threads(1)
