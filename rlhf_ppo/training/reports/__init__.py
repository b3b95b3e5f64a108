"""Reports of a run: metric lines, evaluations, warnings, and each token's lesson."""
