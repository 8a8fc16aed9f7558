"""Which CUDA graphs TensorRT-LLM captures: batch sizes as it generates them. Captures nothing."""

from __future__ import annotations

from trtllm_workers.lint.document import Document
from trtllm_workers.lint.rules.rule import batch_size, number, switched_off

DEFAULT_LARGEST_GRAPH = 128
"""The largest graph when a config names neither sizes nor a maximum."""


def generated_sizes(largest: int, *, padding: bool) -> tuple[int, ...]:
    """Return the batch sizes TensorRT-LLM makes up for a maximum; that one is always the last.

    With padding a batch may run in the next larger graph, so that few sizes do; without it every
    small size gets a graph of its own.
    """
    sizes = [1, 2, 4, *range(8, 129, 8)] if padding else [*range(1, 33), 64, 128]
    size = 256
    while size < largest:
        sizes.append(size)
        size *= 2
    return (*(size for size in sizes if size < largest), largest)


def graph_sizes(doc: Document) -> tuple[int, ...]:
    """Return the sizes a config asks for, before TensorRT-LLM drops those above max_batch_size."""
    if switched_off(doc, "cuda_graph_config"):
        return ()
    given = doc.get("cuda_graph_config.batch_sizes")
    if isinstance(given, list) and given:
        return tuple(sorted(given))
    largest = number(doc, "cuda_graph_config.max_batch_size", 0) or DEFAULT_LARGEST_GRAPH
    padding = doc.get("cuda_graph_config.enable_padding") is True
    return generated_sizes(largest, padding=padding)


def graph_key(doc: Document) -> str:
    """Return the key that decides the largest graph; the section when nothing in it does."""
    for leaf in ("batch_sizes", "max_batch_size"):
        if doc.given(f"cuda_graph_config.{leaf}"):
            return f"cuda_graph_config.{leaf}"
    return "cuda_graph_config"


def captured_sizes(doc: Document) -> tuple[int, ...]:
    """Return the sizes that will be captured: no batch is ever larger than max_batch_size."""
    return tuple(size for size in graph_sizes(doc) if size <= batch_size(doc))
