"""Dropout is off in PPO, updates included: with it, the ratio of new to old log-probs would measure its noise."""

from __future__ import annotations

from torch import nn


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch dropout off: put the model into evaluation mode, in which it samples and trains."""
    return model.eval()


def freeze(model: nn.Module) -> nn.Module:
    """Switch dropout and gradients off."""
    return without_dropout(model).requires_grad_(False)
