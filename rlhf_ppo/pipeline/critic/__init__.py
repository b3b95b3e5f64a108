"""The critic's laboratory: returns of recorded rollouts, critics that are fitted on them, and what values are worth."""
