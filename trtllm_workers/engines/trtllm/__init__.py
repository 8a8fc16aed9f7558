"""The adapter to TensorRT-LLM's LLM API: the only package that imports ``tensorrt_llm``."""
