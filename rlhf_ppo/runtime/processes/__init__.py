"""Processes: how a run was launched, what its processes exchange, and how work is divided among them."""
