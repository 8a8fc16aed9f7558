"""The asking end of a ucx link where no one-sided wire reaches: messages over UCX's tcp.

The worker belongs to one link and is driven by that link's thread only, while an operation runs. A worker
that is destroyed moves nothing: so the bytes of an operation that failed have stopped.
"""

from __future__ import annotations

import ctypes
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from trtllm_workers.transfer.ucx_card import UcxAddress
from trtllm_workers.transfer.ucx_native import IN_PROGRESS, OK, FailureNote, Native, UcxError
from trtllm_workers.transfer.ucx_pieces import Pieces, PinnedBytes, block_pieces
from trtllm_workers.transfer.ucx_talk import (
    CONTROL_TAG,
    MAX_CONTROL_BYTES,
    MAX_MESSAGE_BYTES,
    Answer,
    Ask,
    Done,
    Hello,
    Notify,
    Read,
    Ready,
    Refused,
    Welcome,
    Write,
    decode_answer,
    encode,
)

_QUIET_LOOKS: Final = 30  # some tens of microseconds, before sleeping until an event
_WAIT_MS: Final = 1  # for an event; bounds what a lost one costs
_CLOSE_S: Final = 0.2  # for requests to end in good order after their endpoint was closed by force


class NetBatch:
    """One operation: ended once its last answer is here and none of its requests is under way."""

    def __init__(self, waits_for: type[Answer], to_write: Pieces | None = None) -> None:
        self.waits_for: type[Answer] | None = waits_for
        self.to_write = to_write  # once the owner is ready
        self.requests: list[int] = []
        self.failure = ""
        self.ended = False

    def fail(self, why: str) -> None:
        """End it; the first reason counts."""
        self.failure = self.failure or why
        self.ended = True


class NetChannel:
    """A worker with one endpoint to one peer. All calls belong to one thread, one at a time."""

    def __init__(
        self,
        native: Native,
        options: Mapping[str, str],
        pool: PinnedBytes,
        peer: UcxAddress,
        our_id: str,
    ) -> None:
        self._native = native
        self._peer = peer
        self._our_id = our_id
        self._pool_base = pool.address
        self._conn = secrets.randbits(63)
        self._data_tag = secrets.randbits(62)  # counts on: no two operations share one
        self._batch: NetBatch | None = None
        self._welcome = False
        self._said: list[tuple[int, bytes]] = []  # UCX may read until the request has ended
        self._heard: list[tuple[int | None, ctypes.Array[ctypes.c_char]]] = []
        self._failure = FailureNote()
        self._endpoint = 0
        feature = native.ucxx.Feature
        self._context = native.ucxx.UCXContext(dict(options), (feature.TAG, feature.WAKEUP))
        self._worker: Any = native.ucxx.UCXWorker(self._context)
        try:
            self._worker.init_blocking_progress_mode()
            self._handle = int(self._worker.handle)
            self._endpoint = native.create_endpoint(self._handle, peer.net_worker, self._failure)
        except native.failures:
            self.close(peer_lives=False)
            raise

    @property
    def closed(self) -> bool:
        """Return whether nothing moves here any more."""
        return self._worker is None

    def broken(self) -> bool:
        """Return whether the connection has ended while nobody used it."""
        if self._worker is not None:
            self._worker.progress()
        return self._worker is None or self._failure.status != OK

    def start_hello(self) -> NetBatch:
        """Begin to ask whether the peer is the one of the card. Raises UcxError when closed."""
        address = bytes(self._open_worker().address.tobytes())
        return self._ask(
            Hello(self._peer.token, self._conn, self._our_id, address), NetBatch(Welcome)
        )

    def hello_matches(self) -> bool:
        """Return whether the peer that answered is the one of the card."""
        return self._welcome

    def pieces(self, local: Sequence[int], remote: Sequence[int], block_bytes: int) -> Pieces:
        """Return what to move for these blocks; ``remote`` counts from the beginning of a pool."""
        return block_pieces(local, remote, block_bytes, self._pool_base, 0)

    def start(self, pieces: Pieces, *, write: bool, within_s: float) -> NetBatch:
        """Begin to move pieces. Raises UcxError when closed."""
        self._open_worker()
        token, conn = self._peer.token, self._conn
        if write:
            ask: Ask = Write(token, conn, pieces.remote, pieces.lengths, within_s)
            return self._ask(ask, NetBatch(Ready, to_write=pieces.segments()))
        self._data_tag += 1
        ask = Read(token, conn, self._data_tag, pieces.remote, pieces.lengths, within_s)
        batch = NetBatch(Done)
        batch.waits_for = None  # the bytes are the answer
        # Before the owner can send: what finds no receipt would be copied once more.
        batch.requests = self._native.start_receives(
            self._handle, pieces.segments(), self._data_tag
        )
        return self._ask(ask, batch)

    def start_notify(self, message: bytes) -> NetBatch:
        """Begin to send a notification. Raises UcxError when closed, and when it is too long."""
        if len(message) > MAX_MESSAGE_BYTES:
            raise UcxError(f"a message of {len(message)} bytes is over {MAX_MESSAGE_BYTES}")
        return self._ask(Notify(self._peer.token, self._conn, message), NetBatch(Done))

    def drive(self, batch: NetBatch, for_s: float) -> None:
        """Make progress until a batch has ended or the time is over. Raises UcxError when closed."""
        until = time.monotonic() + for_s
        quiet = 0
        while not batch.ended and not self._collect(batch):
            worker = self._open_worker()
            if worker.progress_once():
                worker.progress()  # all there is, without the GIL
                quiet = 0
            elif quiet < _QUIET_LOOKS:
                quiet += 1
            else:
                worker.progress_worker_event(_WAIT_MS)
            if time.monotonic() >= until:
                return

    def transports(self) -> tuple[str, ...]:
        """Return UCX's names of what carries the bytes."""
        return () if self.closed else self._native.transports(self._endpoint)

    def close(self, *, peer_lives: bool) -> bool:
        """End the connection; no byte moves afterwards. Safe twice. Returns True: nothing is left."""
        worker, self._worker = self._worker, None
        if worker is None:
            return True
        requests: list[int] = []
        if self._batch is not None:
            requests = self._batch.requests
            if self._batch.to_write is None:
                for request in requests:
                    self._native.cancel(self._handle, request)
        if self._endpoint:
            requests = [*requests, *(request for request, _ in self._said)]
            closing = self._native.start_close(self._endpoint)
            requests += [closing] if closing is not None else []
            until = time.monotonic() + _CLOSE_S
            while requests and time.monotonic() < until:
                while requests and self._native.state(requests[-1]) != IN_PROGRESS:
                    self._native.finish(requests.pop())
                if requests:
                    worker.progress_worker_event(_WAIT_MS)
        # ucxx destroys the worker with its last reference, and UCX what is left in it.
        del worker
        self._context = None
        return True

    def _ask(self, ask: Ask, batch: NetBatch) -> NetBatch:
        self._open_worker()
        said = encode(ask)
        request = self._native.start_send(self._endpoint, said, CONTROL_TAG)
        if request is not None:
            self._said.append((request, said))
        self._batch = batch
        return batch

    def _collect(self, batch: NetBatch) -> bool:
        """Take what has arrived; return whether the batch has ended."""
        if self._failure.status != OK:
            batch.fail(self._native.describe(self._failure.status))
        self._hear(batch)
        while batch.requests and self._native.state(batch.requests[-1]) != IN_PROGRESS:
            self._end(batch, batch.requests.pop())
        while self._said and self._native.state(self._said[0][0]) != IN_PROGRESS:
            self._end(batch, self._said.pop(0)[0])
        if batch.waits_for is None and not batch.requests:
            batch.ended = True
        return batch.ended

    def _end(self, batch: NetBatch, request: int | None) -> None:
        status = self._native.state(request)
        if status != OK:
            batch.fail(self._native.describe(status))
        self._native.finish(request)

    def _hear(self, batch: NetBatch) -> None:
        for message, length in self._native.take_messages(self._handle, CONTROL_TAG):
            into = ctypes.create_string_buffer(min(length, MAX_CONTROL_BYTES))
            request = self._native.start_receive(self._handle, message, into)
            self._heard.append((request, into))
        while self._heard and self._native.state(self._heard[0][0]) != IN_PROGRESS:
            request, into = self._heard.pop(0)
            self._end(batch, request)
            if not batch.ended:
                self._take(batch, into.raw)

    def _take(self, batch: NetBatch, said: bytes) -> None:
        try:
            answer = decode_answer(said)
        except msgspec.MsgspecError as error:
            batch.fail(f"its answer cannot be read ({error}); do both run the same version?")
            return
        if isinstance(answer, Refused):
            batch.fail(answer.reason)
        elif batch.waits_for is None or not isinstance(answer, batch.waits_for):
            batch.fail(f"it answered {type(answer).__name__} out of turn")
        elif isinstance(answer, Ready) and batch.to_write is not None:
            batch.requests += self._native.start_sends(
                self._endpoint, batch.to_write, answer.data_tag
            )
            batch.waits_for = Done
        else:
            self._welcome = self._welcome or isinstance(answer, Welcome)
            batch.waits_for = None

    def _open_worker(self) -> Any:
        if self._worker is None:
            raise UcxError("the connection was closed")
        return self._worker
