from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.fakes.transport_peer import make_layout, make_pool
from trtllm_workers.errors import ConfigError, TransportUnavailable
from trtllm_workers.transfer import registry
from trtllm_workers.transfer.base import OnNotify
from trtllm_workers.transfer.registry import open_transport, start_transport, start_transports
from trtllm_workers.transfer.tcp import TcpTransport

POOL = make_pool(2, make_layout(4096))


class Refuses:
    """A transport that does not start; it notes that it was closed."""

    closed: list[str] = []  # noqa: RUF012 — emptied by each test

    def __init__(self, *, peer_id: str, host: str, on_notify: OnNotify) -> None:
        self._peer_id = peer_id

    async def start(self, pool: object) -> None:
        raise TransportUnavailable("no such wire; run: pip install wire")

    async def close(self) -> None:
        self.closed.append(self._peer_id)


class Starts(TcpTransport):
    """A transport that starts, under another name."""

    @property
    def name(self) -> str:
        return "nixl"


@pytest.fixture(autouse=True)
def emptied() -> None:
    Refuses.closed.clear()


def arguments() -> dict[str, Any]:
    return {"peer_id": "w0", "host": "127.0.0.1", "on_notify": lambda _peer_id, _message: None}


def refusing(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(
        registry, "_CLASSES", registry._CLASSES | dict.fromkeys(names, (__name__, "Refuses"))
    )


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'pigeon'; choose one of: auto, ucx, nixl, tcp"):
        open_transport("pigeon", **arguments())


def test_opening_starts_nothing() -> None:
    assert open_transport("tcp", **arguments()).name == "tcp"


def test_a_module_that_cannot_be_imported_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "_CLASSES", {"nixl": ("no_such_module", "Nothing")})
    with pytest.raises(TransportUnavailable, match=r"no_such_module.*'trtllm-launch\[nixl\]'"):
        open_transport("nixl", **arguments())


async def test_the_wanted_transport_is_started() -> None:
    transport = await start_transport("tcp", POOL, **arguments())
    assert isinstance(transport, TcpTransport)
    assert transport.card().peer_id == "w0"
    await transport.close()


async def test_a_wanted_transport_that_does_not_start_is_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusing(monkeypatch, "ucx")
    with pytest.raises(TransportUnavailable, match="pip install wire"):
        await start_transport("ucx", POOL, **arguments())
    assert Refuses.closed == ["w0"]


async def test_auto_takes_the_first_that_starts_and_logs_why_not_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusing(monkeypatch, "ucx", "nixl")
    with capture_logs() as logs:
        transport = await start_transport("auto", POOL, **arguments())
    assert transport.name == "tcp"
    assert [entry["transport"] for entry in logs] == ["ucx", "nixl"]
    assert all("pip install wire" in entry["reason"] for entry in logs)
    assert Refuses.closed == ["w0", "w0"]
    await transport.close()


async def test_auto_tells_every_reason_when_none_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, *registry.TRANSPORTS)
    with pytest.raises(TransportUnavailable, match=r"ucx: .*; nixl: .*; tcp: "):
        await start_transport("auto", POOL, **arguments())


def test_importing_the_registry_and_tcp_loads_nothing_heavy() -> None:
    code = (
        "import sys, trtllm_workers.transfer.registry, trtllm_workers.transfer.tcp\n"
        "import trtllm_workers.transfer.nixl\n"
        "heavy = {'numpy', 'torch', 'ucxx', 'libucx', 'nixl_cu12', 'nixl_cu13'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr


async def test_auto_has_tcp_behind_the_first_that_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, "ucx")
    monkeypatch.setattr(
        registry,
        "_CLASSES",
        registry._CLASSES | {"nixl": (__name__, "Starts")},
    )
    transports = await start_transports("auto", POOL, **arguments())
    assert [transport.name for transport in transports] == ["nixl", "tcp"]
    for transport in transports:
        await transport.close()


async def test_a_wanted_transport_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    (transport,) = await start_transports("tcp", POOL, **arguments())
    await transport.close()
    refusing(monkeypatch, "ucx", "nixl")
    (transport,) = await start_transports("auto", POOL, **arguments())
    assert transport.name == "tcp"
    await transport.close()
