"""Costs on paper: a model's shape from its config, and the memory and time of a run's phases as sums of terms."""
