"""Rollouts: responses sampled from the policy, read with the reference and scored."""
