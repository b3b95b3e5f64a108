"""Pipeline: what the commands do."""
