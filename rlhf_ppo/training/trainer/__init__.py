"""What PPOTrainer consists of beside its loop."""
