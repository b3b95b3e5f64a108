"""A training run's checkpoints: save, resume, compare, and the record of what went wrong."""
