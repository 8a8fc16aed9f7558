"""One environment for all ranks: what is sent, what a node adds, what differs."""

from __future__ import annotations

from trtllm_workers.deploy.slurm.records import RankRecord
from trtllm_workers.deploy.slurm.variables import (
    changed_on_node,
    comparable,
    digest,
    disagreement,
    to_send,
)

SHELL = {
    "UCX_TLS": "rc,cuda",
    "NCCL_DEBUG": "WARN",
    "LD_LIBRARY_PATH": "/opt/lib",
    "CUDA_VISIBLE_DEVICES": "0",
    "HF_TOKEN": "hf_secret_value",
    "CLUSTER_SECRET": "0123456789abcdef0123",
    "HOME": "/root",
    "TRTLLM_LAUNCH_RUN_ID": "abc",
}


def rank(number: int, node: str, **variables: str) -> RankRecord:
    return RankRecord(
        rank=number,
        node=node,
        host=node,
        pid=1,
        address="10.0.0.1",
        digest=digest(variables),
        variables=variables,
    )


def test_what_counts_is_sent_and_nothing_else() -> None:
    sent = to_send(SHELL, in_container=False)
    assert set(sent) == {"UCX_TLS", "NCCL_DEBUG", "LD_LIBRARY_PATH", "HF_TOKEN", "CLUSTER_SECRET"}


def test_a_container_keeps_its_own_library_paths() -> None:
    assert "LD_LIBRARY_PATH" not in to_send(SHELL, in_container=True)


def test_secrets_are_compared_and_not_written() -> None:
    seen = comparable(SHELL)
    assert "hf_secret_value" not in str(seen)
    assert seen["HF_TOKEN"] != comparable({**SHELL, "HF_TOKEN": "another"})["HF_TOKEN"]


def test_what_a_node_adds_or_has_otherwise_is_told() -> None:
    sent = to_send(SHELL, in_container=False)
    here = {**SHELL, "UCX_TLS": "tcp", "NCCL_SOCKET_IFNAME": "eth0", "TRTLLM_TOKEN": "x"}
    words = changed_on_node(here, sent)
    assert "UCX_TLS=tcp of the node is replaced by rc,cuda" in words
    assert "NCCL_SOCKET_IFNAME=eth0 is set by the node" in words
    assert "TRTLLM_TOKEN=(not shown) is set by the node" in words
    assert changed_on_node(SHELL, sent) == ()


def test_ranks_that_differ_are_named_with_variable_rank_and_node() -> None:
    ranks = {
        0: rank(0, "n1", UCX_TLS="rc", NCCL_DEBUG="INFO"),
        1: rank(1, "n1", UCX_TLS="rc", NCCL_DEBUG="INFO"),
        2: rank(2, "n2", UCX_TLS="tcp", NCCL_DEBUG="INFO"),
    }
    text = disagreement("decode-0", ranks)
    assert "UCX_TLS: 'rc' on ranks 0, 1; 'tcp' on rank 2" in text
    assert "rank 2 is on n2" in text
    assert "NCCL_DEBUG" not in text


def test_ranks_that_agree_are_not_talked_about() -> None:
    assert disagreement("x", {0: rank(0, "n1", A="1"), 1: rank(1, "n2", A="1")}) == ""
