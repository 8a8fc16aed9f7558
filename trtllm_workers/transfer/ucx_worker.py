"""One-sided reads and writes over UCX: our registered pool, and channels to those of peers.

ucxx's C++ thread drives the worker: it sleeps on the worker's event descriptor, needs no GIL, and so
answers peers whose gets and puts UCX emulates (shared memory, tcp) however busy this process is. An
operation of ours takes its place for as long as it runs: one thread that starts requests and ends
them was measured three times as fast as two that share the worker.
Endpoints always have error handling on. Without it UCX would let a reader copy from a peer's memory
by itself (process_vm_readv), but ends our whole process when that peer has died; and only with it can an
endpoint be closed by force, which ends its requests: that is how bytes are made to stop.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from trtllm_workers.transfer.base import KvPool
from trtllm_workers.transfer.ucx_card import UcxAddress
from trtllm_workers.transfer.ucx_native import (
    IN_PROGRESS,
    OK,
    MappedMemory,
    Native,
    Pieces,
    PinnedBytes,
    UcxError,
    block_pieces,
)

WINDOW: Final = 2048  # requests of one operation that wait at the same time
_DRIVE_S: Final = 0.1  # how long one operation drives the worker before it makes room for others
_ISSUE: Final = 256  # requests between two looks at what has arrived
_QUIET_LOOKS: Final = 30  # some tens of microseconds, before sleeping until an event
_WAIT_MS: Final = 1  # for an event, while driving
_CLOSE_PERIOD_NS: Final = 1_000_000_000
_CLOSE_ATTEMPTS: Final = 3


class Batch:
    """Requests that were started together, and the flush behind them."""

    def __init__(self, native: Native, requests: list[int], flush: int | None) -> None:
        self._native = native
        self._open = requests
        self._flush = flush
        self._flushed = False
        self._lock = threading.Lock()
        self.status = OK
        self.ended = False

    def flushed(self) -> bool:
        """Return whether all that is left is to collect the requests."""
        return self._flushed or self._native.state(self._flush) != IN_PROGRESS

    def collect(self) -> bool:
        """Give ended requests back; return whether all have ended. ``status`` is the first error."""
        with self._lock:
            if not self._flushed:
                if not self.flushed():
                    return False
                self._flushed = True
                self._end(self._flush)
            if self._open and self._native.finish_if_all_ok(self._open):
                self._open.clear()
            while self._open and self._native.state(self._open[-1]) != IN_PROGRESS:
                self._end(self._open.pop())
            self.ended = not self._open
            return self.ended

    def _end(self, request: int | None) -> None:
        status = self._native.state(request)
        if self.status == OK:
            self.status = status
        self._native.finish(request)


class Channel:
    """An endpoint to one peer with the keys to its memory. Its calls are for worker threads."""

    def __init__(self, owner: DataWorker, peer: UcxAddress) -> None:
        self._owner = owner
        self._native = owner.native
        self._peer = peer
        self._keys: list[int] = []
        self._hello = ctypes.create_string_buffer(len(peer.token))
        address = self._native.ucxx.UCXAddress.create_from_buffer(peer.worker)
        with owner.lock:
            self._endpoint = owner.worker.create_endpoint_from_worker_address(address, True)
        self._handle = int(self._endpoint.handle)
        self._lock = threading.Lock()  # nothing may be started on an endpoint that is being closed
        self.closed = False
        self.users = 0  # operations that hold requests of this channel; for the event loop
        try:
            self._pool_key = self._unpack(peer.pool_key)
            self._hello_key = self._unpack(peer.hello_key)
        except UcxError:
            self.close()
            raise

    def _unpack(self, packed: bytes) -> int:
        key = self._native.unpack_key(self._handle, packed)
        self._keys.append(key)
        return key

    def start_hello(self) -> Batch:
        """Begin to read the peer's token. Raises UcxError when closed."""
        into = ctypes.addressof(self._hello)
        pieces = Pieces([into], [self._peer.hello_address], [len(self._peer.token)])
        return self._start(self._native.start_gets, pieces, self._hello_key, None)

    def hello_matches(self) -> bool:
        """Return whether the peer that answered is the one of the card."""
        return self._hello.raw[: len(self._peer.token)] == self._peer.token

    def start(self, pieces: Pieces, *, write: bool) -> Batch:
        """Begin to move pieces, and mostly end it too. Raises UcxError when closed."""
        start = self._native.start_puts if write else self._native.start_gets
        with self._owner.driving() as drive:
            batch = self._start(start, pieces, self._pool_key, self._owner.pool_memory)
            drive(batch)
        return batch

    def pieces(self, local: Any, remote: Any, block_bytes: int) -> Pieces:
        """Return what to move for these blocks."""
        base = self._owner.pool_memory.address
        return block_pieces(local, remote, block_bytes, base, self._peer.pool_address)

    def transports(self) -> tuple[str, ...]:
        """Return UCX's names of what carries the bytes."""
        return () if self.closed else self._native.transports(self._handle)

    def close(self) -> None:
        """End the endpoint by force: its requests end too, most with an error. Safe twice."""
        with self._owner.lock, self._lock:
            if self.closed:
                return
            self.closed = True
            with contextlib.suppress(*self._native.failures):
                self._endpoint.close_blocking(_CLOSE_PERIOD_NS, _CLOSE_ATTEMPTS)

    def forget(self) -> None:
        """Give the keys back, once closed and no request is left; safe twice."""
        for key in self._keys:
            self._native.destroy_key(key)
        self._keys.clear()
        self._endpoint = None

    def _start(self, start: Any, pieces: Pieces, key: int, memory: MappedMemory | None) -> Batch:
        with self._lock:
            if self.closed:
                raise UcxError("the connection was closed")
            requests: list[int] = []
            for some in pieces.windows(_ISSUE):
                requests += start(self._handle, some, key, memory)
                self._owner.worker.progress_once()  # the first ones arrive while we ask for more
            return Batch(self._native, requests, self._native.start_flush(self._handle))


class DataWorker:
    """The UCX worker that serves our pool to peers and reads and writes theirs."""

    def __init__(
        self, native: Native, options: Mapping[str, str], pool: KvPool, token: bytes
    ) -> None:
        self.native = native
        feature = native.ucxx.Feature
        self._context = native.ucxx.UCXContext(dict(options), (feature.RMA, feature.WAKEUP))
        self._mapped: list[MappedMemory] = []
        self._token = ctypes.create_string_buffer(token, len(token))
        self._pinned = PinnedBytes(pool.memory)
        self.worker: Any = None
        # ucxx hands the making and closing of endpoints to its thread, which must then be running.
        self.lock = threading.Lock()
        self.unfinished: list[tuple[Channel, Batch]] = []  # kept alive: requests that did not end
        try:
            self.worker = native.ucxx.UCXWorker(self._context)
            self.pool_memory = self._map(self._pinned.address, self._pinned.length)
            self.hello_memory = self._map(ctypes.addressof(self._token), len(token))
            self.address = bytes(self.worker.address.tobytes())
            self.worker.start_progress_thread(polling_mode=False)
        except native.failures:
            self.close()
            raise

    @contextlib.contextmanager
    def driving(self) -> Iterator[Callable[[Batch], None]]:
        """Drive the worker from this thread instead of ucxx's; peers are served meanwhile."""
        with self.lock:
            self.worker.stop_progress_thread()
            try:
                yield self._drive
            finally:
                self.worker.start_progress_thread(polling_mode=False)

    def _drive(self, batch: Batch) -> None:
        """Make progress until a batch has ended, or stopped for too long."""
        until = time.monotonic() + _DRIVE_S
        quiet = 0
        while not batch.collect() and time.monotonic() < until:
            if self.worker.progress_once():
                self.worker.progress()  # all there is, without the GIL
                quiet = 0
            elif quiet < _QUIET_LOOKS:
                quiet += 1
            else:
                self.worker.progress_worker_event(_WAIT_MS)

    def is_unfinished(self, channel: Channel) -> bool:
        """Return whether requests of a channel never ended."""
        return any(channel is kept for kept, _ in self.unfinished)

    def _map(self, address: int, length: int) -> MappedMemory:
        memory = self.native.map_memory(self._context, address, length)
        self._mapped.append(memory)
        return memory

    def close(self) -> None:
        """Stop serving; all channels must be closed. Safe twice."""
        if self.worker is not None:
            self.worker.stop_progress_thread()
        self.unfinished.clear()
        for memory in self._mapped:
            self.native.unmap(self._context, memory)
        self._mapped.clear()
        self.worker = None
        self._context = None
        self._pinned.release()
