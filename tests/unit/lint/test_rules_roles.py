"""Rules about what a role needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.lint.documents import (
    LLAMA_8B,
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

BACKEND = "cache_transceiver_config.backend"
BUFFER = "cache_transceiver_config.max_tokens_in_buffer"
TIMEOUT = "cache_transceiver_config.kv_transfer_timeout_ms"
OVERLAP = "disable_overlap_scheduler"
FILLS = LintContext(sets_role_keys=True)

FIRES = [
    Case("prefill-overlap", Severity.ERROR, OVERLAP, "true", [without(prefill(), OVERLAP)]),
    Case(
        "prefill-overlap",
        Severity.ERROR,
        OVERLAP,
        "is on",
        [prefill(disable_overlap_scheduler=False)],
        FILLS,
    ),
    Case("transceiver-missing", Severity.ERROR, BACKEND, "prefill", [without(prefill(), BACKEND)]),
    Case("transceiver-missing", Severity.ERROR, BACKEND, "decode", [without(decode(), BACKEND)]),
    Case(
        "transceiver-missing",
        Severity.ERROR,
        BACKEND,
        "is off",
        [document(Role.DECODE, {"cache_transceiver_config": None})],
        LintContext(sets_role_keys=True, kv_transport="UCX"),
    ),
    Case(
        "transceiver-missing",
        Severity.ERROR,
        BACKEND,
        "decode worker",
        [decode(kvt__backend=None)],
        FILLS,
    ),
    Case(
        "transceiver-default", Severity.WARNING, BACKEND, "NIXL", [decode(kvt__backend="DEFAULT")]
    ),
    Case("transceiver-deprecated", Severity.WARNING, BACKEND, "MPI", [decode(kvt__backend="MPI")]),
    Case(
        "transceiver-transport",
        Severity.ERROR,
        BACKEND,
        "says NIXL",
        [decode(kvt__backend="UCX")],
        LintContext(kv_transport="nixl"),
    ),
    Case("transceiver-beams", Severity.ERROR, "max_beam_width", "4", [prefill(max_beam_width=4)]),
    Case("transceiver-buffer", Severity.WARNING, BUFFER, "unset", [without(decode(), BUFFER)]),
    Case(
        "transceiver-buffer",
        Severity.ERROR,
        BUFFER,
        "max_tokens_in_buffer: 20000",
        [prefill()],
        LintContext(isl=19990),
    ),
    Case(
        "transceiver-buffer",
        Severity.WARNING,
        BUFFER,
        "dead-lock",
        [prefill(max_seq_len=32768, enable_chunked_prefill=True)],
    ),
    Case(
        "transceiver-buffer-blocks",
        Severity.WARNING,
        BUFFER,
        "1000 mod 32 = 8",
        [decode(kvt__max_tokens_in_buffer=1000)],
    ),
    Case(
        "transceiver-timeout", Severity.WARNING, TIMEOUT, "for ever", [without(decode(), TIMEOUT)]
    ),
    Case(
        "transceiver-timeout",
        Severity.WARNING,
        TIMEOUT,
        "8192 tokens × 131072 bytes = 1.0 GiB",
        [decode(kvt__kv_transfer_timeout_ms=500)],
        LintContext(isl=8192),
        LLAMA_8B,
    ),
    Case(
        "transceiver-timeout",
        Severity.WARNING,
        TIMEOUT,
        "for ever",
        [decode(kvt__kv_transfer_timeout_ms=None)],
        FILLS,
    ),
    Case(
        "transceiver-unused",
        Severity.NOTE,
        "cache_transceiver_config",
        "aggregated",
        [aggregated(kvt__backend="UCX")],
    ),
    Case(
        "transceiver-unused",
        Severity.NOTE,
        "cache_transceiver_config",
        "encode",
        [encode(kvt__backend="UCX")],
    ),
    Case(
        "encoder-only", Severity.ERROR, "mm_encoder_only", "decode", [decode(mm_encoder_only=True)]
    ),
    Case(
        "encoder-only",
        Severity.WARNING,
        "speculative_config",
        "encode",
        [encode(spec__decoding_type="NGram", spec__max_draft_len=2)],
    ),
]

SILENT = [
    Silent("prefill-overlap", "it is off", [prefill()]),
    Silent("prefill-overlap", "decode may overlap", [decode()]),
    Silent("prefill-overlap", "the launcher sets it", [without(prefill(), OVERLAP)], FILLS),
    Silent("transceiver-missing", "it is given", [prefill(), decode()]),
    Silent("transceiver-missing", "nothing is handed over", [aggregated()]),
    Silent("transceiver-missing", "the launcher sets it", [without(decode(), BACKEND)], FILLS),
    Silent(
        "transceiver-missing",
        "the launcher's transport is known",
        [without(decode(), BACKEND)],
        LintContext(kv_transport="UCX"),
    ),
    Silent(
        "transceiver-missing",
        "a wrong type has been reported",
        [document(Role.DECODE, unread=[BACKEND])],
    ),
    Silent("transceiver-default", "UCX is named", [prefill(), decode()]),
    Silent("transceiver-deprecated", "NIXL is named", [decode(kvt__backend="NIXL")]),
    Silent(
        "transceiver-transport",
        "both say UCX",
        [decode(kvt__backend="UCX")],
        LintContext(kv_transport="ucx"),
    ),
    Silent(
        "transceiver-transport",
        "the transport is none of TensorRT-LLM's",
        [decode(kvt__backend="UCX")],
        LintContext(kv_transport="tcp"),
    ),
    Silent("transceiver-transport", "no transport is known", [decode(kvt__backend="UCX")]),
    Silent("transceiver-beams", "one beam", [prefill(max_beam_width=1)]),
    Silent("transceiver-beams", "aggregated may", [aggregated(max_beam_width=4)]),
    Silent("transceiver-buffer", "it holds the prompt", [prefill()], LintContext(isl=16384)),
    Silent(
        "transceiver-buffer",
        "decode's max_seq_len counts the answer too",
        [decode(max_seq_len=32768)],
    ),
    Silent(
        "transceiver-buffer",
        "a wrong type has been reported",
        [document(Role.DECODE, unread=[BUFFER])],
    ),
    Silent("transceiver-buffer-blocks", "whole blocks", [decode(kvt__max_tokens_in_buffer=992)]),
    Silent("transceiver-timeout", "long enough", [decode()], LintContext(isl=8192), LLAMA_8B),
    Silent("transceiver-timeout", "the launcher sets it", [without(decode(), TIMEOUT)], FILLS),
    Silent(
        "transceiver-timeout",
        "the model is not known",
        [decode(kvt__kv_transfer_timeout_ms=1)],
        LintContext(isl=8192),
    ),
    Silent("transceiver-unused", "decode uses it", [decode()]),
    Silent("transceiver-unused", "aggregated without", [aggregated()]),
    Silent("encoder-only", "encode may", [encode(mm_encoder_only=True)]),
]


@pytest.mark.parametrize("case", FIRES, ids=lambda case: case.id)
def test_rule_speaks(case: Case, tmp_path: Path) -> None:
    assert_fires(case, tmp_path)


@pytest.mark.parametrize("case", SILENT, ids=lambda case: case.id)
def test_rule_is_silent(case: Silent, tmp_path: Path) -> None:
    assert_silent(case, tmp_path)


def test_a_timeout_proposal_is_twice_the_time_of_one_transfer(tmp_path: Path) -> None:
    case = next(case for case in FIRES if case.telling.startswith("8192 tokens"))
    (problem,) = [p for p in findings(case, tmp_path) if p.rule == "transceiver-timeout"]
    # 8192 × 131072 bytes / 1.25 GB/s = 859 ms
    assert "= 859 ms > 500 ms" in problem.arithmetic[1]
    assert f"{TIMEOUT}: 2000" in problem.advice
