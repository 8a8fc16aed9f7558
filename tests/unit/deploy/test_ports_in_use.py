"""The port check names the holder, and runs of ours by their id."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from trtllm_workers.deploy import proc
from trtllm_workers.deploy.ports import port_holder, require_free_port
from trtllm_workers.deploy.run import ProcessRecord, Run, RunRecord
from trtllm_workers.errors import ConfigError


@pytest.fixture
def held() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def run_on(port: int) -> Run:
    me = proc.read(os.getpid())
    assert me is not None
    record = RunRecord(
        run_id="abc123",
        host="h",
        boot_id="b",
        started_at_s=0.0,
        launcher=ProcessRecord(name="launcher", role="launcher", pid=1, start_ticks=1),
        http_host="127.0.0.1",
        http_port=port,
    )
    return Run("abc123", None, record, members={os.getpid(): ("ingress", me)})


def test_port_in_use_names_the_process_that_holds_it(held: int) -> None:
    assert port_holder(held) == os.getpid()
    with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} \(.*python") as caught:
        require_free_port("127.0.0.1", held)
    assert caught.value.exit_code == 2
    assert caught.value.param == "http_port"


def test_port_held_by_a_run_names_the_run_and_how_to_stop_it(held: int) -> None:
    with pytest.raises(ConfigError, match="run abc123; stop it with: trtllm-launch stop abc123"):
        require_free_port("127.0.0.1", held, [run_on(0)])


def test_port_that_a_starting_run_will_take_is_in_use_already() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    require_free_port("127.0.0.1", port)
    for host in ("127.0.0.1", "0.0.0.0"):
        with pytest.raises(ConfigError, match="in use by run abc123"):
            require_free_port(host, port, [run_on(port)])
    require_free_port("127.0.0.2", port, [run_on(port)])


def test_wildcard_collides_with_loopback(held: int) -> None:
    with pytest.raises(ConfigError, match=f"port {held} on 0.0.0.0 is in use"):
        require_free_port("0.0.0.0", held)


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("192.0.2.1", "'192.0.2.1' is no address of this machine"),
        ("no such host", "unknown host 'no such host'"),
    ],
)
def test_host_that_is_not_here_is_named(host: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        require_free_port(host, 0)
    assert caught.value.param == "http_host"


def test_port_nobody_holds_has_no_holder(tmp_path: Path) -> None:
    assert port_holder(1) is None
