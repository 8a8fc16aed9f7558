"""Doctor about etcd, NATS, SLURM, limits and left-overs: a remedy for each, a problem only where needed."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.deploy.support import make_settings
from trtllm_workers.deploy import doctor_host
from trtllm_workers.deploy.doctor_services import service_findings
from trtllm_workers.deploy.findings import Finding


def services(environ: dict[str, str] | None = None, **settings: Any) -> dict[str, Finding]:
    found = service_findings(make_settings(**settings), environ or {"PATH": "/nowhere"})
    return {one.subject: one for one in found}


def program(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_services_that_nobody_asked_for_are_no_problem() -> None:
    assert {one.level for one in services().values()} <= {"ok", "note"}


def test_etcd_that_does_not_answer_is_a_problem_with_its_address() -> None:
    port = closed_port()
    found = services(discovery=f"etcd://127.0.0.1:{port}")["etcd"]
    assert found.level == "problem"
    assert f"127.0.0.1:{port}" in found.text
    assert "ETCD_ENDPOINTS" in found.fix


def test_etcd_that_answers_is_in_order() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"etcd://127.0.0.1:{listener.getsockname()[1]}"
        assert services(discovery=url)["etcd"].level == "ok"


def test_nats_counts_only_for_a_run_with_a_prefill_queue() -> None:
    server = f"nats://u:secretword@127.0.0.1:{closed_port()}"
    assert services(nats_server=server)["NATS"].level == "ok"
    found = services(nats_server=server, disaggregated=True, prefill_dispatch="queue")["NATS"]
    assert found.level == "problem"
    assert "secretword" not in found.text + found.fix


def test_slurm_tells_version_allocation_and_mpi_types(tmp_path: Path) -> None:
    bin_dir = tmp_path / "bin"
    body = 'case $1 in --version) echo slurm 23.11.4;; --mpi=list) printf "%s" "none pmix pmix_v4" >&2;; esac'
    program(bin_dir, "srun", body)
    program(bin_dir, "sbatch", "true")
    environ = {"PATH": str(bin_dir), "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2"}
    found = services(environ)
    assert found["SLURM"].text == "slurm 23.11.4, allocation 77 of 2 nodes"
    assert found["SLURM MPI"].text == "srun offers none, pmix, pmix_v4"
    program(bin_dir, "srun", "echo slurm 23; echo none pmi2")
    assert services(environ)["SLURM MPI"].level == "note"
    assert "--mpi-launch" in services(environ)["SLURM MPI"].fix


def test_missing_slurm_says_where_to_run_it(tmp_path: Path) -> None:
    assert "login node" in services({"PATH": str(tmp_path)})["SLURM"].fix
    inside = services({"PATH": str(tmp_path), "SLURM_JOB_ID": "1"})["SLURM"]
    assert "container" in inside.fix


LOW_LIMITS = """
import resource
from trtllm_workers.deploy import doctor_host as host
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 2048))
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
host._has_rdma = lambda: True
for one in host.limit_findings():
    print(one.subject, one.level, one.fix, sep="|")
"""


def test_low_limits_come_with_the_command_that_raises_them() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOW_LIMITS], capture_output=True, text=True, timeout=30, check=True
    )
    rows = {line.split("|")[0]: line.split("|")[1:] for line in done.stdout.splitlines()}
    assert rows["open files"] == ["note", "ulimit -n 2048"]
    assert rows["memlock"][0] == "note"
    assert rows["memlock"][1].startswith("ulimit -l unlimited")


def test_a_limit_that_somebody_else_judged_is_not_judged_twice() -> None:
    found = [one.subject for one in doctor_host.limit_findings(known={"memlock"})]
    assert "memlock" not in found
    assert "open files" in found
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] != 0


def test_shared_memory_says_its_size_and_that_it_is_missing(tmp_path: Path) -> None:
    assert "GiB free" in doctor_host.shared_memory(str(tmp_path)).text
    assert doctor_host.shared_memory("/no/such/folder").level == "note"


def test_left_overs_are_counted_and_gc_is_the_remedy(tmp_path: Path) -> None:
    from tests.unit.deploy.test_run_folder import new_folder, write_record

    assert doctor_host.left_overs([tmp_path]).level == "ok"
    folder = new_folder(tmp_path)
    write_record(folder)
    found = doctor_host.left_overs([tmp_path])
    assert (found.level, found.fix) == ("note", "trtllm-launch gc")
    assert "1 run folders" in found.text or "1 run folder" in found.text
    assert folder.path.exists()


@pytest.mark.parametrize("settings", [{}, {"disaggregated": True, "prefill_dispatch": "queue"}])
def test_each_missing_service_has_a_remedy(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trtllm_workers.deploy import doctor_services

    monkeypatch.setattr(doctor_services, "_lacks", lambda modules, programs: [*modules, *programs])
    for one in services(**settings).values():
        assert one.level != "ok"
        assert one.fix
