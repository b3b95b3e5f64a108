"""Data: rows from files and the hub, mixtures, prompts, preferences, chats."""
