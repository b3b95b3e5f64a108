"""Recorded rollouts: write them, read them, train on them again."""
