"""Settings that were removed: what to do instead, and the default at which an old checkpoint still resumes."""

from __future__ import annotations

from typing import Any

_LENGTH = (
    "add a reward function that subtracts it, such as: def shorter(prompts, completions, completion_ids, **columns): "
    "return [-0.01 * max(0, len(ids) - 40) for ids in completion_ids]"
)

REMOVED: dict[str, tuple[Any, str]] = {
    "score_scale": (1.0, "multiply in the reward function, or use reward_weights"),
    "length_penalty": (0.0, _LENGTH),
    "length_penalty_from": (0, _LENGTH),
    "share_reward_base": (False, "leave it out: a reward adapter loads a base of its own"),
}
"""Setting -> (its old default, what to do instead)."""

REMOVED_VALUES: dict[str, dict[str, str]] = {
    "generation": {"continuous": "use generation='auto', 'dynamic' or 'static'"},
}
"""Setting -> value that was removed -> what to do instead."""
