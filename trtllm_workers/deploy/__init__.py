"""From settings to running processes: plan, commands, supervision. Knows no HTTP route."""
