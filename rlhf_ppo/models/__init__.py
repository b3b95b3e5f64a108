"""Models: load them, add adapters, the policy with its critic, the reference, forward passes, saving."""

from rlhf_ppo.core.lazy import lazy_names

__getattr__ = lazy_names(
    __name__, dict.fromkeys(("EMBEDDED_MODEL", "load_policy", "load_tokenizer"), "rlhf_ppo.models.loading")
)
