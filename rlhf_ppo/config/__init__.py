"""Settings: groups by theme, and RLHFConfig, which is all of them."""

from rlhf_ppo.core.lazy import lazy_names

__getattr__ = lazy_names(__name__, {"RLHFConfig": "rlhf_ppo.config.rlhf"})
