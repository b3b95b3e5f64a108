"""Action masks: what an environment says about which options are allowed, as one bool tensor."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from classic.spaces import ActionLayout


class ActionMasks:
    """Reads masks from ``info["action_mask"]``, or from an environment's method ``action_masks()``.

    A mask lists every option of every choice in a row, True (or 1) where it is allowed; MultiBinary has two options a
    bit, off and on. The same two sources as in sb3-contrib's MaskablePPO and Gymnasium's own environments (Taxi).
    """

    def __init__(self, envs: VectorEnv, actions: ActionLayout, where: str, wanted: bool | None) -> None:
        """Find out whether the environment has the method.

        Args:
            envs: the copies.
            actions: what an action consists of.
            where: begins each message.
            wanted: None uses masks where the environment offers them, True insists, False ignores them.
        Raises:
            ValueError: masks are wanted, but actions are numbers.
        """
        if wanted and not actions.choices:
            raise ValueError(f"{where}: action_masks=True, but its actions are numbers, which cannot be masked")
        self.envs, self.actions, self.where, self.wanted = envs, actions, where, wanted
        self._offsets = np.cumsum([0, *actions.choices[:-1]])
        self._method = bool(actions.choices) and wanted is not False and _has_method(envs)

    def read(self, info: dict[str, Any], resetting: Tensor) -> Tensor | None:
        """Masks [B, options] for the next action, or None if there are none.

        Args:
            info: what reset or step returned.
            resetting: [B] bool, copies whose next action is ignored: everything is allowed there.
        Raises:
            ValueError: a mask is missing, has the wrong length, or allows nothing.
        """
        if self.wanted is False or not self.actions.choices:
            return None
        if "action_mask" in info:
            given = np.asarray(info["action_mask"], dtype=object if info["action_mask"].dtype == object else bool)
            present = np.asarray(info.get("_action_mask", np.ones(len(given), dtype=bool)))
        elif self._method:
            given = self.envs.call("action_masks")  # pyright: ignore
            present = np.ones(len(given), dtype=bool)
        elif self.wanted:
            raise ValueError("action_masks=True, but there is neither infos['action_mask'] nor a method action_masks()")
        else:
            return None
        ignored = resetting.numpy()
        options = self.actions.num_outputs
        masks = np.ones((len(ignored), options), dtype=bool)
        for copy in np.flatnonzero(~ignored):
            row = np.concatenate([np.ravel(part) for part in _parts(given[copy])]).astype(bool) if present[copy] else ()
            if len(row) != options:
                raise ValueError(f"the action mask of copy {copy} must have {options} entries, got {len(row)}")
            masks[copy] = row
        empty = ~np.logical_or.reduceat(masks, self._offsets, axis=1).all(axis=1)
        if empty.any():
            raise ValueError(f"the action mask of copy {np.flatnonzero(empty)[0]} allows nothing")
        return torch.from_numpy(masks)


def _parts(mask: Any) -> list[Any]:
    """A mask of several choices may come as one row or as one array a choice."""
    return list(mask) if isinstance(mask, (list, tuple)) else [mask]


def _has_method(envs: VectorEnv) -> bool:
    inner = envs.unwrapped
    if hasattr(inner, "envs"):
        return all(env.has_wrapper_attr("action_masks") for env in inner.envs)  # pyright: ignore
    if not hasattr(inner, "env_fns"):
        return False
    # Asking a process for what it has not would end it: look at a copy of our own.
    probe: gymnasium.Env = inner.env_fns[0]()  # pyright: ignore
    try:
        return probe.has_wrapper_attr("action_masks")
    finally:
        probe.close()
