"""Models: loading them, the policy with its critic, the reference, adapters, forward passes."""
