"""Diagnosis: what can go wrong in a run, how its metrics show it, and which settings to change."""
