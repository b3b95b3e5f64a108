"""`rlhf-ppo doctor`: examine a run before it starts, and say what would go wrong and which setting prevents it."""
