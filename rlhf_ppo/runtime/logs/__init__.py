"""Logs: a run's folder, its metrics, its progress, its trackers."""
