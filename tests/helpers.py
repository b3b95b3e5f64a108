"""What several test files need, imported by name; fixtures are in the conftest files."""

from __future__ import annotations

from typing import Any

import torch


def f64(x: Any) -> torch.Tensor:
    """Return numbers as a float64 tensor, in which closed forms hold to default tolerances."""
    return torch.tensor(x, dtype=torch.float64)
