"""A run's models: load and shard them, fit them to the settings."""
