"""A worker process: an engine behind the request plane. Knows no HTTP."""
