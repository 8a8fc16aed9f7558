"""The embedded engine: real Hugging Face models on torch, paged KV cache."""
