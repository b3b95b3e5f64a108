"""Coming from other projects: read the arguments of their PPO, convert and document them."""
