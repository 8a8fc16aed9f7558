"""The OpenAI-compatible HTTP process. Knows workers only through discovery and the plane."""
