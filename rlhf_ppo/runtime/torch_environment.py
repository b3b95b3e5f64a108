"""Environment variables that torch and OpenMP read once, when they load; imported before either of them."""

from __future__ import annotations

import os
import sys

# torch backs large CPU tensors with huge pages if it finds this before the first one is made (Linux; elsewhere nothing
# happens): logits and gradients of a vocabulary otherwise cost thousands of page faults each time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Threads that wait for each other sleep instead of keeping a CPU busy, which on a machine with anything else to do
# costs an iteration many times its work (docs/performance.md). Worker processes inherit it. GOMP_SPINCOUNT and
# KMP_BLOCKTIME, where somebody set them, still win.
THREADS_SPIN = "torch" in sys.modules and os.environ.keys().isdisjoint(
    ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
)
"""Whether torch was loaded first, so that it is too late; runs with several threads say so."""
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
