"""Rules about batch, token and length limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.lint.documents import (
    Case,
    Silent,
    aggregated,
    assert_fires,
    assert_silent,
    decode,
    document,
    prefill,
)
from trtllm_workers.lint.context import LintContext
from trtllm_workers.lint.problem import Severity
from trtllm_workers.lint.rules.graphs import captured_sizes, generated_sizes, graph_sizes
from trtllm_workers.types import Role

FRACTION = "kv_cache_config.free_gpu_memory_fraction"
MTP = {"spec__decoding_type": "MTP", "spec__num_nextn_predict_layers": 1}
EAGLE3 = {"spec__decoding_type": "Eagle", "spec__max_draft_len": 3, "spec__speculative_model": "d"}

FIRES = [
    Case(
        "batch-above-tokens",
        Severity.WARNING,
        "max_batch_size",
        "max_num_tokens 256",
        [aggregated(max_batch_size=512, max_num_tokens=256)],
    ),
    Case(
        "batch-above-tokens",
        Severity.WARNING,
        "max_num_tokens",
        "2048, TensorRT-LLM's default,",
        [decode(max_num_tokens=1024)],
    ),
    Case(
        "prompt-above-tokens",
        Severity.ERROR,
        "max_num_tokens",
        "longest input 10000 > max_num_tokens 8192",
        [prefill()],
        LintContext(isl=10000),
    ),
    Case(
        "prompt-above-tokens",
        Severity.ERROR,
        "max_num_tokens",
        "max_num_tokens: 600",
        [aggregated(max_num_tokens=512, max_batch_size=8)],
        LintContext(isl=600),
    ),
    Case(
        "sequence-above-tokens",
        Severity.WARNING,
        "max_seq_len",
        "max_seq_len 16384 > max_num_tokens 8192",
        [prefill(max_seq_len=16384)],
    ),
    Case(
        "sequence-too-short",
        Severity.ERROR,
        "max_seq_len",
        "8192 input + 256 output = 8448 > 8192",
        [decode(max_seq_len=8192)],
        LintContext(isl=8192, osl=256),
    ),
    Case(
        "sequence-too-short",
        Severity.ERROR,
        "max_seq_len",
        "8192 input + 1 output = 8193 > 8192",
        [prefill(max_seq_len=8192)],
        LintContext(isl=8192, osl=256),
    ),
    Case(
        "input-too-short",
        Severity.WARNING,
        "max_input_len",
        "1024",
        [aggregated(max_input_len=1024)],
        LintContext(isl=4096),
    ),
    Case(
        "draft-graph-tokens",
        Severity.ERROR,
        "max_num_tokens",
        "256 streams × (num_nextn_predict_layers 1 + 1) = 512 > max_num_tokens 256",
        [decode(**MTP, max_batch_size=256, max_num_tokens=256, graph__max_batch_size=256)],
    ),
    Case(
        "draft-graph-tokens",
        Severity.ERROR,
        "max_num_tokens",
        "64 streams × (max_draft_len 3 + 1) = 256 > max_num_tokens 128",
        [aggregated(**EAGLE3, max_batch_size=64, max_num_tokens=128, graph__batch_sizes=[1, 64])],
    ),
    Case(
        "draft-batch-tokens",
        Severity.WARNING,
        "max_num_tokens",
        "max_batch_size 256 × (num_nextn_predict_layers 1 + 1) = 512 > max_num_tokens 300",
        [decode(**MTP, max_batch_size=256, max_num_tokens=300)],
    ),
    Case(
        "graph-above-batch",
        Severity.WARNING,
        "cuda_graph_config.batch_sizes",
        "remove them from batch_sizes, or raise max_batch_size to 128",
        [decode(max_batch_size=32, graph__batch_sizes=[1, 32, 64, 128])],
    ),
    Case(
        "graph-above-batch",
        Severity.WARNING,
        "cuda_graph_config.max_batch_size",
        "and 12 more",
        [decode(max_batch_size=8, graph__max_batch_size=128, graph__enable_padding=True)],
    ),
    Case(
        "graph-below-batch",
        Severity.NOTE,
        "cuda_graph_config.max_batch_size",
        "129 to 256",
        [decode(max_batch_size=256)],
    ),
    Case(
        "block-size-power",
        Severity.ERROR,
        "kv_cache_config.tokens_per_block",
        "32 or 64",
        [aggregated(kv__tokens_per_block=48)],
    ),
    Case(
        "block-size-power",
        Severity.ERROR,
        "kv_cache_config.tokens_per_block",
        "0 is no power",
        [aggregated(kv__tokens_per_block=0)],
    ),
    Case(
        "kv-fraction",
        Severity.WARNING,
        FRACTION,
        "0.95",
        [decode(kv__free_gpu_memory_fraction=0.95)],
    ),
    Case(
        "kv-fraction",
        Severity.ERROR,
        FRACTION,
        "no memory for KV",
        [aggregated(kv__free_gpu_memory_fraction=0.0)],
    ),
    Case(
        "kv-fraction",
        Severity.WARNING,
        FRACTION,
        "0.9%",
        [aggregated(kv__free_gpu_memory_fraction=0.009)],
    ),
]

SILENT = [
    Silent("batch-above-tokens", "equal", [decode(max_batch_size=256, max_num_tokens=256)]),
    Silent("batch-above-tokens", "defaults", [decode()]),
    Silent("prompt-above-tokens", "it fits", [prefill()], LintContext(isl=8192)),
    Silent(
        "prompt-above-tokens",
        "in chunks",
        [prefill(enable_chunked_prefill=True)],
        LintContext(isl=10000),
    ),
    Silent(
        "prompt-above-tokens", "decode gets KV", [decode(max_num_tokens=256)], LintContext(isl=8192)
    ),
    Silent("prompt-above-tokens", "the workload is not known", [prefill(max_num_tokens=16)]),
    Silent("sequence-above-tokens", "decode", [decode(max_seq_len=16384)]),
    Silent(
        "sequence-above-tokens",
        "the longest prompt fits",
        [aggregated(max_seq_len=16384)],
        LintContext(isl=8000),
    ),
    Silent(
        "sequence-above-tokens",
        "in chunks",
        [aggregated(max_seq_len=16384, enable_chunked_prefill=True)],
    ),
    Silent(
        "sequence-too-short",
        "it fits",
        [decode(max_seq_len=8448), prefill(max_seq_len=8193)],
        LintContext(isl=8192, osl=256),
    ),
    Silent("sequence-too-short", "unset", [decode()], LintContext(isl=8192, osl=256)),
    Silent(
        "sequence-too-short", "the output is not known", [decode(max_seq_len=1)], LintContext(isl=1)
    ),
    Silent("input-too-short", "unset", [aggregated()], LintContext(isl=4096)),
    Silent("input-too-short", "enough", [aggregated(max_input_len=4096)], LintContext(isl=4096)),
    Silent(
        "draft-graph-tokens",
        "twice the batch",
        [decode(**MTP, max_batch_size=256, max_num_tokens=512, graph__max_batch_size=256)],
    ),
    Silent(
        "draft-graph-tokens",
        "graphs are off",
        [
            document(
                Role.DECODE,
                {
                    "speculative_config.decoding_type": "MTP",
                    "max_num_tokens": 16,
                    "cuda_graph_config": None,
                },
            )
        ],
    ),
    Silent(
        "draft-graph-tokens",
        "no speculation",
        [decode(max_batch_size=256, max_num_tokens=256, graph__max_batch_size=256)],
    ),
    Silent("draft-batch-tokens", "room for all", [decode(**MTP, max_batch_size=256)]),
    Silent(
        "draft-batch-tokens",
        "the graphs have told it",
        [decode(**MTP, max_batch_size=256, max_num_tokens=256, graph__max_batch_size=256)],
    ),
    Silent(
        "draft-batch-tokens",
        "prefill drafts for few",
        [prefill(**MTP, max_batch_size=256, max_num_tokens=300)],
    ),
    Silent(
        "graph-above-batch", "as large", [decode(max_batch_size=64, graph__batch_sizes=[1, 64])]
    ),
    Silent("graph-above-batch", "nobody asked for them", [decode(max_batch_size=8)]),
    Silent("graph-below-batch", "within the default", [decode(max_batch_size=128)]),
    Silent("graph-below-batch", "chosen", [decode(max_batch_size=256, graph__max_batch_size=64)]),
    Silent("graph-below-batch", "prefill runs none", [prefill(max_batch_size=256)]),
    Silent(
        "block-size-power",
        "powers of two",
        [aggregated(kv__tokens_per_block=64), aggregated(kv__tokens_per_block=1)],
    ),
    Silent("kv-fraction", "room", [decode(kv__free_gpu_memory_fraction=0.85)]),
    Silent("kv-fraction", "no transceiver", [aggregated(kv__free_gpu_memory_fraction=0.95)]),
]


@pytest.mark.parametrize("case", FIRES, ids=lambda case: case.id)
def test_rule_speaks(case: Case, tmp_path: Path) -> None:
    assert_fires(case, tmp_path)


@pytest.mark.parametrize("case", SILENT, ids=lambda case: case.id)
def test_rule_is_silent(case: Silent, tmp_path: Path) -> None:
    assert_silent(case, tmp_path)


def test_sizes_with_padding_are_few_and_end_with_the_maximum() -> None:
    eights = tuple(range(8, 129, 8))
    assert generated_sizes(128, padding=True) == (1, 2, 4, *eights)
    assert generated_sizes(100, padding=True) == (1, 2, 4, *range(8, 97, 8), 100)
    assert generated_sizes(600, padding=True) == (1, 2, 4, *eights, 256, 512, 600)
    assert generated_sizes(3, padding=True) == (1, 2, 3)


def test_sizes_without_padding_hold_every_small_batch() -> None:
    assert generated_sizes(128, padding=False) == (*range(1, 32), 32, 64, 128)
    assert generated_sizes(16, padding=False) == tuple(range(1, 17))
    assert generated_sizes(1024, padding=False) == (*range(1, 33), 64, 128, 256, 512, 1024)
    assert generated_sizes(1, padding=False) == (1,)


def test_sizes_of_a_config_are_its_own_list_or_generated_or_none() -> None:
    assert graph_sizes(decode(graph__batch_sizes=[8, 1])) == (1, 8)
    assert graph_sizes(decode())[-1] == 128
    assert graph_sizes(document(Role.DECODE, {"cuda_graph_config": None})) == ()
    assert captured_sizes(decode(graph__batch_sizes=[1, 8, 16], max_batch_size=8)) == (1, 8)
