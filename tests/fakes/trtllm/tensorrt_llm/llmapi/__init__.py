"""The names that programs import from ``tensorrt_llm.llmapi``."""

from ..sampling_params import GuidedDecodingParams, SamplingParams
from .disaggregated_params import DisaggregatedParams
from .llm import LLM
from .mm_encoder import MultimodalEncoder

__all__ = [
    "LLM",
    "DisaggregatedParams",
    "GuidedDecodingParams",
    "MultimodalEncoder",
    "SamplingParams",
]
