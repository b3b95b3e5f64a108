"""Acceleration: the bf16 working copy, compiled layers, kernels by name, recomputed activations."""
