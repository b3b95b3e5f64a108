"""Training: one PPO iteration, from prompts to an updated policy, and what keeps a run safe."""
