"""Shortcuts: the same numbers as the plain way, faster."""
