"""Environments: what a conversation is held with, one for each; and adapters for those of other libraries."""

from __future__ import annotations

from rlhf_ppo.generation.environments.adapters import Environments, gymnasium_environment, openenv_environment
from rlhf_ppo.generation.environments.episodes import TextEnvironment
from rlhf_ppo.generation.environments.reasoning_gym import ReasoningGym

__all__ = ["Environments", "ReasoningGym", "TextEnvironment", "gymnasium_environment", "openenv_environment"]
