"""Shortcuts that compute what the plain way does, faster; :mod:`classic.fast.switch` chooses."""
