"""Frozen parts of a critic's own trunk: its attention layers, or all of it."""

from __future__ import annotations

from typing import Literal

from torch import nn

FrozenParts = Literal["none", "attention", "trunk"]


def freeze_critic(trunk: nn.Module, parts: FrozenParts) -> None:
    """Let the critic's updates leave ``parts`` of its trunk as they are.

    Attention layers are the modules whose class or name says so, in the spelling of transformers (GPT2Attention,
    self_attn); their norms and projections are frozen with them.

    Raises:
        ValueError: attention is to be frozen, but the trunk has none, or nothing else.
    Source: Hou et al., "Single-Rollout Asynchronous Optimization" (SAO, 2026), section 3.2.
    """
    if parts == "none":
        return
    if parts == "trunk":
        trunk.requires_grad_(False)
        return
    attention = [module for name, module in trunk.named_modules() if name and _is_attention(name, module)]
    for module in attention:
        module.requires_grad_(False)
    if not attention or not any(p.requires_grad for p in trunk.parameters()):
        which = "has no layer with attention in its name" if not attention else "has nothing but attention layers"
        raise ValueError(
            f"critic_frozen='attention', but the value_model ({type(trunk).__name__}) {which}: set critic_frozen to "
            "'none' or 'trunk'"
        )


def _is_attention(name: str, module: nn.Module) -> bool:
    words = f"{type(module).__name__} {name.rpartition('.')[2]}".lower()
    # A norm before the attention layer is none of it, though it is called so.
    return ("attention" in words or "attn" in words) and "norm" not in words
