"""UCX workers that move bytes one-sided: one that serves our pool, and one per peer whose pool we use.

The serving worker is driven by ucxx's C++ thread. It sleeps on the worker's event descriptor, needs no
GIL, and so answers peers whose gets and puts UCX emulates (shared memory) however busy this process is.

A channel's worker is driven by the one thread that starts its requests and ends them, which was
measured three times as fast as two threads that share a worker; between operations nobody drives it.
That no channel shares a worker has two more reasons. A peer that stands still fills the queues of its
worker and of no other. And a worker that is no longer driven, or destroyed, moves nothing for certain: UCX
1.21 does not end requests when an endpoint is closed by force while a queue of the peer is full.

Endpoints always have error handling on. Without it UCX would let a reader copy out of a peer's memory by
itself (process_vm_readv), but ends our whole process when that peer has died.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from trtllm_workers.transfer.base import KvPool
from trtllm_workers.transfer.ucx_card import UcxAddress
from trtllm_workers.transfer.ucx_native import (
    IN_PROGRESS,
    OK,
    MappedMemory,
    Native,
    UcxError,
)
from trtllm_workers.transfer.ucx_pieces import Pieces, PinnedBytes, block_pieces

QUEUE: Final = 512  # messages that may wait for a worker, each in a segment of shared memory
# Segments of a peer that one channel asks for at a time. Fewer than the queue holds: an owner whose reader
# died can then still send every answer, and sleep. One that cannot would spin.
WINDOW: Final = 448
_ISSUE: Final = 112  # requests between two looks at what has arrived
_QUIET_LOOKS: Final = 30  # some tens of microseconds, before sleeping until an event
_WAIT_MS: Final = 1  # for an event; bounds what a lost one costs
_CLOSE_S: Final = 0.2  # for requests to end in good order after their endpoint was closed by force
_EMULATED: Final = frozenset({"sysv", "posix", "self"})  # bytes move only while both sides drive


class Batch:
    """Requests that were started together, and the flush behind them."""

    def __init__(self, native: Native, requests: list[int], flush: int | None) -> None:
        self._native = native
        self._open = requests
        self._flush = flush
        self._flushed = False
        self.status = OK  # the first error, once there is one
        self.ended = False

    def collect(self) -> bool:
        """Give ended requests back; return whether all have ended."""
        if not self._flushed:
            if self._native.state(self._flush) == IN_PROGRESS:
                return False
            self._flushed = True
            self._end(self._flush)
        if self._open and self._native.finish_if_all_ok(self._open):
            self._open.clear()
        while self._open and self._native.state(self._open[-1]) != IN_PROGRESS:
            self._end(self._open.pop())
        self.ended = not self._open
        return self.ended

    @property
    def failure(self) -> str:
        """What went wrong, in UCX's words; empty when nothing did."""
        return self._native.describe(self.status) if self.status != OK else ""

    def _end(self, request: int | None) -> None:
        status = self._native.state(request)
        if self.status == OK:
            self.status = status
        self._native.finish(request)


class Channel:
    """A worker with one endpoint to one peer. All calls belong to one thread, one at a time."""

    def __init__(
        self, native: Native, options: Mapping[str, str], pool: PinnedBytes, peer: UcxAddress
    ) -> None:
        self._native = native
        self._peer = peer
        self._pool_base = pool.address
        self._keys: list[int] = []
        self._batches: set[Batch] = set()
        self._pool: MappedMemory | None = None
        self._hello = ctypes.create_string_buffer(len(peer.token))
        feature = native.ucxx.Feature
        self._context = native.ucxx.UCXContext(dict(options), (feature.RMA, feature.WAKEUP))
        self._worker: Any = native.ucxx.UCXWorker(self._context)
        self._parked: Any = None  # the worker, once closed with requests that did not end
        self._endpoint = 0
        try:
            self._worker.init_blocking_progress_mode()
            self._pool = native.map_memory(self._context, pool.address, pool.length)
            self._endpoint = native.create_endpoint(int(self._worker.handle), peer.worker)
            self._pool_key = self._unpack(peer.pool_key)
            self._hello_key = self._unpack(peer.hello_key)
        except native.failures:
            self.close(peer_lives=False)
            raise

    @property
    def closed(self) -> bool:
        """Return whether nothing moves here any more."""
        return self._worker is None

    def start_hello(self) -> Batch:
        """Begin to read the peer's token. Raises UcxError when closed."""
        into = ctypes.addressof(self._hello)
        pieces = Pieces([into], [self._peer.hello_address], [len(self._peer.token)])
        return self._start(self._native.start_gets, pieces, self._hello_key, None)

    def hello_matches(self) -> bool:
        """Return whether the peer that answered is the one of the card."""
        return self._hello.raw == self._peer.token

    def pieces(self, local: Sequence[int], remote: Sequence[int], block_bytes: int) -> Pieces:
        """Return what to move for these blocks."""
        return block_pieces(local, remote, block_bytes, self._pool_base, self._peer.pool_address)

    def start(self, pieces: Pieces, *, write: bool, within_s: float) -> Batch:
        """Begin to move pieces. Raises UcxError when closed. The deadline is ours alone to keep."""
        start = self._native.start_puts if write else self._native.start_gets
        return self._start(start, pieces, self._pool_key, self._pool)

    def drive(self, batch: Batch, for_s: float) -> None:
        """Make progress until a batch has ended or the time is over. Raises UcxError when closed."""
        until = time.monotonic() + for_s
        quiet = 0
        while not batch.ended and self._open_worker() and not batch.collect():
            if self._worker.progress_once():
                self._worker.progress()  # all there is, without the GIL
                quiet = 0
            elif quiet < _QUIET_LOOKS:
                quiet += 1
            else:
                self._worker.progress_worker_event(_WAIT_MS)
            if time.monotonic() >= until:
                return
        self._batches.discard(batch)

    def transports(self) -> tuple[str, ...]:
        """Return UCX's names of what carries the bytes."""
        return () if self.closed else self._native.transports(self._endpoint)

    def close(self, *, peer_lives: bool) -> bool:
        """End the connection; no byte moves afterwards. Safe twice.

        Return False when requests did not end, which nobody can drive any more, but the peer may yet
        answer into this worker's shared memory: ``destroy`` later. UCX ends the peer's whole process
        (``ucs_fatal``) when that memory is gone before.
        """
        if self._worker is None:
            return self._parked is None
        in_order = True
        emulated = peer_lives and _EMULATED.issuperset(self.transports())
        if self._endpoint:
            in_order = self._end_in_order()
        self._parked, self._worker = self._worker, None
        if in_order or not emulated:
            self.destroy()
        return self._parked is None

    def destroy(self) -> None:
        """Let everything go; safe twice."""
        if self._pool is not None:
            self._native.unmap(self._context, self._pool)
            self._pool = None
        # ucxx destroys the worker with its last reference, and UCX what is left in it.
        self._parked = None
        self._context = None

    def _end_in_order(self) -> bool:
        closing: int | None = self._native.start_close(self._endpoint)
        until = time.monotonic() + _CLOSE_S
        in_order = False
        while not in_order and time.monotonic() < until:
            self._worker.progress_worker_event(_WAIT_MS)
            self._batches = {batch for batch in self._batches if not batch.collect()}
            in_order = not self._batches and self._native.state(closing) != IN_PROGRESS
        if self._native.state(closing) != IN_PROGRESS:
            self._native.finish(closing)
        for key in self._keys:
            self._native.destroy_key(key)
        self._keys.clear()
        return in_order

    def _unpack(self, packed: bytes) -> int:
        key = self._native.unpack_key(self._endpoint, packed)
        self._keys.append(key)
        return key

    def _start(self, start: Any, pieces: Pieces, key: int, memory: MappedMemory | None) -> Batch:
        worker = self._open_worker()
        requests: list[int] = []
        for some in pieces.slices(_ISSUE):
            requests += start(self._endpoint, some, key, memory)
            worker.progress_once()  # the first ones arrive while we ask for more
        batch = Batch(self._native, requests, self._native.start_flush(self._endpoint))
        self._batches.add(batch)
        return batch

    def _open_worker(self) -> Any:
        if self._worker is None:
            raise UcxError("the connection was closed")
        return self._worker


class Server:
    """The UCX worker through which peers read and write our pool."""

    def __init__(
        self, native: Native, options: Mapping[str, str], pool: KvPool, token: bytes
    ) -> None:
        self._native = native
        feature = native.ucxx.Feature
        self._context = native.ucxx.UCXContext(dict(options), (feature.RMA, feature.WAKEUP))
        self._mapped: list[MappedMemory] = []
        self._token = ctypes.create_string_buffer(token, len(token))
        self.pinned = PinnedBytes(pool.memory)
        self._worker: Any = None
        try:
            self._worker = native.ucxx.UCXWorker(self._context)
            self.pool_memory = self._map(self.pinned.address, self.pinned.length)
            self.hello_memory = self._map(ctypes.addressof(self._token), len(token))
            self.address = bytes(self._worker.address.tobytes())
            self._worker.start_progress_thread(polling_mode=False)
        except native.failures:
            self.close()
            raise

    def _map(self, address: int, length: int) -> MappedMemory:
        memory = self._native.map_memory(self._context, address, length)
        self._mapped.append(memory)
        return memory

    def close(self) -> None:
        """Stop serving; all channels must be closed. Safe twice."""
        if self._worker is not None:
            self._worker.stop_progress_thread()
        for memory in self._mapped:
            self._native.unmap(self._context, memory)
        self._mapped.clear()
        self._worker = None
        self._context = None
        self.pinned.release()
