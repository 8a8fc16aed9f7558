"""Settings with their sources: engine YAML, environment, flags. Starts nothing."""
