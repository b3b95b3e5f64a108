"""Presets: settings for single environments, one YAML file each."""
