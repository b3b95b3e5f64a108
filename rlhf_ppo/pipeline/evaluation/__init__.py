"""Evaluation: `rlhf-ppo evaluate`, its settings and intervals."""
