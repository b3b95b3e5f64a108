"""Rollouts that other programs sample: a vLLM server, during updates too, or an agent's own loop."""
