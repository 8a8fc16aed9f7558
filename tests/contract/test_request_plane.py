"""The request plane's contract (planes/base.py), line by line, on every implementation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.contract.planes import ENCRYPTED_NET, NETS, Endpoint, Net, TcpNet, soon
from trtllm_workers.errors import AuthenticationFailed, FrameError, PeerLost, StaleIncarnation
from trtllm_workers.planes.base import Peer
from trtllm_workers.planes.frames import MAX_FRAME_BYTES
from trtllm_workers.planes.messages import Drain, Ping, Submit
from trtllm_workers.types import Address, GenerateRequest, SamplingParams


@pytest.fixture(params=[*NETS, ENCRYPTED_NET])
async def net(request: pytest.FixtureRequest) -> AsyncIterator[Net]:
    made: Net
    if request.param == ENCRYPTED_NET:
        made = TcpNet(request.getfixturevalue("plane_files"))
    else:
        made = NETS[request.param]()
    yield made
    await made.close()


async def two(net: Net) -> tuple[Endpoint, Endpoint, Peer]:
    """Return an ingress, a worker, and the ingress's connection to the worker."""
    ingress, worker = await net.endpoint("ingress-0"), await net.endpoint("worker-0")
    return ingress, worker, await soon(ingress.plane.connect(worker.address))


# Peer


async def test_send_keeps_the_order_of_ten_thousand_messages(net: Net) -> None:
    _, worker, peer = await two(net)
    for number in range(10_000):
        peer.send(Drain(str(number)))
    await worker.until(lambda: len(worker.received) == 10_000)
    assert worker.words() == [str(number) for number in range(10_000)]


async def test_send_keeps_the_order_over_many_loop_iterations(net: Net) -> None:
    _, worker, peer = await two(net)
    for number in range(300):
        peer.send(Drain(str(number)))
        if number % 3 == 0:
            await asyncio.sleep(0)
    await worker.until(lambda: len(worker.received) == 300)
    assert worker.words() == [str(number) for number in range(300)]


async def test_every_field_of_a_message_arrives(net: Net) -> None:
    ingress, worker, peer = await two(net)
    request = GenerateRequest(
        request_id="r1",
        prompt_token_ids=list(range(100_000)),
        sampling=SamplingParams(max_tokens=7, seed=2**63, stop_token_ids=(1, 2)),
        cache_salt="ü\0",
    )
    peer.send(Submit(1, request, ingress.address))
    await worker.until(lambda: worker.received)
    assert worker.received[0][1] == Submit(1, request, ingress.address)


async def test_send_on_a_lost_connection_raises_peer_lost(net: Net) -> None:
    ingress, worker, peer = await two(net)
    net.cut(worker)
    await ingress.until(lambda: ingress.lost)
    with pytest.raises(PeerLost, match="worker-0"):
        peer.send(Drain("too late"))


async def test_message_over_the_limit_of_a_frame_is_refused_and_the_connection_lives(
    net: Net,
) -> None:
    _, worker, peer = await two(net)
    with pytest.raises(FrameError, match="over the limit"):
        peer.send(Drain("x" * MAX_FRAME_BYTES))
    peer.send(Drain("short"))
    await worker.until(lambda: worker.received)
    assert worker.words() == ["short"]


async def test_write_paused_is_true_while_the_peer_does_not_read(net: Net) -> None:
    _, worker, peer = await two(net)
    assert not peer.write_paused
    net.stop_reading(worker)
    for _ in range(40):
        peer.send(Drain("x" * 1_000_000))
        await asyncio.sleep(0)
        if peer.write_paused:
            break
    assert peer.write_paused


# RequestPlane


async def test_port_zero_becomes_a_real_port(net: Net) -> None:
    endpoint = await net.endpoint("worker-0", incarnation="abc")
    assert endpoint.address.port > 0
    assert (endpoint.address.peer_id, endpoint.address.incarnation) == ("worker-0", "abc")


async def test_both_ends_of_a_connection_know_each_others_address(net: Net) -> None:
    ingress, worker, peer = await two(net)
    assert peer.address == worker.address
    peer.send(Drain("hello"))
    await worker.until(lambda: worker.received)
    back = worker.received[0][0]
    assert back.address == ingress.address
    back.send(Drain("hello yourself"))
    await ingress.until(lambda: ingress.received)
    assert ingress.words() == ["hello yourself"]


async def test_connect_where_nobody_is_raises_peer_lost_with_the_address(net: Net) -> None:
    ingress, worker, _ = await two(net)
    address = worker.address
    await soon(worker.plane.close())
    gone = Address(address.host, address.port, "worker-9", "1")
    with pytest.raises(PeerLost, match=f"worker-9@{gone.host}:{gone.port}"):
        await soon(ingress.plane.connect(gone))


async def test_connect_with_another_secret_raises_authentication_failed(net: Net) -> None:
    worker = await net.endpoint("worker-0")
    stranger = await net.endpoint("stranger", secret=b"of another cluster")
    with pytest.raises(AuthenticationFailed, match="worker-0"):
        await soon(stranger.plane.connect(worker.address))
    with pytest.raises(AuthenticationFailed, match="stranger"):
        await soon(worker.plane.connect(stranger.address))
    assert worker.received == stranger.received == []
    assert worker.lost == stranger.lost == []
    assert worker.plane.peer(stranger.address) is None


async def test_connect_to_another_life_raises_stale_incarnation_with_both(net: Net) -> None:
    ingress = await net.endpoint("ingress-0")
    worker = await net.endpoint("worker-0", incarnation="18e9bb")
    here = worker.address
    earlier = Address(here.host, here.port, here.peer_id, "18e9aa")
    with pytest.raises(StaleIncarnation, match="18e9aa.*18e9bb"):  # noqa: RUF043 - a pattern
        await soon(ingress.plane.connect(earlier))
    assert ingress.plane.peer(earlier) is None
    assert (await soon(ingress.plane.connect(here))).address == here


async def test_connect_to_a_port_that_another_worker_took_raises_stale_incarnation(
    net: Net,
) -> None:
    ingress, worker = await net.endpoint("ingress-0"), await net.endpoint("worker-0")
    other = Address(worker.address.host, worker.address.port, "worker-1", "1")
    with pytest.raises(StaleIncarnation, match="worker-1"):
        await soon(ingress.plane.connect(other))


async def test_live_connection_is_reused(net: Net) -> None:
    ingress, worker, peer = await two(net)
    assert await soon(ingress.plane.connect(worker.address)) is peer


async def test_live_connection_is_reused_by_the_end_that_did_not_open_it(net: Net) -> None:
    ingress, worker, peer = await two(net)
    peer.send(Drain("hello"))
    await worker.until(lambda: worker.received)
    assert await soon(worker.plane.connect(ingress.address)) is worker.received[0][0]


async def test_concurrent_connects_share_one_connection(net: Net) -> None:
    ingress, worker = await net.endpoint("ingress-0"), await net.endpoint("worker-0")
    connects = (ingress.plane.connect(worker.address) for _ in range(5))
    peers = await soon(asyncio.gather(*connects))
    assert len({id(peer) for peer in peers}) == 1
    await soon(ingress.plane.close())
    await worker.until(lambda: worker.lost)
    assert len(worker.lost) == 1


async def test_connect_that_is_cancelled_does_not_disturb_another_one(net: Net) -> None:
    ingress, worker = await net.endpoint("ingress-0"), await net.endpoint("worker-0")
    first = asyncio.create_task(ingress.plane.connect(worker.address))
    second = asyncio.create_task(ingress.plane.connect(worker.address))
    await asyncio.sleep(0)
    first.cancel()
    peer = await soon(second)
    peer.send(Drain("still here"))
    await worker.until(lambda: worker.received)


async def test_both_ends_may_dial_at_the_same_time(net: Net) -> None:
    left, right = await net.endpoint("left"), await net.endpoint("right")
    to_right, to_left = await soon(
        asyncio.gather(left.plane.connect(right.address), right.plane.connect(left.address))
    )
    for number in range(100):
        to_right.send(Drain(str(number)))
        to_left.send(Drain(str(number)))
    await right.until(lambda: len(right.received) == 100)
    await left.until(lambda: len(left.received) == 100)
    assert left.words() == right.words() == [str(number) for number in range(100)]
    assert left.plane.peer(right.address) is not None
    assert left.lost == right.lost == []


async def test_peer_returns_the_live_connection_or_none(net: Net) -> None:
    ingress, worker = await net.endpoint("ingress-0"), await net.endpoint("worker-0")
    assert ingress.plane.peer(worker.address) is None
    peer = await soon(ingress.plane.connect(worker.address))
    assert ingress.plane.peer(worker.address) is peer
    net.cut(worker)
    await ingress.until(lambda: ingress.lost)
    assert ingress.plane.peer(worker.address) is None


async def test_peers_are_all_live_connections_one_for_each_process(net: Net) -> None:
    worker = await net.endpoint("worker-0")
    ingresses = [await net.endpoint(f"ingress-{index}") for index in range(3)]
    for ingress in ingresses:
        (await soon(ingress.plane.connect(worker.address))).send(Drain("hello"))
    await worker.until(lambda: len(worker.received) == 3)
    found = sorted(peer.address.peer_id for peer in worker.plane.peers())
    assert found == ["ingress-0", "ingress-1", "ingress-2"]
    net.cut(ingresses[1])
    await worker.until(lambda: worker.lost)
    found = sorted(peer.address.peer_id for peer in worker.plane.peers())
    assert found == ["ingress-0", "ingress-2"]


async def test_lost_peer_can_be_connected_again(net: Net) -> None:
    ingress, worker, _ = await two(net)
    net.cut(worker)
    await ingress.until(lambda: ingress.lost)
    again = await soon(ingress.plane.connect(worker.address))
    again.send(Drain("back"))
    await worker.until(lambda: worker.received)
    assert worker.words() == ["back"]


async def test_exception_in_on_message_closes_that_connection_only(net: Net) -> None:
    worker = await net.endpoint("worker-0")
    good, bad = await net.endpoint("good"), await net.endpoint("bad")
    to_worker = await soon(good.plane.connect(worker.address))
    bad_to_worker = await soon(bad.plane.connect(worker.address))

    def choke(_peer: Peer, drain: Drain) -> None:
        if drain.reason == "poison":
            raise ValueError("cannot swallow this")

    worker.on_drain = choke
    bad_to_worker.send(Drain("poison"))
    await bad.until(lambda: bad.lost)
    await worker.until(lambda: worker.lost)
    assert [peer.address for peer, _ in worker.lost] == [bad.address]
    to_worker.send(Drain("food"))
    await worker.until(lambda: "food" in worker.words())
    assert good.lost == []


async def test_messages_behind_one_that_raised_are_not_delivered(net: Net) -> None:
    _, worker, peer = await two(net)

    def choke(_peer: Peer, _drain: Drain) -> None:
        raise ValueError("cannot swallow this")

    worker.on_drain = choke
    peer.send(Drain("first"))
    peer.send(Drain("second"))
    await worker.until(lambda: worker.lost)
    assert worker.words() == ["first"]


async def test_pings_are_answered_and_not_shown(net: Net) -> None:
    ingress, worker, peer = await two(net)
    peer.send(Ping(1))
    peer.send(Drain("behind it"))
    await worker.until(lambda: worker.received)
    assert worker.words() == ["behind it"]
    assert len(worker.received) == 1
    worker.received[0][0].send(Drain("behind the pong"))
    await ingress.until(lambda: ingress.received)
    assert len(ingress.received) == 1


@pytest.mark.parametrize("end", ["ours", "theirs"])
async def test_on_lost_is_called_once_at_both_ends_when_either_closes(net: Net, end: str) -> None:
    ingress, worker, peer = await two(net)
    peer.send(Drain("hello"))
    await worker.until(lambda: worker.received)
    await soon((ingress if end == "ours" else worker).plane.close())
    await ingress.until(lambda: ingress.lost)
    await worker.until(lambda: worker.lost)
    await soon(ingress.plane.close())
    await soon(worker.plane.close())
    assert [(lost is peer) for lost, _ in ingress.lost] == [True]
    assert [(lost is worker.received[0][0]) for lost, _ in worker.lost] == [True]


async def test_on_lost_is_called_once_at_both_ends_when_the_connection_breaks(net: Net) -> None:
    ingress, worker, peer = await two(net)
    peer.send(Drain("hello"))
    await worker.until(lambda: worker.received)
    net.cut(worker)
    await ingress.until(lambda: ingress.lost)
    await worker.until(lambda: worker.lost)
    await soon(ingress.plane.close())
    assert (len(ingress.lost), len(worker.lost)) == (1, 1)
    assert "worker-0" in str(ingress.lost[0][1])


async def test_restarted_peer_is_reached_under_its_new_incarnation(net: Net) -> None:
    ingress, worker, _ = await two(net)
    port = worker.address.port
    await soon(worker.plane.close())
    await ingress.until(lambda: ingress.lost)
    reborn = await net.endpoint("worker-0", incarnation="2", port=port)
    peer = await soon(ingress.plane.connect(reborn.address))
    peer.send(Drain("welcome back"))
    await reborn.until(lambda: reborn.received)


async def test_close_is_safe_twice_and_leaves_no_task(net: Net) -> None:
    before = asyncio.all_tasks()
    ingress, worker, _ = await two(net)
    for _ in range(2):
        await soon(ingress.plane.close())
        await soon(worker.plane.close())
    assert asyncio.all_tasks() == before


async def test_what_was_sent_before_close_arrives(net: Net) -> None:
    ingress, worker, peer = await two(net)
    for number in range(100):
        peer.send(Drain(str(number)))
    await soon(ingress.plane.close())
    await worker.until(lambda: worker.lost)
    assert len(worker.received) == 100


async def test_connect_after_close_raises_peer_lost(net: Net) -> None:
    ingress, worker = await net.endpoint("ingress-0"), await net.endpoint("worker-0")
    await soon(ingress.plane.close())
    with pytest.raises(PeerLost):
        await soon(ingress.plane.connect(worker.address))
