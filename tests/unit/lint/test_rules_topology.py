"""Rules about how GPUs share a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.lint.documents import (
    DEEPSEEK_V3,
    LLAMA4_MAVERICK,
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
from trtllm_workers.lint.context import LintContext
from trtllm_workers.lint.problem import Severity
from trtllm_workers.types import Role

TP = "tensor_parallel_size"
PP = "pipeline_parallel_size"
EP = "moe_expert_parallel_size"
BALANCER = "moe_config.load_balancer"

FIRES = [
    Case(
        "world-size",
        Severity.ERROR,
        TP,
        "TP 4 × PP 2 × CP 1 = 8 ≠ 4",
        [aggregated(tensor_parallel_size=4, pipeline_parallel_size=2)],
        LintContext(num_gpus={"aggregated": 4}),
    ),
    Case(
        "world-size",
        Severity.ERROR,
        PP,
        "TP 1 × PP 2 × CP 1 = 2 ≠ 1",
        [decode(pipeline_parallel_size=2)],
        LintContext(num_gpus={"decode": 1}),
    ),
    Case(
        "node-size",
        Severity.ERROR,
        TP,
        "12 mod 8 = 4",
        [aggregated(tensor_parallel_size=12)],
        LintContext(gpus_per_node=8),
    ),
    Case(
        "node-size",
        Severity.NOTE,
        TP,
        "8 mod 3 = 2",
        [aggregated(tensor_parallel_size=3)],
        LintContext(gpus_per_node=8),
    ),
    Case(
        "node-size",
        Severity.ERROR,
        "gpus_per_node",
        "4 GPUs per node, the deployment has 8",
        [aggregated(gpus_per_node=4)],
        LintContext(gpus_per_node=8),
    ),
    Case(
        "expert-parallel",
        Severity.ERROR,
        EP,
        "EP 4 × MoE TP 4 = 16 ≠ TP 8",
        [
            aggregated(
                tensor_parallel_size=8, moe_expert_parallel_size=4, moe_tensor_parallel_size=4
            )
        ],
    ),
    Case(
        "expert-parallel",
        Severity.ERROR,
        EP,
        "EP 8 = 8 > TP 4",
        [aggregated(tensor_parallel_size=4, moe_expert_parallel_size=8)],
    ),
    Case(
        "expert-parallel",
        Severity.ERROR,
        "moe_tensor_parallel_size",
        "MoE TP 3 = 3 does not divide TP 4",
        [aggregated(tensor_parallel_size=4, moe_tensor_parallel_size=3)],
    ),
    Case(
        "attention-heads",
        Severity.ERROR,
        TP,
        "40 mod 16 = 8",
        [aggregated(tensor_parallel_size=16)],
        LintContext(model_name="meta-llama/Llama-4-Maverick-17B-128E-Instruct"),
    ),
    Case(
        "attention-heads",
        Severity.ERROR,
        TP,
        "tensor_parallel_size: 8",
        [aggregated(tensor_parallel_size=16)],
        model=LLAMA4_MAVERICK,
    ),
    Case(
        "kv-heads",
        Severity.ERROR,
        TP,
        "4 mod 6 = 4, 6 mod 4 = 2",
        [aggregated(tensor_parallel_size=6)],
        model={**LLAMA_8B, "num_attention_heads": 24, "num_key_value_heads": 4},
    ),
    Case(
        "kv-heads",
        Severity.NOTE,
        TP,
        "TP 16 / 8 KV heads = 2 copies",
        [aggregated(tensor_parallel_size=16)],
        model=LLAMA_8B,
    ),
    Case(
        "pipeline-layers",
        Severity.ERROR,
        PP,
        "32 layers",
        [aggregated(pipeline_parallel_size=64)],
        model=LLAMA_8B,
    ),
    Case(
        "pipeline-layers",
        Severity.ERROR,
        "pp_partition",
        "16 + 15 = 31 ≠ 32",
        [aggregated(pipeline_parallel_size=2, pp_partition=[16, 15])],
        model=LLAMA_8B,
    ),
    Case(
        "pipeline-layers",
        Severity.ERROR,
        "pp_partition",
        "names 3 stages",
        [aggregated(pipeline_parallel_size=2, pp_partition=[16, 8, 8])],
    ),
    Case(
        "expert-split",
        Severity.ERROR,
        EP,
        "256 mod 12 = 4",
        [aggregated(tensor_parallel_size=12, moe_expert_parallel_size=12)],
        model=DEEPSEEK_V3,
    ),
    Case(
        "expert-split",
        Severity.ERROR,
        BALANCER,
        "200 slots < 256 experts",
        [aggregated(moe__load_balancer={"num_slots": 200})],
        model=DEEPSEEK_V3,
    ),
    Case(
        "expert-split",
        Severity.ERROR,
        BALANCER,
        "288 mod 7 = 1",
        [
            aggregated(
                tensor_parallel_size=7,
                moe_expert_parallel_size=7,
                moe__load_balancer={"num_slots": 288},
            )
        ],
    ),
    Case(
        "wide-ep",
        Severity.ERROR,
        "moe_config.backend",
        "enable_attention_dp: true and moe_expert_parallel_size: 16",
        [aggregated(tensor_parallel_size=16, moe__backend="WIDEEP")],
    ),
    Case(
        "balancer-backend",
        Severity.WARNING,
        BALANCER,
        "CUTLASS",
        [aggregated(moe__load_balancer={"num_slots": 288})],
    ),
    Case(
        "helix-block-size",
        Severity.ERROR,
        "cp_config.tokens_per_block",
        "blocks of 64 tokens, the KV cache of 32",
        [
            aggregated(
                context_parallel_size=2, cp_config={"cp_type": "HELIX", "tokens_per_block": 64}
            )
        ],
    ),
    Case(
        "pipeline-to-tensor",
        Severity.ERROR,
        PP,
        "stages (2)",
        [prefill(pipeline_parallel_size=2), decode(tensor_parallel_size=4)],
    ),
    Case(
        "tensor-parallel-differs",
        Severity.WARNING,
        TP,
        "8 here and 4 in prefill.yaml",
        [prefill(tensor_parallel_size=4), decode(tensor_parallel_size=8)],
    ),
    Case(
        "attention-dp-differs",
        Severity.WARNING,
        "enable_attention_dp",
        "off here and on in prefill.yaml",
        [prefill(enable_attention_dp=True), decode()],
        model=DEEPSEEK_V3,
    ),
]

WIDE = {
    "tensor_parallel_size": 16,
    "moe_expert_parallel_size": 16,
    "enable_attention_dp": True,
    "moe__backend": "WIDEEP",
    "moe__load_balancer": {"num_slots": 288, "layer_updates_per_iter": 2},
}
SILENT = [
    Silent(
        "world-size",
        "it fits",
        [aggregated(tensor_parallel_size=4)],
        LintContext(num_gpus={"aggregated": 4}),
    ),
    Silent(
        "world-size",
        "another role's GPUs",
        [aggregated(tensor_parallel_size=4)],
        LintContext(num_gpus={"decode": 8}),
    ),
    Silent(
        "node-size",
        "whole nodes and parts of one",
        [aggregated(tensor_parallel_size=16), aggregated(tensor_parallel_size=4)],
        LintContext(gpus_per_node=8),
    ),
    Silent("node-size", "nodes are not known", [aggregated(tensor_parallel_size=12)]),
    Silent(
        "expert-parallel",
        "sizes that multiply",
        [
            aggregated(
                tensor_parallel_size=8, moe_expert_parallel_size=4, moe_tensor_parallel_size=2
            ),
            aggregated(tensor_parallel_size=8, moe_expert_parallel_size=4),
            aggregated(tensor_parallel_size=8, moe_expert_parallel_size=-1),
        ],
    ),
    Silent("expert-parallel", "wide EP", [aggregated(**WIDE)]),
    Silent(
        "attention-heads",
        "attention DP",
        [aggregated(tensor_parallel_size=16, enable_attention_dp=True)],
        model=LLAMA4_MAVERICK,
    ),
    Silent("attention-heads", "TP 8", [aggregated(tensor_parallel_size=8)], model=LLAMA4_MAVERICK),
    Silent("attention-heads", "model not known", [aggregated(tensor_parallel_size=7)]),
    Silent("kv-heads", "a head each", [aggregated(tensor_parallel_size=8)], model=LLAMA_8B),
    Silent("kv-heads", "MLA", [aggregated(tensor_parallel_size=96)], model=DEEPSEEK_V3),
    Silent(
        "kv-heads",
        "attention DP",
        [aggregated(tensor_parallel_size=16, enable_attention_dp=True)],
        model=LLAMA_8B,
    ),
    Silent(
        "pipeline-layers",
        "all layers shared out",
        [aggregated(pipeline_parallel_size=2, pp_partition=[17, 15])],
        model=LLAMA_8B,
    ),
    Silent("expert-split", "wide EP with slots", [aggregated(**WIDE)], model=DEEPSEEK_V3),
    Silent("expert-split", "no experts", [aggregated(moe_expert_parallel_size=1)], model=LLAMA_8B),
    Silent("wide-ep", "all there", [aggregated(**WIDE)]),
    Silent("wide-ep", "another backend", [aggregated(moe__backend="CUTLASS")]),
    Silent("balancer-backend", "WIDEEP", [aggregated(**WIDE)]),
    Silent(
        "helix-block-size",
        "equal",
        [
            aggregated(
                context_parallel_size=2, cp_config={"cp_type": "HELIX", "tokens_per_block": 32}
            )
        ],
    ),
    Silent(
        "helix-block-size",
        "no context parallelism",
        [aggregated(cp_config={"cp_type": "HELIX", "tokens_per_block": 64})],
    ),
    Silent(
        "pipeline-to-tensor",
        "decode in stages too",
        [prefill(pipeline_parallel_size=2), decode(pipeline_parallel_size=2)],
    ),
    Silent(
        "tensor-parallel-differs",
        "alike",
        [prefill(tensor_parallel_size=4), decode(tensor_parallel_size=4)],
    ),
    Silent(
        "attention-dp-differs",
        "not MLA",
        [prefill(enable_attention_dp=True), decode()],
        model=LLAMA_8B,
    ),
    Silent(
        "attention-dp-differs",
        "on both sides",
        [prefill(enable_attention_dp=True), decode(enable_attention_dp=True)],
        model=DEEPSEEK_V3,
    ),
]


@pytest.mark.parametrize("case", FIRES, ids=lambda case: case.id)
def test_rule_speaks(case: Case, tmp_path: Path) -> None:
    assert_fires(case, tmp_path)


@pytest.mark.parametrize("case", SILENT, ids=lambda case: case.id)
def test_rule_is_silent(case: Silent, tmp_path: Path) -> None:
    assert_silent(case, tmp_path)


def test_a_load_balancer_in_a_file_beside_the_config_is_read(tmp_path: Path) -> None:
    (tmp_path / "eplb.yaml").write_text("num_slots: 200\nlayer_updates_per_iter: 2\n")
    values = {"moe_config.load_balancer": "eplb.yaml"}
    doc = document(Role.DECODE, values, path=tmp_path / "decode.yaml")
    case = Case("expert-split", Severity.ERROR, BALANCER, "200 slots", [doc], model=DEEPSEEK_V3)
    assert_fires(case, tmp_path)


def test_a_load_balancer_file_that_is_missing_or_broken_says_nothing_here(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("num_slots: [")
    for name in ("missing.yaml", "broken.yaml"):
        values = {"moe_config.load_balancer": name}
        doc = document(Role.DECODE, values, path=tmp_path / "decode.yaml")
        assert_silent(Silent("expert-split", "unknown", [doc], model=DEEPSEEK_V3), tmp_path)
