"""A stand-in for TensorRT-LLM 1.2.1; see README.md beside this package."""

from .llmapi import LLM, DisaggregatedParams, SamplingParams

__version__ = "1.2.1"
__all__ = ["LLM", "DisaggregatedParams", "SamplingParams", "__version__"]
