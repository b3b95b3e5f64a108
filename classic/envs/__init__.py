"""Environments: making and stepping them, spaces, masks, normalisation."""
