"""Facts and folders of runs for tests of audit, diff, bundle and history. Holds no test."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import msgspec

from trtllm_workers.deploy import proc
from trtllm_workers.deploy.history import Ended, PairInUse
from trtllm_workers.deploy.resolved import FORMAT, EngineSection, Resolved, Sourced
from trtllm_workers.deploy.run import ProcessRecord, RunFolder, RunRecord, create_run
from trtllm_workers.deploy.story import Story
from trtllm_workers.observe.facts import Facts, Library, Limit, Nic

GB = 1 << 30


def facts(process: str = "worker-0", rank: int | None = None, **changes: Any) -> Facts:
    """Return the facts of a worker on a host without fault."""
    values: dict[str, Any] = {
        "process": process,
        "rank": rank,
        "role": "ingress" if process == "ingress" else "aggregated",
        "moment": "ready",
        "written_at_s": 1.0,
        "host": "node1",
        "boot_id": "boot",
        "pid": 100,
        "python": "3.11.7",
        "kernel": "6.8",
        "num_cpus": 16,
        "environment": {"UCX_TLS": "all"},
        "other_variables": (),
        "libraries": (Library("libucp", "/opt/ucx/libucp.so.0.0.0", "0.0.0"),),
        "packages": {"torch": "2.9.0"},
        "nics": (Nic("eth0", ("10.0.0.1",), "up"),),
        "advertised": "10.0.0.1",
        "nic": "eth0",
        "limits": {"nofile": Limit(65536, 65536), "memlock": Limit(-1, -1)},
        "shm_bytes": 16 * GB,
        "shm_free_bytes": 16 * GB,
    }
    return Facts(**(values | changes))


def with_env(one: Facts, **variables: str) -> Facts:
    return msgspec.structs.replace(one, environment={**one.environment, **variables})


def resolved(run_id: str = "aaa111", **changes: Any) -> Resolved:
    values: dict[str, Any] = {
        "format": FORMAT,
        "run_id": run_id,
        "host": "node1",
        "written_at_s": 1.0,
        "version": "0.1.0",
        "model": "demo",
        "settings": {
            "kv_transport": Sourced("ucx", "default"),
            "num_workers": Sourced(1, "default"),
        },
        "engine_configs": {
            "aggregated": EngineSection(
                engine="torch", settings={"max_batch_size": Sourced(8, "agg.yaml:3")}
            )
        },
        "transports": {},
        "packages": {"torch": "2.9.0"},
        "processes": (),
    }
    return Resolved(**(values | changes))


def story(run_id: str = "aaa111", **changes: Any) -> Story:
    values: dict[str, Any] = {
        "folder": None,
        "resolved": resolved(run_id),
        "facts": (facts(), facts("ingress", libraries=())),
        "pairs": (),
    }
    return Story(run_id=run_id, **(values | changes))


def pair(transport: str = "ucx", wire: str = "rc") -> PairInUse:
    return PairInUse(decode="decode-0", prefill="prefill-0", transport=transport, wire=wire)


def run_folder(root: Path, run_id: str = "abc123", **changes: Any) -> tuple[RunFolder, RunRecord]:
    """Make the folder of a run whose launcher is dead, with papers, facts and a log."""
    folder = RunFolder(root / run_id)
    create_run(folder)
    log = folder.logs / "worker-0.log"
    log.write_text(
        "10:00:00.000 info    worker-0  registered\n10:00:01.000 error   worker-0  it broke\n"
    )
    record = RunRecord(
        run_id=run_id,
        host=socket.gethostname(),
        boot_id=proc.boot_id(),
        pid_namespace=proc.pid_namespace(),
        started_at_s=1_700_000_000.0,
        launcher=ProcessRecord(name="launcher", role="launcher", pid=2**22, start_ticks=1),
        processes=(
            ProcessRecord(
                name="worker-0", role="aggregated", pid=2**22 - 1, start_ticks=1, log=str(log)
            ),
        ),
    )
    record = msgspec.structs.replace(record, **changes)
    folder.write(record)
    folder.resolved.write_bytes(msgspec.json.encode(resolved(run_id)))
    folder.facts.mkdir(mode=0o700)
    (folder.facts / "worker-0.json").write_bytes(msgspec.json.encode(facts()))
    return folder, record


def ended(path: Path, run_id: str, **changes: Any) -> None:
    values: dict[str, Any] = {
        "run_id": run_id,
        "host": socket.gethostname(),
        "started_at_s": 1.0,
        "ended_at_s": 2.0,
        "outcome": "stopped",
    }
    path.mkdir(parents=True)
    (path / "ended.json").write_bytes(msgspec.json.encode(Ended(**(values | changes))))
