"""Arguments of the commands, one record for each."""
