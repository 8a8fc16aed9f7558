"""Processes started one by one that meet on etcd and encrypt between each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.contract.certificates import authority
from tests.contract.etcd import EtcdServer, etcd_server
from tests.e2e.harness import Workbench


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    with etcd_server(tmp_path / "etcd") as made:
        yield made


@pytest.fixture
def shared(etcd: EtcdServer, tmp_path: Path) -> dict[str, str]:
    """The environment that all processes of the deployment are given."""
    files = authority(tmp_path / "authority").signs("process")
    return {
        "ETCD_ENDPOINTS": f"127.0.0.1:{etcd.port}",
        "NAMESPACE": "blue",
        "PLANE_CACERT": str(files.ca),
        "PLANE_CERT": str(files.cert),
        "PLANE_KEY": str(files.key),
    }


def ask(url: str) -> int:
    body = {"model": "demo", "prompt": "hello", "max_tokens": 8}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["completion_tokens"])


def test_deployment_meets_on_etcd_outlives_it_and_is_stopped_through_it(
    bench: Workbench, etcd: EtcdServer, shared: dict[str, str]
) -> None:
    # Listening everywhere: what they tell each other is an address that this host has.
    worker = bench.start("worker", "--engine", "sim", "--host", "0.0.0.0", **shared)
    ingress = bench.start("ingress", "--http-port", "0", "--plane-host", "0.0.0.0", **shared)
    url = ingress.wait_line(r"listening +url=(http://\S+)").group(1)
    ingress.wait_line("worker connected")
    assert ask(url) == 8

    etcd.kill()
    etcd.forget()
    worker.wait_line("etcd cannot be used")
    ingress.wait_line("etcd cannot be used")
    assert ask(url) == 8

    etcd.start()
    worker.wait_line("etcd works again")
    ingress.wait_line("etcd works again")
    assert ask(url) == 8

    assert bench.run("stop", "--all-hosts", **{**shared, "NAMESPACE": "green"}).output == (
        "discovery shows nothing that runs"
    )
    # It finds the same cluster secret: those who held it have put it back.
    stop = bench.run("stop", "--all-hosts", **shared)
    assert stop.popen.returncode == 0, stop.output
    assert (worker.wait_end(), ingress.wait_end()) == (0, 0)


def test_plain_worker_of_an_encrypted_deployment_is_told_what_is_missing(
    bench: Workbench, shared: dict[str, str]
) -> None:
    plain = {name: value for name, value in shared.items() if not name.startswith("PLANE_")}
    worker = bench.start("worker", "--engine", "sim", **plain)
    ingress = bench.start("ingress", "--http-port", "0", **shared)
    for process in (worker, ingress):
        process.wait_line("--plane-cacert, --plane-cert and --plane-key")
    worker.popen.terminate()
    ingress.popen.terminate()
    assert (worker.wait_end(), ingress.wait_end()) == (0, 0)


def test_etcd_that_is_not_there_ends_a_process_with_the_cause(bench: Workbench) -> None:
    worker = bench.run("worker", "--engine", "sim", ETCD_ENDPOINTS="127.0.0.1:1")
    assert worker.popen.returncode == 2
    assert "127.0.0.1:1: connection refused" in worker.output
