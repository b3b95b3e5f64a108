"""Pipeline: the work of each command."""
