"""The command line: settings from YAML and flags, their help, names of the user's own code."""
