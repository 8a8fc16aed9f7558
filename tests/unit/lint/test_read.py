"""Reading an engine YAML: every wrong key and value with its line, and nothing wrong with a right one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_workers.config.engine_config import Override, parse_override
from trtllm_workers.config.schema import KeySpec, trtllm_schema
from trtllm_workers.config.shipped import shipped_engine_configs
from trtllm_workers.errors import ConfigError
from trtllm_workers.lint.document import Document
from trtllm_workers.lint.engine_config import as_engine_config, nested
from trtllm_workers.lint.problem import Problem, Severity
from trtllm_workers.lint.read import parse_document, read_document
from trtllm_workers.lint.roles_of_files import role_of
from trtllm_workers.types import Role

SCHEMA = trtllm_schema()


def read(text: str) -> tuple[Document, list[Problem]]:
    return parse_document(text, "a.yaml", Role.AGGREGATED)


def told(text: str) -> list[Problem]:
    return read(text)[1]


def only(text: str) -> Problem:
    problems = told(text)
    assert len(problems) == 1, problems
    return problems[0]


@pytest.mark.parametrize(
    ("text", "line", "rule", "said"),
    [
        ("max_num_token: 8", 1, "unknown-key", "unknown key 'max_num_token'"),
        ("a: 1\n", 1, "unknown-key", "unknown key 'a'"),
        ("moe_config:\n  backend: WIFEEP", 2, "wrong-value", "not 'WIFEEP'"),
        ("cache_transceiver_config:\n  backend: default", 2, "wrong-value", "not 'default'"),
        ("quant_config: {}", 1, "unknown-key", "is no key of an engine YAML"),
        ("model_kwargs: {}", 1, "newer-key", "1.3 or later"),
        ("use_cuda_graph: true", 1, "old-key", "older TensorRT-LLM releases"),
        ("kv_cache_config.dtype: fp8", 1, "unknown-key", "unknown key 'kv_cache_config.dtype'"),
        ("max_batch_size: many", 1, "wrong-type", "must be a whole number or null, not 'many'"),
        ("max_batch_size: [1]", 1, "wrong-type", "not a list"),
        ("max_batch_size: 1e3", 1, "wrong-type", "not 1000 (write 1000)"),
        ("kv_cache_config:", 1, "wrong-type", "section 'kv_cache_config' is empty"),
        (
            "speculative_config:\n  decoding_type: Eagle\n  max_draft_len: 3\n  speculative_model: /m\n"
            "  use_dynamic_tree: true",
            5,
            "missing-key",
            "needs dynamic_tree_max_topK",
        ),
        ("max_batch_size: 0", 1, "wrong-value", "must be 1 or more, not 0"),
        ("enable_chunked_prefill: 010", 1, "wrong-type", "must be true or false"),
        ("kv_cache_config: 5", 1, "wrong-type", "'kv_cache_config' is a section"),
        (
            "kv_cache_config:\n  free_gpu_memory_fraction: 1.5",
            2,
            "wrong-value",
            "must be 0 to 1, not 1.5",
        ),
        ("kv_cache_config:\n  free_gpu_memory_fraction:", 2, "wrong-type", "not null"),
        (
            "kv_cache_config:\n  max_attention_window: [4096, 0]",
            2,
            "wrong-value",
            "every item",
        ),
        ("kv_cache_config:\n  max_attention_window: []", 2, "wrong-value", "empty list"),
        ("cuda_graph_config:\n  batch_sizes: [1, x]", 2, "wrong-type", "whose item 2 is 'x'"),
        (
            "cuda_graph_config:\n  batch_sizes: [1]\n  max_batch_size: 8",
            3,
            "exclusive-keys",
            "exclude each other",
        ),
        (
            "scheduler_config:\n  dynamic_batch_config:\n    enable_batch_size_tuning: true\n"
            "    dynamic_batch_moving_average_window: 8",
            2,
            "missing-key",
            "needs 'enable_max_num_tokens_tuning'",
        ),
        ("speculative_config:\n  max_draft_len: 1", 1, "missing-key", "needs 'decoding_type'"),
        ("speculative_config:\n  decoding_type: Eagle3", 2, "wrong-value", "not 'Eagle3'"),
        ("speculative_config:\n  decoding_type: Medusa", 2, "refused-value", "PyTorch backend"),
        (
            "speculative_config:\n  decoding_type: MTP\n  eagle3_one_model: true",
            3,
            "unknown-key",
            "eagle3_one_model",
        ),
        (
            "speculative_config:\n  decoding_type: Eagle\n  max_draft_len: 3",
            1,
            "missing-key",
            "with Eagle needs 'speculative_model'",
        ),
        (
            "speculative_config:\n  decoding_type: NGram\n  max_draft_len: 2\n"
            "  max_matching_ngram_size: 2\n  draft_len_schedule: {1: 3}",
            5,
            "wrong-value",
            "must be max_draft_len (2)",
        ),
        (
            "speculative_config:\n  decoding_type: AUTO\n  speculative_model: /a\n"
            "  speculative_model_dir: /b",
            4,
            "alias-and-name",
            "another name of 'speculative_model'",
        ),
        ("peft_cache_config:\n  lora_prefetch_dir: /x", 2, "refused-value", "must stay null"),
        ("nvfp4_gemm_config:\n  allowed_backends: [cutlas]", 2, "wrong-value", "not 'cutlas'"),
        ("guided_decoding_backend: outlines", 1, "wrong-value", "one of xgrammar, llguidance"),
        ("ray_worker_extension_cls: a.B", 1, "exclusive-keys", "orchestrator_type: ray"),
        ("env_overrides: [1]", 1, "wrong-type", "a mapping or null, not a list"),
    ],
)
def test_what_is_wrong_is_told_once_with_its_line(
    text: str, line: int, rule: str, said: str
) -> None:
    problem = only(text)
    assert (problem.severity, problem.line, problem.rule) == (Severity.ERROR, line, rule)
    assert problem.file == "a.yaml"
    assert said in problem.message


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("max_num_token: 8", "did you mean 'max_num_tokens'?"),
        ("tokens_per_block: 32", "'tokens_per_block' is a key of the section 'kv_cache_config'"),
        ("moe_config:\n  backend: WIFEEP", "write WIDEEP"),
        ("cache_transceiver_config:\n  backend: ucx", "write UCX"),
        ("kv_cache_config.dtype: fp8", "write 'dtype:' indented under 'kv_cache_config:'"),
        ("build_config: {}", "remove it"),
    ],
)
def test_what_to_write_instead_is_said(text: str, advice: str) -> None:
    assert only(text).advice == advice


@pytest.mark.parametrize(
    ("text", "value"),
    [('max_batch_size: "8"', 8), ("enable_chunked_prefill: 1", True)],
)
def test_what_works_only_by_leniency_is_a_warning_and_read(text: str, value: object) -> None:
    document, problems = read(text)
    assert [(one.severity, one.rule) for one in problems] == [(Severity.WARNING, "lenient-type")]
    assert list(document.values.values()) == [value]


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("stream_interval: 4", "stream_interval", 4),
        ("batch_wait_timeout_ms: 3", "batch_wait_timeout_ms", 3.0),
        ("enable_chunked_prefill: yes", "enable_chunked_prefill", True),
        ("load_format: dummy", "load_format", "DUMMY"),
        ("env_overrides: {A: 1, B: off}", "env_overrides", {"A": "1", "B": "False"}),
        (
            "cuda_graph_config: {batch_sizes: [1, 2, 4, 8], max_batch_size: 8, enable_padding: true}",
            "cuda_graph_config.max_batch_size",
            8,
        ),
        ("moe_config:\n  load_balancer: {num_slots: 8}", "moe_config.load_balancer.num_slots", 8),
        ("cuda_graph_config:", "cuda_graph_config", None),
        ("sparse_attention_config: {algorithm: DSA}", "sparse_attention_config.algorithm", "dsa"),
        (
            "speculative_config: {decoding_type: AUTO, speculative_model_dir: /m}",
            "speculative_config.speculative_model",
            "/m",
        ),
        (
            "speculative_config: {decoding_type: AUTO, max_draft_len: 4, draft_len_schedule: {1: 4}}",
            "speculative_config.draft_len_schedule",
            {1: 4},
        ),
    ],
)
def test_right_values_are_read_as_tensorrt_llm_reads_them(
    text: str, key: str, value: object
) -> None:
    document, problems = read(text)
    assert not problems
    assert document.values[key] == value


def test_every_problem_of_a_file_is_told_at_once() -> None:
    problems = told("a: 1\nb: 2\nmax_batch_size: x\nkv_cache_config: {c: 3}\n")
    assert [one.line for one in problems] == [1, 2, 3, 4]


def test_a_load_balancer_file_that_is_not_here_is_a_warning(tmp_path: Path) -> None:
    config = tmp_path / "decode.yaml"
    config.write_text("moe_config:\n  load_balancer: eplb.yaml\n")
    _, problems = read_document(config, Role.DECODE)
    assert [(one.severity, one.rule) for one in problems] == [(Severity.WARNING, "missing-file")]
    assert str(tmp_path / "eplb.yaml") in problems[0].message


def test_flags_win_over_the_file_and_are_named(tmp_path: Path) -> None:
    config = tmp_path / "agg.yaml"
    config.write_text("max_batch_size: 8\n")
    overrides = [
        parse_override("max_batch_size=16", "--set"),
        Override("max_num_tokens", "64", "environment X"),
        parse_override("moe_config.backend=WIFEEP", "--set"),
        parse_override("max_batchsize=1", "--set"),
        parse_override("env_overrides.A=1", "--set"),
    ]
    document, problems = read_document(config, Role.AGGREGATED, overrides=overrides)
    assert document.values["max_batch_size"] == 16
    assert document.values["max_num_tokens"] == 64
    assert [one.message.split(":")[0] for one in problems] == [
        "--set moe_config.backend",
        "--set max_batchsize",
    ]


def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("a: [1\n")
    with pytest.raises(ConfigError, match=r"a\.yaml:2:1"):
        read_document(config, Role.AGGREGATED)


@pytest.mark.parametrize("path", shipped_engine_configs(), ids=lambda path: path.stem)
def test_shipped_configs_have_nothing_wrong_with_keys_and_values(path: Path) -> None:
    assert read_document(path, role_of(path))[1] == []


def test_a_document_becomes_what_tensorrt_llm_is_given() -> None:
    document, _ = read(
        "max_batch_size: 8\ncuda_graph_config: null\nkv_cache_config: {dtype: fp8}\n"
        "speculative_config: {decoding_type: MTP}\n"
    )
    config = as_engine_config(document)
    assert config["kv_cache_config.tokens_per_block"] == 32
    assert config.source("kv_cache_config.dtype") == "a.yaml:3"
    assert "cuda_graph_config.enable_padding" not in config.settings
    assert nested(config) == {
        "cuda_graph_config": None,
        "kv_cache_config": {"dtype": "fp8"},
        "max_batch_size": 8,
        "speculative_config": {"decoding_type": "MTP"},
    }


# The defects of the configs that users know, and of pain 31: old keys, spellings, words of other releases.
DEFECTS = {
    "L10 (pain 31): a key nobody knows, found before a start": ("max_token: 8\n", "unknown-key"),
    "L13: enable_graph_padding": ("cuda_graph_config:\n  enable_graph_padding: true\n", "old-key"),
    "L14: names from before the flattening": (
        "cuda_graph_config:\n  cuda_graph_padding_enabled: true\n",
        "old-key",
    ),
    "L15: WIFEEP": ("moe_config:\n  backend: WIFEEP\n", "wrong-value"),
    "default instead of DEFAULT": (
        "cache_transceiver_config:\n  backend: default\n",
        "wrong-value",
    ),
    "pytorch_backend_config": ("pytorch_backend_config:\n  use_cuda_graph: true\n", "old-key"),
    "MTP's key in an Eagle section": (
        "speculative_config:\n  decoding_type: AUTO\n  num_nextn_predict_layers: 1\n",
        "unknown-key",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_known_defects_of_configs_are_found(defect: str) -> None:
    text, rule = DEFECTS[defect]
    assert only(text).rule == rule


# --- any document --------------------------------------------------------------------------------


def values_for(spec: KeySpec) -> st.SearchStrategy[Any] | None:
    """Return values a key takes; None for kinds that these tests leave out."""
    kind = spec.type.removeprefix("Optional[").removesuffix("]")
    if spec.only_null or kind.startswith(("Dict", "Set", "Union[object", "object", "dict")):
        return None
    if spec.choices and not kind.startswith("List"):
        return st.sampled_from(spec.choices)
    low = int(spec.minimum or spec.items_min or 0)
    numbers = st.integers(max(low, 1), 1000)
    return {
        "int": numbers,
        "float": st.just(0.5),
        "bool": st.booleans(),
        "str": st.sampled_from(["a", "b/c"]),
        "List[int": st.lists(numbers, min_size=1, max_size=3),
        "List[int]": st.lists(numbers, min_size=1, max_size=3),
    }.get(kind)


_LEAVES = {
    f"{section}.{key}" if section else key: found
    for section in ("", "kv_cache_config", "moe_config", "cache_transceiver_config")
    for key, spec in SCHEMA.sections[section].items()
    if (f"{section}.{key}" if section else key) not in SCHEMA.sections
    and (found := values_for(spec)) is not None
    and key not in ("ray_worker_extension_cls", "load_balancer", "model", "backend")
}


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    keys = draw(st.lists(st.sampled_from(sorted(_LEAVES)), unique=True, min_size=1, max_size=12))
    found: dict[str, Any] = {}
    for dotted in keys:
        section, _, key = dotted.rpartition(".")
        inner = found.setdefault(section, {}) if section else found
        inner[key] = draw(_LEAVES[dotted])
    return found


@settings(deadline=None)
@given(document=documents())
def test_nothing_is_wrong_with_a_right_document(document: dict[str, Any]) -> None:
    assert told(yaml.safe_dump(document)) == []


@settings(deadline=None)
@given(document=documents(), pick=st.integers(0, 1000), how=st.integers(0, 1))
def test_one_mistake_in_a_right_document_is_found(
    document: dict[str, Any], pick: int, how: int
) -> None:
    flat = [(document, key) for key in document if not isinstance(document[key], dict)]
    flat += [
        (inner, key) for inner in document.values() if isinstance(inner, dict) for key in inner
    ]
    inner, key = flat[pick % len(flat)]
    value = inner.pop(key)
    if how:
        inner[f"{key}_x"] = value
    else:
        inner[key] = {"no": "value"}
    assert any(one.severity is Severity.ERROR for one in told(yaml.safe_dump(document)))


def test_the_document_names_every_rule_of_the_reader() -> None:
    root = Path(__file__).resolve().parents[3]
    sources = [
        root / "trtllm_workers" / "lint" / name for name in ("read.py", "sections.py", "run.py")
    ]
    rules = {
        word
        for source in sources
        for word in re.findall(r'"([a-z]+(?:-[a-z]+)+)"', source.read_text(encoding="utf-8"))
        if word not in ("utf-8-sig", "utf-8")
    }
    text = (root / "docs" / "lint.md").read_text(encoding="utf-8")
    table = text[text.index("## Keys and values") : text.index("## Rules")]
    assert rules == set(re.findall(r"^\| `([a-z-]+)`", table, flags=re.MULTILINE))
