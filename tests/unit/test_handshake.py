"""The handshake, by bytes alone: who gets in, who does not, and what both are told."""

from __future__ import annotations

import contextlib
import hmac
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_workers.errors import (
    AuthenticationFailed,
    FrameError,
    PeerLost,
    PlaneError,
    StaleIncarnation,
)
from trtllm_workers.planes import handshake as subject
from trtllm_workers.planes.frames import PROTOCOL_VERSION, encode, pack
from trtllm_workers.planes.handshake import Handshake, Hello, Proof, Refusal, refusal
from trtllm_workers.planes.messages import Ping
from trtllm_workers.types import Address

NEWER = f"protocol version {PROTOCOL_VERSION + 1}, this process version {PROTOCOL_VERSION}"

INGRESS = Address("10.0.0.1", 7001, "ingress-0", "18e9aa")
WORKER = Address("10.0.0.2", 7002, "worker-0", "18e9bb")
SECRET = b"of this cluster"


def connector(secret: bytes = SECRET, dialed: Address = WORKER, **youngest: str) -> Handshake:
    return Handshake(INGRESS, secret, dialed, {k.replace("_", "-"): v for k, v in youngest.items()})


def acceptor(secret: bytes = SECRET, me: Address = WORKER, **youngest: str) -> Handshake:
    return Handshake(me, secret, None, {k.replace("_", "-"): v for k, v in youngest.items()})


def shake(left: Handshake, right: Handshake) -> list[bytes]:
    """Pass the bytes to and fro until nobody says anything; return what was said."""
    said = [left.opening()]
    sides = [right, left]
    while said[-1]:
        said.append(sides[0].feed(said[-1]))
        sides.reverse()
    return said[:-1]


def test_both_sides_learn_who_the_other_is() -> None:
    left, right = connector(), acceptor()
    assert len(shake(left, right)) == 4
    assert left.peer == WORKER
    assert right.peer == INGRESS


def test_handshake_survives_any_cut_of_the_bytes() -> None:
    left, right = connector(), acceptor()
    said, sides = left.opening(), [right, left]
    while said:
        said = b"".join(sides[0].feed(bytes([byte])) for byte in said)
        sides.reverse()
    assert (left.peer, right.peer) == (WORKER, INGRESS)


def test_message_behind_the_handshake_is_handed_on() -> None:
    left, right = connector(), acceptor()
    last = right.feed(left.feed(right.feed(left.opening())))
    left.feed(last + encode(Ping(7)))
    assert left.peer == WORKER
    assert left.rest == encode(Ping(7))


def test_connector_with_another_secret_is_refused_and_told() -> None:
    left, right = connector(b"of another cluster"), acceptor()
    proof = left.feed(right.feed(left.opening()))
    with pytest.raises(
        AuthenticationFailed, match="do not hold the same cluster secret"
    ) as refused:
        right.feed(proof)
    assert right.peer is None
    with pytest.raises(AuthenticationFailed, match=r"worker-0@10\.0\.0\.2:7002 refused"):
        left.feed(refusal(refused.value))
    assert left.refused


def test_acceptor_that_does_not_hold_the_secret_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left, impostor = connector(), acceptor(b"of another cluster")
    proof = left.feed(impostor.feed(left.opening()))
    with monkeypatch.context() as patch:  # an impostor lets everybody in
        patch.setattr(hmac, "compare_digest", lambda _mine, _theirs: True)
        answer = impostor.feed(proof)
    with pytest.raises(AuthenticationFailed, match="do not hold the same cluster secret"):
        left.feed(answer)
    assert left.peer is None


def test_recorded_connector_does_not_get_in_again() -> None:
    left, right = connector(), acceptor()
    hello, _, proof, _ = shake(left, right)
    again = acceptor()
    again.feed(hello)
    with pytest.raises(AuthenticationFailed):
        again.feed(proof)


def test_recorded_acceptor_is_not_believed_again() -> None:
    _, hello, _, proof = shake(connector(), acceptor())
    again = connector()
    again.opening()
    again.feed(hello)
    with pytest.raises(AuthenticationFailed):
        again.feed(proof)


def test_connector_whose_own_words_come_back_hangs_up() -> None:
    left = connector()
    with pytest.raises(AuthenticationFailed, match="our own greeting"):
        left.feed(left.opening())


def test_reflected_proof_is_no_proof() -> None:
    left, right = connector(), acceptor()
    proof = left.feed(right.feed(left.opening()))
    with pytest.raises(AuthenticationFailed):
        left.feed(proof)


def test_proof_made_for_one_acceptor_does_not_open_another() -> None:
    # A process in the middle passes the connector's proof to a worker that it did not dial.
    other = Address("10.0.0.3", 7003, "worker-1", "18e9cc")
    left, right, target = connector(), acceptor(), acceptor(me=other)
    hello = left.opening()
    target.feed(hello)
    proof = left.feed(right.feed(hello))
    with pytest.raises(AuthenticationFailed):
        target.feed(proof)


@given(st.integers(0), st.integers(0, 255))
def test_changed_bytes_of_either_greeting_never_open_the_connection(where: int, value: int) -> None:
    left, right = connector(), acceptor()
    hello = bytearray(left.opening())
    position = where % len(hello)
    if hello[position] == value:
        return
    hello[position] = value
    answer = b""
    with pytest.raises(PlaneError):  # noqa: PT012 - either side may be the one that notices
        answer = right.feed(bytes(hello))
        if not answer:  # the changed length waits for more
            raise PeerLost("nothing more comes")
        right.feed(left.feed(answer))
    assert right.peer is None


def test_connector_that_wanted_an_earlier_life_is_told_both_incarnations() -> None:
    old = Address(WORKER.host, WORKER.port, WORKER.peer_id, "18e900")
    left, right = connector(dialed=old), acceptor()
    proof = left.feed(right.feed(left.opening()))
    with pytest.raises(StaleIncarnation, match=r"18e900.*18e9bb") as refused:
        right.feed(proof)
    with pytest.raises(StaleIncarnation, match=r"18e900.*18e9bb"):
        left.feed(refusal(refused.value))


def test_connector_older_than_one_met_before_is_refused() -> None:
    left, right = connector(), acceptor(ingress_0="18e9ff")
    proof = left.feed(right.feed(left.opening()))
    with pytest.raises(StaleIncarnation, match=r"18e9aa.*18e9ff"):
        right.feed(proof)


def test_acceptor_older_than_one_met_before_is_refused() -> None:
    left, right = connector(worker_0="18e9ff"), acceptor()
    last = right.feed(left.feed(right.feed(left.opening())))
    with pytest.raises(StaleIncarnation, match=r"18e9bb.*18e9ff"):
        left.feed(last)


def test_other_protocol_version_is_told_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = struct.pack("<IB", 3, PROTOCOL_VERSION + 1) + b"??"
    with pytest.raises(FrameError, match=NEWER):
        acceptor().feed(newer)
    left = connector()
    left.opening()
    with pytest.raises(FrameError, match=NEWER):
        left.feed(newer)


def test_proof_of_another_protocol_version_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = connector(), acceptor()
    greeting = right.feed(left.opening())
    with monkeypatch.context() as patch:
        patch.setattr(subject, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
        proof = left.feed(greeting)
    with pytest.raises(AuthenticationFailed):
        right.feed(proof)


HELLO = Hello(True, INGRESS, b"n" * 32, ("worker-0", "18e9bb"))
BAD = {
    "a message": (encode(Ping(1)), "no handshake"),
    "a proof first": (pack(msgspec.msgpack.encode(Proof(b""))), "out of turn"),
    "two greetings": (pack(msgspec.msgpack.encode(HELLO)) * 2, "out of turn"),
    "a short nonce": (pack(msgspec.msgpack.encode(Hello(True, INGRESS, b"n"))), "1 bytes, not 32"),
    "a large frame": (struct.pack("<IB", 100_000_000, 1), "announces 100000000 bytes"),
    "a web browser": (b"GET / HTTP/1.1\r\n\r\n", "another protocol"),
    "noise": (pack(b"\xc1\xc1"), "no handshake"),
    "a cut greeting": (pack(msgspec.msgpack.encode(HELLO)[:-1]), "truncated"),
}


@pytest.mark.parametrize(("said", "words"), BAD.values(), ids=BAD)
def test_what_is_no_handshake_is_refused(said: bytes, words: str) -> None:
    with pytest.raises(FrameError, match=words):
        acceptor().feed(said)


@given(st.binary(max_size=200))
def test_foreign_bytes_never_open_a_connection(noise: bytes) -> None:
    side = acceptor()
    with contextlib.suppress(PlaneError):
        side.feed(noise)
    assert side.peer is None


def test_unfinished_greeting_is_waited_for() -> None:
    right = acceptor()
    assert right.feed(connector().opening()[:-1]) == b""
    assert right.peer is None


def test_refusal_of_a_stranger_cannot_forge_log_lines() -> None:
    left = connector()
    forged = Refusal("anything", "no\n2026-01-01 all is well\x1b[2J" + "x" * 9999)
    with pytest.raises(FrameError, match="announces"):
        left.feed(pack(msgspec.msgpack.encode(forged)))
    short = Refusal("anything", "no\n2026-01-01 all is well\x1b[2J")
    with pytest.raises(PeerLost) as refused:
        connector().feed(pack(msgspec.msgpack.encode(short)))
    assert str(refused.value).isprintable()
