"""`rlhf-ppo plan`: a run's memory and time on paper, what breaks first, and which settings make it fit."""
