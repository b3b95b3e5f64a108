"""Training on labelled data: `rlhf-ppo sft` and `rlhf-ppo reward`."""
