"""Environments: making and stepping them, spaces, masks, normalisation."""

from rlhf_ppo.core.lazy import lazy_names

__getattr__ = lazy_names(__name__, {"Environments": "classic.envs.environments"})
