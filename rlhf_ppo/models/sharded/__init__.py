"""Sharded models: FSDP2, weights that are loaded late, processes in step."""
