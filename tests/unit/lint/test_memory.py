"""The memory of a worker: models' sizes, KV per token, the sum, and the rules that judge it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.unit.lint.documents import (
    DEEPSEEK_V3,
    GIB,
    GPT_OSS_120B,
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
    model_folder,
    prefill,
    without,
)
from trtllm_workers.lint.context import LintContext
from trtllm_workers.lint.document import Document
from trtllm_workers.lint.problem import Severity
from trtllm_workers.lint.rules.budget import (
    GRAPH_LAYER_BYTES,
    RUNTIME_BYTES,
    Budget,
    memory_sum,
    model_weights,
)
from trtllm_workers.lint.rules.kv import (
    gpu_kv_bytes_per_token,
    gpu_sequence_bytes,
    kv_bytes_per_token,
    shown_bytes,
)
from trtllm_workers.lint.rules.model import Model, read_model
from trtllm_workers.lint.rules.rule import Facts
from trtllm_workers.types import Role

FRACTION = "kv_cache_config.free_gpu_memory_fraction"
WINDOW = "kv_cache_config.max_attention_window"
TP = "tensor_parallel_size"
BALANCER = "moe_config.load_balancer"
EPLB: Mapping[str, Any] = {
    "tensor_parallel_size": 16,
    "moe_expert_parallel_size": 16,
    "enable_attention_dp": True,
    "moe__backend": "WIDEEP",
    "moe__load_balancer": {"num_slots": 288},
}


def on(gib: int, **known: Any) -> LintContext:
    return LintContext(gpu_memory_bytes=gib * GIB, **known)


FIRES = [
    Case(
        "memory-weights",
        Severity.ERROR,
        TP,
        "do not fit a GPU of 80.0 GiB",
        [aggregated(tensor_parallel_size=8, moe_expert_parallel_size=8, enable_attention_dp=True)],
        on(80),
        DEEPSEEK_V3,
    ),
    Case(
        "memory-weights",
        Severity.WARNING,
        TP,
        "leave no room for KV",
        [aggregated()],
        on(16),
        LLAMA_8B,
    ),
    Case(
        "memory-kv-cache",
        Severity.WARNING,
        FRACTION,
        "fewer than one sequence of 131072 (the model's longest",
        [aggregated()],
        on(24),
        LLAMA_8B,
    ),
    Case(
        "memory-kv-cache",
        Severity.WARNING,
        FRACTION,
        "usual length (8320 tokens), max_batch_size is 64",
        [decode(max_batch_size=64, max_seq_len=8448)],
        on(80, isl=8192, osl=256),
        LLAMA_8B,
    ),
    Case(
        "memory-left-over",
        Severity.WARNING,
        FRACTION,
        "free_gpu_memory_fraction: 0.45",
        [decode(max_seq_len=8192, kvt__max_tokens_in_buffer=131072)],
        on(80),
        LLAMA_8B,
    ),
    Case(
        "memory-budget",
        Severity.NOTE,
        FRACTION,
        "weights of the model 15.0 GiB (computed from config.json)",
        [aggregated(max_seq_len=8192)],
        on(80),
        LLAMA_8B,
    ),
    Case(
        "memory-windows",
        Severity.NOTE,
        WINDOW,
        "18 of 36 layers",
        [aggregated()],
        model=GPT_OSS_120B,
    ),
    Case(
        "memory-host",
        Severity.WARNING,
        BALANCER,
        "2 copies ×",
        [decode(**EPLB)],
        LintContext(host_memory_bytes=1024 * GIB),
        DEEPSEEK_V3,
    ),
    Case(
        "memory-host",
        Severity.ERROR,
        BALANCER,
        "512.0 GiB",
        [decode(**EPLB)],
        LintContext(host_memory_bytes=512 * GIB),
        DEEPSEEK_V3,
    ),
    Case(
        "model-config",
        Severity.WARNING,
        "",
        "'vocab_size' must be a positive whole number",
        [aggregated()],
        model={"hidden_size": 8},
    ),
]
FITS = [aggregated(max_seq_len=8192)]
SILENT = [
    Silent("memory-weights", "they fit", FITS, on(80), LLAMA_8B),
    Silent("memory-weights", "GPUs are not known", [aggregated()], model=LLAMA_8B),
    Silent("memory-weights", "the model is not known", [aggregated()], on(1)),
    Silent("memory-weights", "an encoder has weights of its own", [encode()], on(1), LLAMA_8B),
    Silent("memory-kv-cache", "room for all", [decode(max_batch_size=32, max_seq_len=8448)],
           on(80, isl=8192, osl=256), LLAMA_8B),
    Silent("memory-kv-cache", "the batch is TensorRT-LLM's default", [decode(max_seq_len=8448)],
           on(80, isl=8192, osl=256), LLAMA_8B),
    Silent("memory-left-over", "a small buffer", [decode(max_seq_len=8192)], on(80), LLAMA_8B),
    Silent("memory-budget", "another rule shows the sum", [aggregated()], on(24), LLAMA_8B),
    Silent("memory-budget", "GPUs are not known", FITS, model=LLAMA_8B),
    Silent(
        "memory-windows", "named", [aggregated(kv__max_attention_window=[128, 131072])],
        model=GPT_OSS_120B,
    ),
    Silent("memory-windows", "none", [aggregated()], model=LLAMA_8B),
    Silent("memory-host", "two copies fit", [decode(**EPLB)],
           LintContext(host_memory_bytes=2048 * GIB), DEEPSEEK_V3),
    Silent("memory-host", "no load balancer", [decode(**{**EPLB, "moe__load_balancer": None})],
           LintContext(host_memory_bytes=GIB), DEEPSEEK_V3),
    Silent("model-config", "readable", [aggregated()], model=LLAMA_8B),
    Silent("model-config", "no model given", [aggregated()]),
]  # fmt: skip


@pytest.mark.parametrize("case", FIRES, ids=lambda case: case.id)
def test_rule_speaks(case: Case, tmp_path: Path) -> None:
    assert_fires(case, tmp_path)


@pytest.mark.parametrize("case", SILENT, ids=lambda case: case.id)
def test_rule_is_silent(case: Silent, tmp_path: Path) -> None:
    assert_silent(case, tmp_path)


def model(folder: Path, config: Mapping[str, Any], stored_bytes: int | None = None) -> Model:
    return read_model(model_folder(folder / "model", config, stored_bytes=stored_bytes))


def budget(doc: Document, known: Model, gib: int = 80, **context: Any) -> Budget:
    found = memory_sum(doc, Facts(on(gib, **context), known))
    assert found is not None
    return found


def test_kv_of_a_token_counts_keys_and_values_of_all_kv_heads(tmp_path: Path) -> None:
    known = model(tmp_path, LLAMA_8B)
    assert kv_bytes_per_token(decode(), known) == 2 * 32 * 8 * 128 * 2
    assert kv_bytes_per_token(decode(kv__dtype="fp8"), known) == 2 * 32 * 8 * 128


def test_kv_heads_are_divided_by_tensor_parallelism_until_one_is_left(tmp_path: Path) -> None:
    known = model(tmp_path, LLAMA_8B)
    one_head = 2 * 32 * 128 * 2
    assert gpu_kv_bytes_per_token(decode(tensor_parallel_size=4), known) == 2 * one_head
    assert gpu_kv_bytes_per_token(decode(tensor_parallel_size=16), known) == one_head
    dp = decode(tensor_parallel_size=4, enable_attention_dp=True)
    assert gpu_kv_bytes_per_token(dp, known) == 8 * one_head


def test_latent_kv_is_whole_on_every_gpu(tmp_path: Path) -> None:
    known = model(tmp_path, DEEPSEEK_V3)
    for tp in (1, 8):
        assert gpu_kv_bytes_per_token(decode(tensor_parallel_size=tp), known) == 61 * 576 * 2


def test_pipeline_stages_divide_the_layers(tmp_path: Path) -> None:
    known = model(tmp_path, LLAMA_8B)
    layer = 2 * 8 * 128 * 2
    assert gpu_kv_bytes_per_token(decode(pipeline_parallel_size=3), known) == 11 * layer
    uneven = decode(pipeline_parallel_size=2, pp_partition=[20, 12])
    assert gpu_kv_bytes_per_token(uneven, known) == 20 * layer


def test_mtp_layers_have_kv_too(tmp_path: Path) -> None:
    known = model(tmp_path, DEEPSEEK_V3)
    assert kv_bytes_per_token(decode(spec__decoding_type="MTP"), known) == 62 * 576 * 2


def test_layers_with_a_window_keep_only_that_much(tmp_path: Path) -> None:
    known = model(tmp_path, GPT_OSS_120B)
    layer = 2 * 8 * 64 * 2
    named = aggregated(kv__max_attention_window=[128, 131072])
    assert gpu_sequence_bytes(aggregated(), known, 8192) == 36 * 8192 * layer
    assert gpu_sequence_bytes(named, known, 8192) == (18 * 8192 + 18 * 128) * layer
    assert gpu_sequence_bytes(named, known, 100) == 36 * 100 * layer


def test_experts_are_shared_out_and_attention_is_copied_under_attention_dp(tmp_path: Path) -> None:
    known = model(tmp_path, DEEPSEEK_V3)
    whole = model_weights(known)
    sizes = {"tensor_parallel_size": 8, "moe_expert_parallel_size": 8}
    divided = budget(decode(**sizes), known, 141).weights
    copied = budget(decode(**sizes, enable_attention_dp=True), known, 141).weights
    assert divided == pytest.approx(whole.total / 8)
    more = (whole.attention + whole.embeddings) * 7 / 8
    assert copied - divided == pytest.approx(more)


def test_spare_slots_of_the_load_balancer_take_memory(tmp_path: Path) -> None:
    known = model(tmp_path, DEEPSEEK_V3)
    plain = budget(decode(**{**EPLB, "moe__load_balancer": None}), known).weights
    spare = budget(decode(**EPLB), known).weights
    assert spare - plain == pytest.approx(model_weights(known).experts / 16 * (288 / 256 - 1))


def test_the_sum_adds_up_and_every_line_of_it_is_shown(tmp_path: Path) -> None:
    known = model(tmp_path, LLAMA_8B)
    found = budget(decode(max_batch_size=8, graph__batch_sizes=[1, 8]), known)
    assert found.free == 80 * GIB - found.weights - RUNTIME_BYTES - found.activations
    assert found.kv == pytest.approx(0.9 * found.free)
    assert found.graphs == 2 * 32 * GRAPH_LAYER_BYTES
    assert found.buffers == 2 * 16384 * 131072
    assert found.left_over == pytest.approx(found.free - found.kv - found.graphs - found.buffers)
    shown = "\n".join(found.lines())
    for part in (
        "- weights 15.0 GiB",
        "runtime 2.0 GiB (estimate)",
        "(0.9 × ",
        "max_tokens_in_buffer",
    ):
        assert part in shown
    assert shown_bytes(found.left_over) in shown


def test_a_worker_that_hands_nothing_over_has_no_buffer(tmp_path: Path) -> None:
    assert budget(aggregated(), model(tmp_path, LLAMA_8B)).buffers == 0


def test_the_buffer_without_tokens_is_the_variables_size_or_512_mb_each_way(tmp_path: Path) -> None:
    known = model(tmp_path, LLAMA_8B)
    doc = without(prefill(), "cache_transceiver_config.max_tokens_in_buffer")
    size, sends = "TRTLLM_KVCACHE_TRANSFER_BUFFER_SIZE", "TRTLLM_KVCACHE_SEND_MAX_CONCURRENCY_NUM"
    assert budget(doc, known).buffers == 2 * (512 << 20)
    assert budget(doc, known, environ={size: "1GB"}).buffers == 2 * GIB
    assert budget(doc, known, environ={size: "1GB", sends: "4"}).buffers == 5 * GIB
    overriding = document(Role.PREFILL, {**doc.values, "env_overrides": {size: "64MB"}})
    assert budget(overriding, known, environ={size: "1GB"}).buffers == 2 * (64 << 20)


def test_limits_of_the_config_cap_the_kv_cache(tmp_path: Path) -> None:
    known = model(tmp_path, LLAMA_8B)
    assert budget(aggregated(kv__max_tokens=1000), known).kv == 1000 * 131072
    assert budget(aggregated(kv__max_gpu_total_bytes=GIB), known).kv == GIB
    assert "limited by the config" in "\n".join(budget(aggregated(kv__max_tokens=9), known).lines())


def test_a_draft_model_at_hand_is_counted_and_one_that_is_not_is_named(tmp_path: Path) -> None:
    known = model(tmp_path, LLAMA_8B)
    drafter = model_folder(tmp_path / "drafter", LLAMA_8B, stored_bytes=GIB)
    kind = {"spec__decoding_type": "Eagle", "spec__max_draft_len": 3}
    alone = budget(decode(), known)
    counted = budget(decode(**kind, spec__speculative_model=str(drafter)), known)
    assert counted.weights - alone.weights == pytest.approx(GIB)
    unknown = budget(decode(**kind, spec__speculative_model="hub/drafter"), known)
    assert unknown.weights == alone.weights
    assert "draft model not counted" in "\n".join(unknown.lines())


@pytest.mark.parametrize("tokens", [8192, 65536, 131072])
def test_the_proposed_fraction_leaves_room_for_everything(tmp_path: Path, tokens: int) -> None:
    known = model(tmp_path, LLAMA_8B)
    doc = decode(kvt__max_tokens_in_buffer=tokens)
    proposal = budget(doc, known).proposal
    assert proposal is not None
    kept = decode(kvt__max_tokens_in_buffer=tokens, kv__free_gpu_memory_fraction=proposal)
    assert budget(kept, known).left_over >= GIB
    more = decode(kvt__max_tokens_in_buffer=tokens, kv__free_gpu_memory_fraction=proposal + 0.01)
    assert proposal == 0.94 or budget(more, known).left_over < GIB


def test_there_is_no_proposal_when_the_buffer_alone_is_too_large(tmp_path: Path) -> None:
    doc = decode(kvt__max_tokens_in_buffer=1 << 20)
    assert budget(doc, model(tmp_path, LLAMA_8B)).proposal is None


def test_a_fraction_is_proposed_only_when_it_is_enough(tmp_path: Path) -> None:
    def advice(batch: int) -> str:
        values = {"max_batch_size": batch, "max_seq_len": 8448, FRACTION: 0.5}
        case = Silent(
            "", "", [document(Role.AGGREGATED, values)], on(80, isl=8192, osl=256), LLAMA_8B
        )
        (found,) = [p for p in findings(case, tmp_path / str(batch)) if p.rule == "memory-kv-cache"]
        return found.advice

    assert advice(50).startswith(f"write {FRACTION}: 0.94")
    assert FRACTION not in advice(500)
    assert "max_batch_size: 30" in advice(500)
