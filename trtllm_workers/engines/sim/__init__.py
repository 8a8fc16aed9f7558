"""The sim engine: a scheduler on a clock with a cost model. It makes tokens without a model."""
