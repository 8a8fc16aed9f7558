"""Checks engine configs of TensorRT-LLM without TensorRT-LLM: keys, types, rules, memory."""
