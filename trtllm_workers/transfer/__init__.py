"""Moving KV blocks between workers: handoffs (pure) and transports."""
