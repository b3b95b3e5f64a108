"""Supervised training: `rlhf-ppo sft` and `rlhf-ppo reward`."""
