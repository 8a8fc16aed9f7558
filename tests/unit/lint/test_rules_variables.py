"""Rules about environment variables."""

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
    prefill,
    without,
)
from trtllm_workers.lint.context import LintContext
from trtllm_workers.lint.problem import Severity
from trtllm_workers.lint.rules.variables import parse_size

UCX, NIXL = "TRTLLM_USE_UCX_KVCACHE", "TRTLLM_USE_NIXL_KVCACHE"
BUFFER = "TRTLLM_KVCACHE_TRANSFER_BUFFER_SIZE"
MNNVL = "UCX_CUDA_IPC_ENABLE_MNNVL"


def given(**environ: str) -> LintContext:
    return LintContext(environ=environ)


FIRES = [
    Case(
        "variables-switches",
        Severity.WARNING,
        NIXL,
        f"{NIXL} wins",
        [decode(kvt__backend="DEFAULT")],
        given(**{UCX: "1", NIXL: "1"}),
    ),
    Case(
        "variables-backend",
        Severity.WARNING,
        NIXL,
        "backend UCX, which wins",
        [decode()],
        given(**{NIXL: "1"}),
    ),
    Case(
        "variables-backend",
        Severity.WARNING,
        f"env_overrides.{NIXL}",
        "decode.yaml has backend UCX",
        [decode(env_overrides={NIXL: "1"})],
    ),
    Case(
        "variables-nixl-conflict",
        Severity.ERROR,
        "NIXL_BACKEND",
        "EFA",
        [decode()],
        given(NIXL_BACKEND="LIBFABRIC", TRTLLM_NIXL_KVCACHE_BACKEND="LIBFABRIC"),
    ),
    Case(
        "variables-nixl-conflict",
        Severity.ERROR,
        "env_overrides.NIXL_BACKEND",
        "both set",
        [decode(env_overrides={"NIXL_BACKEND": "UCX"})],
        given(TRTLLM_NIXL_KVCACHE_BACKEND="UCX"),
    ),
    Case(
        "variables-nixl-backend",
        Severity.WARNING,
        "TRTLLM_NIXL_KVCACHE_BACKEND",
        "libfabrics",
        [decode()],
        given(TRTLLM_NIXL_KVCACHE_BACKEND="libfabrics"),
    ),
    Case(
        "variables-ucx-tls",
        Severity.ERROR,
        "UCX_TLS",
        "SLURM",
        [decode()],
        given(UCX_TLS="tcp"),
    ),
    Case(
        "variables-ucx-tls",
        Severity.ERROR,
        "env_overrides.UCX_TLS",
        "rc,sm,cuda_copy,cuda_ipc",
        [decode(env_overrides={"UCX_TLS": "rc,sm"})],
    ),
    Case(
        "variables-ucx-devices",
        Severity.NOTE,
        "UCX_NET_DEVICES",
        "several nodes",
        [prefill(tensor_parallel_size=8), decode(tensor_parallel_size=8)],
        LintContext(gpus_per_node=8),
    ),
    Case("variables-mnnvl", Severity.WARNING, MNNVL, "neither", [decode()], given(**{MNNVL: "2"})),
    Case(
        "variables-mnnvl",
        Severity.NOTE,
        MNNVL,
        "one NVLink domain",
        [decode(tensor_parallel_size=16)],
        LintContext(gpus_per_node=8, environ={MNNVL: "y"}),
    ),
    Case(
        "variables-buffer-size",
        Severity.WARNING,
        BUFFER,
        "512",
        [decode()],
        given(**{BUFFER: "512"}),
    ),
    Case(
        "variables-buffer-size",
        Severity.NOTE,
        BUFFER,
        "max_tokens_in_buffer",
        [decode()],
        given(**{BUFFER: "1GB"}),
    ),
    Case(
        "variables-override",
        Severity.WARNING,
        "env_overrides.UCX_NET_DEVICES",
        "mlx5_1:1",
        [decode(env_overrides={"UCX_NET_DEVICES": "mlx5_1:1"})],
        given(UCX_NET_DEVICES="mlx5_0:1"),
    ),
    Case(
        "variables-mpi-spawn",
        Severity.WARNING,
        "SLURM_JOB_ID",
        "SLURM_NODELIST",
        [aggregated()],
        given(SLURM_JOB_ID="7", SLURM_NODELIST="a[1-2]"),
    ),
]

SILENT = [
    Silent("variables-switches", "one", [decode()], given(**{UCX: "1", NIXL: "0"})),
    Silent("variables-backend", "the same", [decode()], given(**{UCX: "1"})),
    Silent(
        "variables-backend",
        "DEFAULT listens",
        [decode(kvt__backend="DEFAULT")],
        given(**{NIXL: "1"}),
    ),
    Silent("variables-nixl-conflict", "one", [decode()], given(NIXL_BACKEND="UCX")),
    Silent(
        "variables-nixl-backend",
        "known",
        [decode()],
        given(TRTLLM_NIXL_KVCACHE_BACKEND="LIBFABRIC"),
    ),
    *(
        Silent("variables-ucx-tls", value, [decode()], given(UCX_TLS=value))
        for value in ("tcp,cuda_copy,cuda_ipc", "all", "^tcp", "rc,cuda")
    ),
    Silent(
        "variables-ucx-devices",
        "one node, for the pair or the aggregated worker",
        [
            prefill(tensor_parallel_size=4),
            decode(tensor_parallel_size=4),
            aggregated(tensor_parallel_size=8),
        ],
        LintContext(gpus_per_node=8),
    ),
    Silent(
        "variables-ucx-devices",
        "set",
        [decode(tensor_parallel_size=16)],
        LintContext(gpus_per_node=8, environ={"UCX_NET_DEVICES": "mlx5_0:1"}),
    ),
    Silent("variables-mnnvl", "n", [decode()], given(**{MNNVL: "n"})),
    Silent(
        "variables-mnnvl",
        "one node",
        [decode()],
        LintContext(gpus_per_node=8, environ={MNNVL: "y"}),
    ),
    Silent(
        "variables-buffer-size",
        "a size",
        [without(decode(), "cache_transceiver_config.max_tokens_in_buffer")],
        given(**{BUFFER: "512MB"}),
    ),
    Silent(
        "variables-override",
        "the same",
        [decode(env_overrides={"UCX_NET_DEVICES": "mlx5_0:1"})],
        given(UCX_NET_DEVICES="mlx5_0:1"),
    ),
    Silent(
        "variables-override",
        "nothing outside",
        [decode(env_overrides={"UCX_NET_DEVICES": "mlx5_0:1"})],
    ),
    Silent(
        "variables-mpi-spawn",
        "launched by trtllm-llmapi-launch",
        [aggregated()],
        given(SLURM_JOB_ID="7", TLLM_SPAWN_PROXY_PROCESS="1"),
    ),
    Silent("variables-mpi-spawn", "no allocation", [aggregated()]),
]


@pytest.mark.parametrize("case", FIRES, ids=lambda case: case.id)
def test_rule_speaks(case: Case, tmp_path: Path) -> None:
    assert_fires(case, tmp_path)


@pytest.mark.parametrize("case", SILENT, ids=lambda case: case.id)
def test_rule_is_silent(case: Silent, tmp_path: Path) -> None:
    assert_silent(case, tmp_path)


def test_a_config_is_not_blamed_for_what_the_environment_alone_does(tmp_path: Path) -> None:
    case = Case(
        "variables-ucx-tls",
        Severity.ERROR,
        "UCX_TLS",
        "tcp",
        [decode(env_overrides={"TLLM_LOG_LEVEL": "info"})],
        given(UCX_TLS="tcp"),
    )
    assert_fires(case, tmp_path)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MB", 512 << 20),
        ("1gb", 1 << 30),
        (" 64 KB ", 64 << 10),
        ("100B", 100),
        ("512", None),
        ("512M", None),
        ("0.5GB", None),
        ("", None),
    ],
)
def test_sizes_of_the_buffer(text: str, size: int | None) -> None:
    assert parse_size(text) == size
