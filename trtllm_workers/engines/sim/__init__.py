"""The simulator engine: a scheduler on a clock that makes tokens without a model."""
