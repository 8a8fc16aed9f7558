"""Rules about prefill and decode together."""

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
    encode,
    findings,
    prefill,
    without,
)
from trtllm_workers.lint.context import LintContext
from trtllm_workers.lint.problem import Severity
from trtllm_workers.types import Role

DTYPE = "kv_cache_config.dtype"
BLOCK = "kv_cache_config.tokens_per_block"
WINDOW = "kv_cache_config.max_attention_window"
BUFFER = "cache_transceiver_config.max_tokens_in_buffer"

FIRES = [
    Case(
        "encode-dtype",
        Severity.ERROR,
        "dtype",
        "auto here and float16 in encode.yaml",
        [encode(dtype="float16"), aggregated()],
    ),
    Case(
        "encode-dtype",
        Severity.ERROR,
        "dtype",
        "bfloat16 here and auto in encode.yaml",
        [encode(), prefill(dtype="bfloat16")],
    ),
    Case(
        "encode-model",
        Severity.ERROR,
        "revision",
        "unset here and v2 in encode.yaml",
        [encode(revision="v2"), aggregated()],
    ),
    Case(
        "pair-kv-dtype",
        Severity.ERROR,
        DTYPE,
        "auto here and fp8 in prefill.yaml",
        [prefill(kv__dtype="fp8"), decode()],
    ),
    Case(
        "pair-block-size",
        Severity.ERROR,
        BLOCK,
        "64 here and 32 in prefill.yaml",
        [prefill(), decode(kv__tokens_per_block=64)],
    ),
    Case(
        "pair-transceiver",
        Severity.ERROR,
        "cache_transceiver_config.backend",
        "NIXL here and UCX in prefill.yaml",
        [prefill(), decode(kvt__backend="NIXL")],
    ),
    Case(
        "pair-transceiver",
        Severity.ERROR,
        "cache_transceiver_config.backend",
        "NIXL here and UCX",
        [
            without(prefill(), "cache_transceiver_config.backend"),
            decode(kvt__backend="NIXL"),
        ],
        LintContext(kv_transport="ucx"),
    ),
    Case(
        "pair-buffer",
        Severity.WARNING,
        BUFFER,
        "8192 tokens here and 16384 in prefill.yaml",
        [prefill(), decode(kvt__max_tokens_in_buffer=8192)],
    ),
    Case(
        "pair-buffer",
        Severity.WARNING,
        BUFFER,
        "16384 tokens in the buffer < max_seq_len 32768",
        [prefill(max_seq_len=32768), decode()],
    ),
    Case(
        "pair-dtype",
        Severity.ERROR,
        "dtype",
        "float16 here and bfloat16",
        [prefill(dtype="bfloat16"), decode(dtype="float16")],
    ),
    Case(
        "pair-length",
        Severity.WARNING,
        "max_seq_len",
        "decode 4096 < prefill 8192",
        [prefill(max_seq_len=8192), decode(max_seq_len=4096)],
    ),
    Case(
        "pair-length",
        Severity.NOTE,
        "max_seq_len",
        "8448 here and 8192 in prefill.yaml",
        [prefill(max_seq_len=8192), decode(max_seq_len=8448)],
    ),
    Case(
        "pair-model",
        Severity.ERROR,
        "load_format",
        "DUMMY here and AUTO",
        [prefill(), decode(load_format="DUMMY")],
    ),
    Case(
        "pair-model",
        Severity.ERROR,
        "sparse_attention_config.algorithm",
        "rocket here and unset",
        [prefill(), decode(**{"sparse_attention_config.algorithm": "rocket"})],
    ),
    Case(
        "pair-attention-window",
        Severity.ERROR,
        WINDOW,
        "unset here and [128, 8192]",
        [prefill(kv__max_attention_window=[128, 8192]), decode()],
    ),
    Case(
        "pair-block-reuse",
        Severity.NOTE,
        "kv_cache_config.enable_block_reuse",
        "false here and true in prefill.yaml",
        [prefill(), decode(kv__enable_block_reuse=False)],
    ),
]

EQUAL = [prefill(), decode()]
SILENT = [
    Silent("encode-dtype", "equal", [encode(dtype="float16"), aggregated(dtype="float16")]),
    Silent("encode-dtype", "alone", [encode(dtype="float16")]),
    Silent("encode-model", "equal", [encode(revision="v2"), aggregated(revision="v2")]),
    Silent("pair-kv-dtype", "equal", EQUAL),
    Silent("pair-kv-dtype", "no pair", [prefill(kv__dtype="fp8"), aggregated()]),
    Silent(
        "pair-kv-dtype",
        "a wrong type has been reported",
        [prefill(kv__dtype="fp8"), document(Role.DECODE, unread=[DTYPE])],
    ),
    Silent(
        "pair-block-size",
        "one writes the default",
        [prefill(), decode(kv__tokens_per_block=32)],
    ),
    Silent("pair-transceiver", "equal", EQUAL),
    Silent(
        "pair-transceiver",
        "the launcher writes the same",
        [without(prefill(), "cache_transceiver_config.backend"), decode()],
        LintContext(kv_transport="ucx"),
    ),
    Silent("pair-buffer", "equal", EQUAL),
    Silent("pair-dtype", "equal", EQUAL),
    Silent("pair-length", "unset on one side", [prefill(max_seq_len=8192), decode()]),
    Silent("pair-length", "equal", [prefill(max_seq_len=8192), decode(max_seq_len=8192)]),
    Silent(
        "pair-model", "in another case", [prefill(load_format="dummy"), decode(load_format="DUMMY")]
    ),
    Silent("pair-attention-window", "equal", EQUAL),
    Silent("pair-block-reuse", "equal", EQUAL),
]


@pytest.mark.parametrize("case", FIRES, ids=lambda case: case.id)
def test_rule_speaks(case: Case, tmp_path: Path) -> None:
    assert_fires(case, tmp_path)


@pytest.mark.parametrize("case", SILENT, ids=lambda case: case.id)
def test_rule_is_silent(case: Silent, tmp_path: Path) -> None:
    assert_silent(case, tmp_path)


def test_every_prefill_is_compared_with_every_decode(tmp_path: Path) -> None:
    other = document(Role.DECODE, {"kv_cache_config.dtype": "fp8"}, name="other.yaml")
    third = document(Role.PREFILL, {"kv_cache_config.dtype": "fp8"}, name="third.yaml")
    case = Silent("pair-kv-dtype", "", [prefill(), third, decode(), other])
    found = [p for p in findings(case, tmp_path) if p.rule == "pair-kv-dtype"]
    assert [(p.file, "third.yaml" in p.message) for p in found] == [
        ("other.yaml", False),
        ("decode.yaml", True),
    ]
