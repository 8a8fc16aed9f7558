"""What a process writes down of its surroundings: where, what, and without secrets."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from trtllm_workers.observe.facts import (
    FactsFile,
    collect,
    facts_path,
    libraries_in,
    matters,
    read_facts,
)

MAPS = """
7f00-7f01 r-xp 0000 08:01 1 /opt/hpcx/ucx/lib/libucp.so.0.0.0
7f01-7f02 r--p 0000 08:01 1 /opt/hpcx/ucx/lib/libucp.so.0.0.0
7f02-7f03 r-xp 0000 08:01 2 /venv/nixl.libs/libucp-2c1d2a3b.so.0.0.0
7f03-7f04 r-xp 0000 08:01 3 /venv/torch/lib/libnccl.so.2
7f04-7f05 r-xp 0000 08:01 4 /usr/lib/libc.so.6
7f05-7f06 r-xp 0000 08:01 5 /venv/mpi4py/MPI.mpich.cpython-311-x86_64-linux-gnu.so
7f06-7f07 rw-p 0000 00:00 0 [heap]
"""


def test_facts_lie_beside_the_status_file_one_per_rank(tmp_path: Path) -> None:
    status = tmp_path / "run" / "status" / "worker-0.json"
    assert facts_path(status, None) == tmp_path / "run" / "facts" / "worker-0.json"
    assert facts_path(status, 3) == tmp_path / "run" / "facts" / "worker-0.3.json"
    assert facts_path(tmp_path / "alone.json", None) == tmp_path / "facts" / "alone.json"


def test_facts_hold_what_matters_and_no_secret(tmp_path: Path) -> None:
    environ = {
        "UCX_TLS": "tcp",
        "HF_TOKEN": "hf_secretsecretsecret",
        "MY_PASSWORD": "hunter22",
        "HTTPS_PROXY": "http://u:hunter22@proxy:3128",
        "TRTLLM_LAUNCH_RUN_ID": "abc123",
    }
    facts = FactsFile(
        tmp_path / "status" / "w.json",
        environ,
        role="decode",
        rank=1,
        addresses=[("eth9", "10.1.2.3")],
    )
    facts.write("start")
    facts.write("ready", "10.1.2.3")
    (path,) = (tmp_path / "facts").iterdir()
    assert b"hunter22" not in path.read_bytes()
    assert b"hf_secret" not in path.read_bytes()
    (found,) = read_facts(tmp_path / "facts")
    assert (found.who, found.moment, found.nic) == ("w rank 1", "ready", "eth9")
    assert found.environment["UCX_TLS"] == "tcp"
    assert "MY_PASSWORD" in found.other_variables
    assert "TRTLLM_LAUNCH_RUN_ID" not in found.environment
    assert found.limits["nofile"].soft != 0
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_without_a_status_file_nothing_is_written_and_a_full_disk_harms_nobody(
    tmp_path: Path,
) -> None:
    FactsFile(None, {}, role="x").write("start")
    taken = tmp_path / "facts"
    taken.write_text("not a folder")
    FactsFile(tmp_path / "status" / "w.json", {}, role="x").write("start")
    assert taken.read_text() == "not a folder"


def test_libraries_are_named_by_what_they_are_not_by_their_hash() -> None:
    found = [(one.name, Path(one.path).name, one.version) for one in libraries_in(MAPS)]
    assert found == [
        ("libnccl", "libnccl.so.2", "2"),
        ("libucp", "libucp.so.0.0.0", "0.0.0"),
        ("libucp", "libucp-2c1d2a3b.so.0.0.0", "0.0.0"),
        ("mpi4py.MPI", "MPI.mpich.cpython-311-x86_64-linux-gnu.so", ""),
    ]


@pytest.mark.parametrize(
    ("name", "kept"),
    [("NCCL_DEBUG", True), ("PATH", True), ("SLURM_PROCID", False), ("TRTLLM_LAUNCH_LOG", False)],
)
def test_only_families_that_matter_keep_their_values(name: str, kept: bool) -> None:
    assert matters(name) is kept


def test_files_that_are_no_facts_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text('{"process": 7}')
    assert read_facts(tmp_path) == []
    assert read_facts(tmp_path / "nowhere") == []


def test_collecting_costs_no_more_than_30_ms() -> None:
    collect("w", dict(os.environ))
    fastest = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        collect("w", dict(os.environ))
        fastest = min(fastest, time.perf_counter() - began)
    assert fastest < 0.030
