"""PPO for language models; importing this package loads nothing heavy."""

__version__ = "0.1.0"
