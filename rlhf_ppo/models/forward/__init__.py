"""Forward passes: sequences packed or padded, evaluated at their response tokens; decode steps with a cache."""
