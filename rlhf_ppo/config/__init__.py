"""Settings: nine groups by theme, and RLHFConfig, which is all of them."""
