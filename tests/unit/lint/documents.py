"""Documents by hand, models as config.json, and cases for tables of rules."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trtllm_workers.lint.context import LintContext
from trtllm_workers.lint.document import Document, Place
from trtllm_workers.lint.problem import Problem, Severity
from trtllm_workers.lint.rules import check
from trtllm_workers.types import Role

# Defaults of TensorRT-LLM 1.2.1 that rules read.
DEFAULTS: Mapping[str, Any] = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "context_parallel_size": 1,
    "moe_expert_parallel_size": None,
    "moe_tensor_parallel_size": None,
    "enable_attention_dp": False,
    "dtype": "auto",
    "revision": None,
    "tokenizer": None,
    "load_format": "AUTO",
    "enable_lora": False,
    "max_batch_size": None,
    "max_num_tokens": 8192,
    "max_seq_len": None,
    "max_input_len": None,
    "max_beam_width": None,
    "enable_chunked_prefill": False,
    "disable_overlap_scheduler": False,
    "enable_iter_perf_stats": False,
    "mm_encoder_only": False,
    "env_overrides": None,
    "gpus_per_node": None,
    "pp_partition": None,
    "cp_config": {},
    "kv_cache_config.enable_block_reuse": True,
    "kv_cache_config.enable_partial_reuse": True,
    "kv_cache_config.max_tokens": None,
    "kv_cache_config.max_attention_window": None,
    "kv_cache_config.free_gpu_memory_fraction": 0.9,
    "kv_cache_config.event_buffer_max_size": 0,
    "kv_cache_config.max_gpu_total_bytes": 0,
    "kv_cache_config.dtype": "auto",
    "kv_cache_config.tokens_per_block": 32,
    "cuda_graph_config.batch_sizes": None,
    "cuda_graph_config.max_batch_size": 0,
    "cuda_graph_config.enable_padding": False,
    "moe_config.backend": "CUTLASS",
    "moe_config.load_balancer": None,
    "cache_transceiver_config.backend": None,
    "cache_transceiver_config.max_tokens_in_buffer": None,
    "cache_transceiver_config.kv_transfer_timeout_ms": None,
    "speculative_config.max_draft_len": None,
    "speculative_config.num_nextn_predict_layers": 1,
    "speculative_config.eagle3_one_model": True,
}

# What a prefill and a decode config need so that no rule about roles speaks.
TRANSCEIVER: Mapping[str, Any] = {
    "cache_transceiver_config.backend": "UCX",
    "cache_transceiver_config.max_tokens_in_buffer": 16384,
    "cache_transceiver_config.kv_transfer_timeout_ms": 60000,
}


def document(
    role: Role,
    values: Mapping[str, Any] | None = None,
    *,
    name: str = "",
    path: Path | None = None,
    unread: Sequence[str] = (),
) -> Document:
    """Return a document as the reader would; keys stand in lines 1, 2, … after their sections.

    ``unread`` are keys whose value was of a wrong type: they have a place and no value.
    """
    name = name or f"{role}.yaml"
    values = dict(values or {})
    places: dict[str, Place] = {}
    for key in (*values, *unread):
        parts = key.split(".")
        for end in range(1, len(parts) + 1):
            line = len(places) + 1
            places.setdefault(".".join(parts[:end]), Place(f"{name}:{line}", line, 2 * end - 1))
    return Document(name, role, path, values, DEFAULTS, places)


def aggregated(**values: Any) -> Document:
    return document(Role.AGGREGATED, _dotted(values))


def prefill(**values: Any) -> Document:
    return document(
        Role.PREFILL, {"disable_overlap_scheduler": True, **TRANSCEIVER, **_dotted(values)}
    )


def decode(**values: Any) -> Document:
    return document(Role.DECODE, {**TRANSCEIVER, **_dotted(values)})


def encode(**values: Any) -> Document:
    return document(Role.ENCODE, _dotted(values))


def without(doc: Document, *keys: str) -> Document:
    """Return a document in which some keys are not given."""
    values = {key: value for key, value in doc.values.items() if key not in keys}
    return document(doc.role, values, name=doc.name)


_SHORT = {
    "kv": "kv_cache_config",
    "graph": "cuda_graph_config",
    "moe": "moe_config",
    "kvt": "cache_transceiver_config",
    "spec": "speculative_config",
}


def _dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``kv__dtype`` as ``kv_cache_config.dtype``; other names are keys as they are."""
    found = {}
    for name, value in values.items():
        section, _, leaf = name.partition("__")
        found[f"{_SHORT[section]}.{leaf}" if leaf else name] = value
    return found


LLAMA_8B: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
DEEPSEEK_V3: Mapping[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "num_nextn_predict_layers": 1,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3"},
}
LLAMA4_MAVERICK: Mapping[str, Any] = {
    "model_type": "llama4",
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "llama4_text",
        "hidden_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_local_experts": 128,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "vocab_size": 202048,
        "max_position_embeddings": 1048576,
    },
}
GPT_OSS_120B: Mapping[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 2880,
    "num_local_experts": 128,
    "experts_per_token": 4,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "mxfp4"},
}

GIB = 1 << 30


def model_folder(
    folder: Path, config: Mapping[str, Any], *, stored_bytes: int | None = None
) -> Path:
    """Write a model folder: config.json and, for a known size, the index of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if stored_bytes is not None:
        index = {"metadata": {"total_size": stored_bytes}, "weight_map": {}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@dataclass(frozen=True)
class Case:
    """A rule and configs for which it speaks: how badly, at which key, with which telling words."""

    rule: str
    severity: Severity
    key: str
    telling: str
    documents: Sequence[Document]
    context: LintContext = field(default_factory=LintContext)
    model: Mapping[str, Any] | None = None

    @property
    def id(self) -> str:
        return f"{self.rule}-{self.severity}-{self.telling}"


@dataclass(frozen=True)
class Silent:
    """A rule and configs, near to those it finds fault with, for which it says nothing."""

    rule: str
    why: str
    documents: Sequence[Document]
    context: LintContext = field(default_factory=LintContext)
    model: Mapping[str, Any] | None = None

    @property
    def id(self) -> str:
        return f"{self.rule}-{self.why}"


def findings(case: Case | Silent, folder: Path) -> list[Problem]:
    """Return what all rules find; ``folder`` takes the case's model."""
    context = case.context
    if case.model is not None:
        context = replace(context, model_path=model_folder(folder / "model", case.model))
    return check(list(case.documents), context)


def assert_fires(case: Case, folder: Path) -> None:
    """The rule speaks as the case says, and once."""
    mine = [problem for problem in findings(case, folder) if problem.rule == case.rule]
    assert [(problem.severity, problem.key) for problem in mine] == [(case.severity, case.key)]
    (problem,) = mine
    assert case.telling in "\n".join((problem.message, problem.advice, *problem.arithmetic))
    assert problem.advice or problem.severity is Severity.NOTE
    for doc in case.documents:
        if doc.name == problem.file and doc.given(problem.key):
            assert problem.line == doc.places[problem.key].line > 0


def assert_silent(case: Silent, folder: Path) -> None:
    """The rule says nothing."""
    assert [problem for problem in findings(case, folder) if problem.rule == case.rule] == []
