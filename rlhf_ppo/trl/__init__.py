"""Migrating from TRL: read, convert and document its PPO arguments."""
