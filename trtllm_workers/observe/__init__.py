"""Metrics and structured logs. Knows names, not what they mean to the caller."""
