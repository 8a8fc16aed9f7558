"""trtllm-launch: start and serve LLMs with TensorRT-LLM. Holds the version; imports nothing."""

__version__ = "0.1.0"
