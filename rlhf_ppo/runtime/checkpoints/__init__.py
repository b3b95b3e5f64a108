"""Checkpoints: write, verify, find and load them."""
