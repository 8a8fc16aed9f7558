"""The rules as a whole: each is tested both ways and documented, and the known defects are caught."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.lint import (
    test_memory,
    test_rules_numbers,
    test_rules_pair,
    test_rules_roles,
    test_rules_routing,
    test_rules_speculative,
    test_rules_topology,
    test_rules_variables,
)
from tests.unit.lint.documents import (
    DEEPSEEK_V3,
    DEFAULTS,
    GIB,
    GPT_OSS_120B,
    LLAMA_8B,
    Case,
    aggregated,
    assert_fires,
    decode,
    document,
    model_folder,
    prefill,
    without,
)
from trtllm_workers.config.schema import trtllm_schema
from trtllm_workers.lint.context import LintContext
from trtllm_workers.lint.problem import Severity
from trtllm_workers.lint.rules import RULE_NAMES, check
from trtllm_workers.types import Role

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "lint.md"
MODULES = (
    test_memory,
    test_rules_numbers,
    test_rules_pair,
    test_rules_roles,
    test_rules_routing,
    test_rules_speculative,
    test_rules_topology,
    test_rules_variables,
)
FIRES = [case for module in MODULES for case in module.FIRES]
SILENT = [case for module in MODULES for case in module.SILENT]


def documented() -> dict[str, set[str]]:
    """Return the document's table of rules: name → severities."""
    text = DOCUMENT.read_text()
    table = text[text.index("<!-- rules -->") : text.index("<!-- end of rules -->")]
    rows = re.findall(r"^\| `([a-z-]+)` \| ([a-z, ]+) \| .+ \|$", table, re.MULTILINE)
    assert len({name for name, _ in rows}) == len(rows)
    return {name: set(severities.split(", ")) for name, severities in rows}


def test_rule_names_are_unique_and_kebab_case() -> None:
    assert len(set(RULE_NAMES)) == len(RULE_NAMES)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)+", name) for name in RULE_NAMES)


def test_every_rule_has_a_case_in_which_it_speaks_and_one_in_which_it_is_silent() -> None:
    assert {case.rule for case in FIRES} == set(RULE_NAMES)
    assert {case.rule for case in SILENT} == set(RULE_NAMES)


def test_the_document_names_every_rule_with_its_severities() -> None:
    seen: dict[str, set[str]] = defaultdict(set)
    for case in FIRES:
        seen[case.rule].add(str(case.severity))
    assert documented() == seen


def test_nothing_is_said_about_nothing() -> None:
    assert check([], LintContext()) == []


def test_an_aggregated_worker_with_defaults_is_clean() -> None:
    assert check([aggregated()], LintContext()) == []


def test_a_pair_that_fits_is_clean() -> None:
    context = LintContext(isl=8192, osl=256, gpus_per_node=8, kv_transport="UCX", router="random")
    pair = [prefill(max_seq_len=8448, enable_chunked_prefill=True), decode(max_seq_len=8448)]
    assert check(pair, context) == []


@dataclass(frozen=True)
class Defect:
    """A defect or pain that users met, by what it is called, and the finding that answers it."""

    name: str
    case: Case


TP = "tensor_parallel_size"
BLOCK = "kv_cache_config.tokens_per_block"
BUFFER = "cache_transceiver_config.max_tokens_in_buffer"
TIMEOUT = "cache_transceiver_config.kv_transfer_timeout_ms"
FRACTION = "kv_cache_config.free_gpu_memory_fraction"
MTP = {"spec__decoding_type": "MTP", "spec__num_nextn_predict_layers": 1}
EAGLE = {"spec__decoding_type": "Eagle", "spec__max_draft_len": 1, "spec__speculative_model": "d"}
ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE

# Misspelt and renamed keys and values (enable_graph_padding, WIFEEP, default for DEFAULT, keys that older
# releases had in other places) never reach the rules: the reader of configs finds those.
DEFECTS = [
    Defect(
        "block size written in two places, and differently",
        Case("pair-block-size", ERROR, BLOCK, "64", [prefill(), decode(kv__tokens_per_block=64)]),
    ),
    Defect(
        "ranks cannot be started inside an allocation",
        Case(
            "variables-mpi-spawn",
            WARNING,
            "SLURM_JOBID",
            "no slots",
            [aggregated()],
            LintContext(environ={"SLURM_JOBID": "1"}),
        ),
    ),
    Defect(
        "SLURM injects UCX_TLS=tcp",
        Case(
            "variables-ucx-tls",
            ERROR,
            "UCX_TLS",
            "GPU memory for host memory",
            [decode()],
            LintContext(environ={"UCX_TLS": "tcp"}),
        ),
    ),
    Defect(
        "nobody knows which transport is in use",
        Case(
            "transceiver-default",
            WARNING,
            "cache_transceiver_config.backend",
            "NIXL",
            [decode(kvt__backend="DEFAULT")],
        ),
    ),
    Defect(
        "two variables that must not be set together",
        Case(
            "variables-nixl-conflict",
            ERROR,
            "NIXL_BACKEND",
            "rail endpoints",
            [decode()],
            LintContext(environ={"NIXL_BACKEND": "x", "TRTLLM_NIXL_KVCACHE_BACKEND": "UCX"}),
        ),
    ),
    Defect(
        "decode waits for ever for a sender that is gone",
        Case("transceiver-timeout", WARNING, TIMEOUT, "ever", [without(decode(), TIMEOUT)]),
    ),
    Defect(
        "the time limit is too short for a long context",
        Case(
            "transceiver-timeout",
            WARNING,
            TIMEOUT,
            "13744 ms > 10000 ms",
            [decode(kvt__kv_transfer_timeout_ms=10000)],
            LintContext(isl=131072),
            LLAMA_8B,
        ),
    ),
    Defect(
        "different tensor parallel sizes give wrong text",
        Case(
            "tensor-parallel-differs",
            WARNING,
            TP,
            "wrong text",
            [prefill(tensor_parallel_size=2), decode(tensor_parallel_size=4)],
        ),
    ),
    Defect(
        "40 heads over 16 GPUs",
        Case(
            "attention-heads",
            ERROR,
            TP,
            "40 mod 16 = 8",
            [decode(tensor_parallel_size=16)],
            LintContext(model_name="Llama-4-Maverick-17B-128E-Eagle3"),
        ),
    ),
    Defect(
        "a step too small for the largest graph with draft tokens",
        Case(
            "draft-graph-tokens",
            ERROR,
            "max_num_tokens",
            "256 streams × (num_nextn_predict_layers 1 + 1) = 512 > max_num_tokens 256",
            [decode(**MTP, max_batch_size=256, max_num_tokens=256, graph__batch_sizes=[1, 256])],
        ),
    ),
    Defect(
        "overlap scheduler beside a drafter of its own",
        Case(
            "speculation-overlap",
            WARNING,
            "disable_overlap_scheduler",
            "true",
            [decode(**EAGLE, spec__eagle3_one_model=False)],
        ),
    ),
    Defect(
        "block reuse with two KV dtypes",
        Case(
            "speculation-block-reuse",
            WARNING,
            "kv_cache_config.enable_block_reuse",
            "fp8",
            [decode(**EAGLE, kv__dtype="fp8")],
        ),
    ),
    Defect(
        "MTP written where the model needs Eagle",
        Case(
            "speculation-model",
            WARNING,
            "speculative_config.speculative_model",
            "Eagle",
            [decode(**MTP, spec__speculative_model="Llama-4-Maverick-17B-128E-Eagle3")],
        ),
    ),
    Defect(
        "dead-lock when the buffer is shorter than the longest input",
        Case(
            "transceiver-buffer",
            ERROR,
            BUFFER,
            "8192 tokens in the buffer < 20000",
            [decode(kvt__max_tokens_in_buffer=8192)],
            LintContext(isl=20000),
        ),
    ),
    Defect(
        "0.95 of the memory beside a transceiver",
        Case("kv-fraction", WARNING, FRACTION, "0.95", [decode(kv__free_gpu_memory_fraction=0.95)]),
    ),
    Defect(
        "a load balancer doubles the experts in host memory",
        Case(
            "memory-host",
            WARNING,
            "moe_config.load_balancer",
            "2 copies",
            [decode(moe__backend="WIDEEP", moe__load_balancer={"num_slots": 288})],
            LintContext(host_memory_bytes=1000 * GIB),
            DEEPSEEK_V3,
        ),
    ),
    Defect(
        "logprobs bring a speculating server down",
        Case("speculation-logprobs", NOTE, "speculative_config", "crash", [aggregated(**MTP)]),
    ),
    Defect(
        "routing by KV without events",
        Case(
            "router-events",
            ERROR,
            "kv_cache_config.event_buffer_max_size",
            "every prompt would look new",
            [aggregated()],
            LintContext(router="kv"),
        ),
    ),
    Defect(
        "context in pipeline stages with tensor parallel generation hangs",
        Case(
            "pipeline-to-tensor",
            ERROR,
            "pipeline_parallel_size",
            "hang",
            [prefill(pipeline_parallel_size=2), decode(tensor_parallel_size=2)],
        ),
    ),
]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_defect_that_users_met_is_found(defect: Defect, tmp_path: Path) -> None:
    assert_fires(defect.case, tmp_path)


NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 7, 8, 16, 32, 128, 1000, 8192, 1 << 20])
CHOICES: dict[str, list[Any]] = {
    "dtype": ["auto", "bfloat16", "float16"],
    "load_format": ["AUTO", "DUMMY"],
    "kv_cache_config.dtype": ["auto", "fp8", "nvfp4"],
    "kv_cache_config.free_gpu_memory_fraction": [0.0, 0.01, 0.5, 0.95, 1.0, None],
    "cache_transceiver_config.backend": ["UCX", "NIXL", "DEFAULT", "MPI", None],
    "moe_config.backend": ["CUTLASS", "WIDEEP"],
    "moe_config.load_balancer": [{}, {"num_slots": 0}, {"num_slots": 288}, "nowhere.yaml", None],
    "speculative_config.decoding_type": ["MTP", "Eagle", "DraftTarget", "NGram"],
    "cp_config": [{}, {"cp_type": "HELIX", "tokens_per_block": 64}, None],
    "pp_partition": [[], [1, 2], None],
    "kv_cache_config.max_attention_window": [[128], [128, 4096], None],
    "cuda_graph_config.batch_sizes": [[], [1, 2, 256], None],
    "env_overrides": [{}, {"UCX_TLS": "tcp"}, {"TRTLLM_USE_NIXL_KVCACHE": "1"}, None],
    "revision": ["main", None],
    "tokenizer": ["folder", None],
}


def values(key: str, default: object) -> st.SearchStrategy[Any]:
    if key in CHOICES:
        return st.sampled_from(CHOICES[key])
    return st.booleans() if isinstance(default, bool) else NUMBERS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    configs = (LLAMA_8B, DEEPSEEK_V3, GPT_OSS_120B, {"vocab_size": 1, "max_position_embeddings": 1})
    return [model_folder(root / str(index), config) for index, config in enumerate(configs)]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_values_bring_a_rule_down(folders: list[Path], data: st.DataObject) -> None:
    entry = {key: values(key, default) for key, default in DEFAULTS.items()}
    contents = st.fixed_dictionaries({}, optional=entry)
    docs = [document(role, data.draw(contents)) for role in Role]
    context = LintContext(
        gpus_per_node=data.draw(st.sampled_from([None, 1, 8])),
        gpu_memory_bytes=80 * GIB,
        host_memory_bytes=1000 * GIB,
        isl=data.draw(NUMBERS),
        osl=data.draw(NUMBERS),
        router=data.draw(st.sampled_from([None, "kv", "least_loaded"])),
        model_path=data.draw(st.sampled_from([None, *folders])),
        sets_role_keys=data.draw(st.booleans()),
    )
    for problem in check(docs, context):
        assert problem.rule in RULE_NAMES
        assert problem.message


def test_rules_point_at_keys_that_tensorrt_llm_has() -> None:
    schema = trtllm_schema()
    variables = {case.key for case in FIRES if case.rule.startswith("variables-")}
    keys = {case.key for case in FIRES if case.key} - variables | set(DEFAULTS)
    assert {key for key in keys if not schema.knows(key)} == set()
