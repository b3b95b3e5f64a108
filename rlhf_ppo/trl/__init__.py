"""Coming from TRL: where its arguments went."""
