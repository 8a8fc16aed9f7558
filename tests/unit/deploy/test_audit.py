"""Ranks side by side: what must be the same, what may differ, what is known to hurt."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.deploy.papers import GB, facts, with_env
from trtllm_workers.deploy.audit import Audit, as_text, audit, names_of
from trtllm_workers.observe.facts import Facts, Library, Limit


def audited(*everyone: Facts) -> Audit:
    return audit(names_of([("abc123", everyone)]), ["abc123"])


def flagged(*everyone: Facts) -> dict[str, str]:
    return {one.name: one.level for one in audited(*everyone).flags}


def test_ranks_that_see_the_same_do_not_differ() -> None:
    found = audited(facts(rank=0), facts(rank=1), facts("ingress", environment={}, libraries=()))
    assert not found.differs
    assert found.flags == []
    assert found.same["environment"] == {"UCX_TLS": "all"}
    assert "nothing differs that should be the same" in as_text(found)


def test_a_variable_that_one_rank_lacks_is_marked() -> None:
    found = audited(facts(rank=0), facts(rank=1), facts(rank=2, environment={}))
    assert found.differs
    (one,) = found.differences
    assert one.values == {
        "all": ["worker-0 rank 0", "worker-0 rank 1"],
        "(not set)": ["worker-0 rank 2"],
    }
    text = as_text(found)
    assert text.index("DIFFERS") < text.index("environment: UCX_TLS")
    assert "≠ (not set)  worker-0 rank 2" in text


def test_what_differs_by_design_stands_apart() -> None:
    ranks = [
        with_env(facts(rank=rank), CUDA_VISIBLE_DEVICES=str(rank), OMPI_COMM_WORLD_RANK=str(rank))
        for rank in range(2)
    ]
    found = audited(*ranks)
    assert not found.differs
    assert {one.name for one in found.differences} == {
        "CUDA_VISIBLE_DEVICES",
        "OMPI_COMM_WORLD_RANK",
    }
    assert "differs by design" in as_text(found)


def test_threads_may_differ_between_workers_but_not_between_ranks_of_one() -> None:
    one, other = (
        with_env(facts("a"), OMP_NUM_THREADS="2"),
        with_env(facts("b"), OMP_NUM_THREADS="4"),
    )
    assert not audited(one, other, facts("ingress")).differs
    ranks = [with_env(facts(rank=rank), OMP_NUM_THREADS=str(rank + 1)) for rank in range(2)]
    assert audited(*ranks).differs


def test_another_file_of_a_library_is_a_difference_its_absence_only_where_it_should_be() -> None:
    ours = facts("a")
    other = facts("b", libraries=(Library("libucp", "/usr/lib/libucp.so.0", "0"),))
    assert audited(ours, other).differs
    early = facts("a", 1, moment="start", libraries=())
    assert not audited(facts("a", 0), early).differs
    assert audited(facts("a"), facts("b", libraries=())).differs
    prefill = facts("p", role="prefill", libraries=())
    assert not audited(facts("d", role="decode"), prefill).differs


def test_hosts_are_compared_and_their_addresses_differ_by_design() -> None:
    near, far = facts("a"), facts("b", host="node2", advertised="10.0.0.2")
    assert not audited(near, far).differs
    found = audited(near, facts("b", host="node2", advertised="172.17.0.1", nic="docker0"))
    assert [(one.section, one.name) for one in found.differences if not one.expected] == [
        ("network", "advertised on")
    ]


def test_parts_of_one_name_on_two_hosts_are_told_apart() -> None:
    runs = [("r1", [facts()]), ("r2", [facts(host="node2")])]
    assert list(names_of(runs)) == ["r1/worker-0", "r2/worker-0"]
    assert list(names_of([("r1", [facts(), facts(host="node2")])])) == [
        "worker-0",
        "worker-0@node2",
    ]


@pytest.mark.parametrize(
    ("changes", "name", "level"),
    [
        ({"environment": {"UCX_TLS": "tcp"}, "gpus": ("nvidia0",)}, "UCX_TLS=tcp", "problem"),
        ({"environment": {"UCX_TLS": "tcp"}}, "UCX_TLS=tcp", "note"),
        ({"environment": {"UCX_TLS": "^cuda_ipc"}}, "UCX_TLS=^cuda_ipc", "note"),
        (
            {"environment": {"NIXL_BACKEND": "UCX", "TRTLLM_NIXL_KVCACHE_BACKEND": "LIBFABRIC"}},
            "NIXL_BACKEND and TRTLLM_NIXL_KVCACHE_BACKEND",
            "problem",
        ),
        (
            {"rdma_devices": ("mlx5_0:1 ACTIVE",), "limits": {"memlock": Limit(65536, 65536)}},
            "memlock",
            "problem",
        ),
        ({"limits": {"nofile": Limit(1024, 4096)}}, "nofile", "note"),
        ({"shm_bytes": 64 << 20}, "/dev/shm", "note"),
        ({"environment": {"CUDA_VISIBLE_DEVICES": ""}, "gpus": ("nvidia0",)}, "CUDA_VISIBLE_DEVICES", "problem"),
        ({"environment": {"NCCL_SOCKET_IFNAME": "ib0"}}, "NCCL_SOCKET_IFNAME=ib0", "problem"),
        ({"environment": {"UCX_NET_DEVICES": "mlx5_9:1"}}, "UCX_NET_DEVICES=mlx5_9:1", "problem"),
        (
            {"environment": {"LD_LIBRARY_PATH": "/usr/local/cuda/lib64/stubs:/x"}},
            "LD_LIBRARY_PATH",
            "problem",
        ),
        (
            {"libraries": (Library("libucp", "/a/libucp.so.0", ""), Library("libucp", "/b/libucp.so.0", ""))},
            "libucp",
            "note",
        ),
    ],
)  # fmt: skip
def test_each_known_trouble_is_flagged_with_a_remedy(
    changes: dict[str, Any], name: str, level: str
) -> None:
    assert flagged(facts(**changes)) == {name: level}
    (flag,) = audited(facts(**changes)).flags
    assert flag.fix
    assert flag.fix in as_text(audited(facts(**changes)))


@pytest.mark.parametrize(
    "variables",
    [
        {"UCX_TLS": "rc,cuda_copy,cuda_ipc"},
        {"UCX_TLS": "^tcp"},
        {"UCX_NET_DEVICES": "eth0"},
        {"NCCL_SOCKET_IFNAME": "eth"},
        {"NCCL_SOCKET_IFNAME": "^docker"},
        {"OMPI_MCA_btl_tcp_if_include": "10.0.0.0/8"},
    ],
)
def test_sound_settings_are_not_flagged(variables: dict[str, str]) -> None:
    assert flagged(facts(environment=variables)) == {}


def test_too_many_threads_and_loopback_among_hosts_are_flagged() -> None:
    torch = (Library("libtorch", "/v/libtorch.so"),)
    busy = [
        facts(f"w{n}", libraries=torch, environment={"OMP_NUM_THREADS": "16"}) for n in range(2)
    ]
    assert flagged(*busy) == {"OMP_NUM_THREADS": "note"}
    calm = [facts(f"w{n}", libraries=torch, environment={"OMP_NUM_THREADS": "8"}) for n in range(2)]
    assert flagged(*calm) == {}
    away = facts("b", host="node2", advertised="127.0.0.1", nic="lo", shm_bytes=16 * GB)
    assert flagged(facts("a"), away)["advertised address"] == "problem"
