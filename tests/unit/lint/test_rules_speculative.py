"""Rules about speculative decoding."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.lint.documents import (
    DEEPSEEK_V3,
    LLAMA_8B,
    Case,
    Silent,
    aggregated,
    assert_fires,
    assert_silent,
    decode,
    document,
    prefill,
)
from trtllm_workers.lint.problem import Severity
from trtllm_workers.types import Role

TYPE = "speculative_config.decoding_type"
REUSE = "kv_cache_config.enable_block_reuse"
EAGLE = {"spec__decoding_type": "Eagle", "spec__max_draft_len": 3, "spec__speculative_model": "d"}
MTP = {"spec__decoding_type": "MTP"}

FIRES = [
    Case(
        "speculation-type", Severity.ERROR, TYPE, "decoding_type", [decode(spec__max_draft_len=3)]
    ),
    *(
        Case("speculation-refused", Severity.ERROR, TYPE, kind, [decode(spec__decoding_type=kind)])
        for kind in ("Medusa", "Lookahead", "UserProvided", "Eagle3")
    ),
    Case(
        "speculation-model",
        Severity.WARNING,
        TYPE,
        "llama names none",
        [decode(**MTP)],
        model=LLAMA_8B,
    ),
    Case(
        "speculation-model",
        Severity.WARNING,
        "speculative_config.speculative_model",
        "Eagle",
        [decode(**MTP, spec__speculative_model="drafter")],
    ),
    Case(
        "speculation-block-reuse",
        Severity.WARNING,
        REUSE,
        "fp8",
        [decode(**EAGLE, kv__dtype="fp8")],
    ),
    Case(
        "speculation-overlap",
        Severity.WARNING,
        "disable_overlap_scheduler",
        "Eagle",
        [decode(**EAGLE, spec__eagle3_one_model=False)],
    ),
    Case(
        "speculation-overlap",
        Severity.WARNING,
        "disable_overlap_scheduler",
        "DraftTarget",
        [aggregated(spec__decoding_type="DraftTarget", spec__max_draft_len=2)],
    ),
    Case(
        "speculation-accuracy",
        Severity.WARNING,
        "speculative_config.eagle3_one_model",
        "false on both",
        [decode(**EAGLE)],
    ),
    Case(
        "speculation-logprobs",
        Severity.NOTE,
        "speculative_config",
        "logprobs",
        [aggregated(**MTP)],
    ),
    Case(
        "speculation-differs",
        Severity.ERROR,
        "speculative_config",
        "no speculation",
        [prefill(**MTP), decode()],
    ),
    Case(
        "speculation-differs",
        Severity.ERROR,
        "speculative_config.num_nextn_predict_layers",
        "3 here and 1 in prefill.yaml",
        [prefill(**MTP), decode(**MTP, spec__num_nextn_predict_layers=3)],
    ),
    Case(
        "speculation-differs",
        Severity.WARNING,
        "speculative_config.max_draft_len",
        "2 here and 3 in prefill.yaml",
        [prefill(**EAGLE), decode(**{**EAGLE, "spec__max_draft_len": 2})],
    ),
]

SILENT = [
    Silent("speculation-type", "given", [decode(**MTP)]),
    Silent("speculation-type", "no speculation", [decode()]),
    Silent(
        "speculation-type",
        "a wrong one has been reported",
        [document(Role.DECODE, {"speculative_config.max_draft_len": 1}, unread=[TYPE])],
    ),
    Silent("speculation-refused", "MTP and Eagle", [decode(**MTP), decode(**EAGLE)]),
    Silent("speculation-model", "it has MTP layers", [decode(**MTP)], model=DEEPSEEK_V3),
    Silent("speculation-model", "the model is not known", [decode(**MTP)]),
    Silent("speculation-model", "Eagle has a drafter", [decode(**EAGLE)], model=LLAMA_8B),
    Silent(
        "speculation-block-reuse",
        "reuse is off",
        [decode(**EAGLE, kv__dtype="fp8", kv__enable_block_reuse=False)],
    ),
    Silent("speculation-block-reuse", "both as the model", [decode(**EAGLE)]),
    Silent("speculation-block-reuse", "no drafter", [decode(**MTP, kv__dtype="fp8")]),
    Silent("speculation-overlap", "one model", [decode(**EAGLE)]),
    Silent(
        "speculation-overlap",
        "overlap is off",
        [decode(**EAGLE, spec__eagle3_one_model=False, disable_overlap_scheduler=True)],
    ),
    Silent("speculation-accuracy", "aggregated", [aggregated(**EAGLE)]),
    Silent("speculation-accuracy", "two models", [decode(**EAGLE, spec__eagle3_one_model=False)]),
    Silent("speculation-logprobs", "no speculation", [decode()]),
    Silent("speculation-differs", "alike", [prefill(**EAGLE), decode(**EAGLE)]),
    Silent(
        "speculation-differs",
        "one writes the default",
        [prefill(**MTP), decode(**MTP, spec__num_nextn_predict_layers=1)],
    ),
    Silent(
        "speculation-differs",
        "the old name of the drafter's key",
        [
            prefill(spec__decoding_type="Eagle", spec__speculative_model="d"),
            decode(spec__decoding_type="Eagle", spec__speculative_model_dir="d"),
        ],
    ),
]


@pytest.mark.parametrize("case", FIRES, ids=lambda case: case.id)
def test_rule_speaks(case: Case, tmp_path: Path) -> None:
    assert_fires(case, tmp_path)


@pytest.mark.parametrize("case", SILENT, ids=lambda case: case.id)
def test_rule_is_silent(case: Silent, tmp_path: Path) -> None:
    assert_silent(case, tmp_path)
