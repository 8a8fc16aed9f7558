"""What is particular to the nixl transport; what every transport does is in tests/contract."""

from __future__ import annotations

import msgspec
import pytest

from tests.fakes.transport_peer import make_layout, make_pool
from trtllm_workers.config.env import environment, prepare_ucx_of_nixl
from trtllm_workers.errors import TransferFailed, TransportUnavailable
from trtllm_workers.transfer import nixl_agent
from trtllm_workers.transfer.nixl import NixlTransport
from trtllm_workers.transfer.nixl_card import NixlDoor
from trtllm_workers.types import TransportCard


def made(peer_id: str = "owner", host: str = "127.0.0.1") -> NixlTransport:
    return NixlTransport(peer_id=peer_id, host=host, on_notify=lambda _peer_id, _message: None)


async def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nixl_agent, "_PACKAGES", ("no_such_nixl",))
    transport = made()
    with pytest.raises(TransportUnavailable, match=r"no_such_nixl.*'trtllm-launch\[nixl\]'"):
        await transport.start(make_pool(2, make_layout(4096)))
    await transport.close()


async def test_a_card_before_start_is_refused() -> None:
    with pytest.raises(TransportUnavailable, match="start it first"):
        made().card()


async def test_a_peer_that_only_tcp_reaches_is_refused_with_the_remedy() -> None:
    pytest.importorskip("nixl_cu12")
    transport = made()
    await transport.start(make_pool(2, make_layout(4096)))
    try:
        card = transport.card()
        door = msgspec.msgpack.decode(card.address, type=NixlDoor)
        assert card == _elsewhere(card, door, place=door.place)
        with pytest.raises(TransferFailed, match=r"connect to owner: .* --kv-transport ucx"):
            await transport.connect(_elsewhere(card, door, place="another host"), 5.0)
    finally:
        await transport.close()


def _elsewhere(card: TransportCard, door: NixlDoor, *, place: str) -> TransportCard:
    moved = msgspec.structs.replace(door, place=place, has_rdma=False)
    return msgspec.structs.replace(card, address=msgspec.msgpack.encode(moved))


def test_what_ucxx_wrote_into_the_environment_is_taken_back_and_the_users_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UCX_RNDV_FRAG_MEM_TYPE", "cuda")
    monkeypatch.setenv("UCX_MAX_RNDV_RAILS", "2")
    monkeypatch.setenv("UCX_LOG_FILE", "/tmp/ucx.log")
    prepare_ucx_of_nixl()
    left = {name: value for name, value in environment().items() if name.startswith("UCX_")}
    assert left["UCX_LOG_FILE"] == "/tmp/ucx.log"
    assert left["UCX_MAX_RNDV_RAILS"] == "2"
    assert "UCX_RNDV_FRAG_MEM_TYPE" not in left
