"""The answering end of ucx links where no one-sided wire reaches: messages over UCX's tcp.

One worker and one thread serve all peers; the thread sleeps on the worker's event descriptor while
nothing moves. A peer that stands still fills its own socket and delays nobody else's. Every operation has
the deadline that its asker has: then, and when the connection breaks, every receipt that has not been filled
is taken back, so that nothing lands in the pool later. What a writer sends after that finds no receipt and
is thrown away: closing our endpoint does not stop it, UCX keeps the socket as long as the writer does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hmac
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import msgspec
import structlog

from trtllm_workers.transfer.base import OnNotify
from trtllm_workers.transfer.ucx_native import IN_PROGRESS, OK, FailureNote, Native, UcxError
from trtllm_workers.transfer.ucx_pieces import SEGMENT_BYTES, PinnedBytes
from trtllm_workers.transfer.ucx_talk import (
    CONTROL_TAG,
    MAX_CONTROL_BYTES,
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
    decode_ask,
    encode,
    segments_of_pool,
)

log = structlog.get_logger(__name__)

_ROUNDS: Final = 32  # of progress before other peers' requests get their turn
_CLOSE_S: Final = 0.2  # for requests to end in good order when the transport closes
_ANSWER_S: Final = 30.0  # for an answer to leave; it waits behind the segments before it


@dataclass(eq=False, slots=True)
class _Work:
    """Requests of one operation. ``then`` is called once all have ended well."""

    requests: list[int]
    until_s: float
    then: Callable[[], None] | None = None
    keeps: bytes = b""  # UCX may read it until the requests have ended
    receives: bool = False


@dataclass(eq=False, slots=True)
class _Asker:
    """One connection."""

    conn: int
    peer_id: str
    failure: FailureNote
    endpoint: int = 0
    works: list[_Work] = field(default_factory=list)


class NetServer:
    """Serves the pool until ``close``. Made on the event loop that ``on_notify`` is called on."""

    def __init__(
        self,
        native: Native,
        options: Mapping[str, str],
        pool: PinnedBytes,
        token: bytes,
        on_notify: OnNotify,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._native = native
        self._pool = pool
        self._token = token
        self._on_notify = on_notify
        self._loop = loop
        self._askers: dict[int, _Asker] = {}
        self._failed: deque[int] = deque()
        self._arriving: list[tuple[int | None, ctypes.Array[ctypes.c_char]]] = []
        self._strays: deque[tuple[int | None, ctypes.Array[ctypes.c_char]]] = deque()
        self._ending: list[tuple[list[int], _Asker]] = []
        self._data_tag = int.from_bytes(os.urandom(7), "big")
        feature = native.ucxx.Feature
        self._context = native.ucxx.UCXContext(dict(options), (feature.TAG, feature.WAKEUP))
        self._worker: Any = native.ucxx.UCXWorker(self._context)
        self._worker.init_blocking_progress_mode()
        self._handle = int(self._worker.handle)
        self.address = bytes(self._worker.address.tobytes())
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="ucx-messages", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving: nothing moves in or out of the pool afterwards. Safe twice."""
        if self._worker is None:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._worker = None
        self._context = None
        os.close(self._wake)

    # All of the rest happens on the thread.

    def _run(self) -> None:
        poll = select.poll()
        poll.register(int(self._worker.epoll_file_descriptor), select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._closing:
            self._turn()
            if self._worker.arm():
                poll.poll(self._rest_ms())
        for conn in list(self._askers):
            self._drop(conn, "this transport closes")
        until_s = time.monotonic() + _CLOSE_S
        while self._ending and time.monotonic() < until_s:
            self._worker.progress_worker_event(1)
            self._reap()

    def _turn(self) -> None:
        for _ in range(_ROUNDS):
            if not self._worker.progress_once():
                break
        self._take_messages()
        while self._failed:
            conn = self._failed.popleft()
            asker = self._askers.get(conn)
            if asker is not None:
                self._drop(conn, self._native.describe(asker.failure.status))
        for asker in [asker for asker in self._askers.values() if asker.works]:
            self._collect(asker)
        self._reap()

    def _rest_ms(self) -> int | None:
        """Return how long nothing needs to be done unless UCX has an event; None: for ever."""
        ends = [work.until_s for asker in self._askers.values() for work in asker.works]
        if not ends:
            return None
        return max(0, int((min(ends) - time.monotonic()) * 1000) + 1)

    def _collect(self, asker: _Asker) -> None:
        """Give ended requests back, and end the connection of those that failed or came too late."""
        now_s = time.monotonic()
        for work in list(asker.works):
            while work.requests and self._native.state(work.requests[-1]) != IN_PROGRESS:
                status = self._native.state(work.requests[-1])
                self._native.finish(work.requests.pop())
                if status != OK:
                    self._drop(asker.conn, self._native.describe(status))
                    return
            if not work.requests:
                asker.works.remove(work)
                if work.then is not None:
                    work.then()
            elif now_s >= work.until_s:
                self._drop(asker.conn, "it did not end within the time its asker gave it")
                return

    def _drop(self, conn: int, why: str) -> None:
        """End a connection: none of its bytes moves afterwards."""
        asker = self._askers.pop(conn, None)
        if asker is None:
            return
        if any(work.requests for work in asker.works):
            log.info("a KV transfer of a peer has ended early", peer=asker.peer_id, reason=why)
        requests: list[int] = []
        for work in asker.works:
            if work.receives:
                for request in work.requests:
                    self._native.cancel(self._handle, request)
            requests += work.requests
        closing = self._native.start_close(asker.endpoint)
        if closing is not None:
            requests.append(closing)
        self._ending.append((requests, asker))

    def _reap(self) -> None:
        for entry in list(self._ending):
            requests = entry[0]
            while requests and self._native.state(requests[-1]) != IN_PROGRESS:
                self._native.finish(requests.pop())
            if not requests:
                self._ending.remove(entry)

    def _take_messages(self) -> None:
        native = self._native
        for message, length in native.take_messages(self._handle, CONTROL_TAG):
            # A longer one is no message of ours: UCX cuts it off and reports an error.
            into = ctypes.create_string_buffer(min(length, MAX_CONTROL_BYTES))
            self._arriving.append((native.start_receive(self._handle, message, into), into))
        for message, length in native.take_messages(self._handle, 0, mask=0):
            into = ctypes.create_string_buffer(min(length, SEGMENT_BYTES))
            self._strays.append((native.start_receive(self._handle, message, into), into))
        while self._strays and native.state(self._strays[0][0]) != IN_PROGRESS:
            native.finish(self._strays.popleft()[0])
        # One that stays incomplete because its sender died holds up nobody else's.
        for entry in list(self._arriving):
            request, into = entry
            status = native.state(request)
            if status == IN_PROGRESS:
                continue
            self._arriving.remove(entry)
            native.finish(request)
            if status == OK:
                self._take(into.raw)

    def _take(self, said: bytes) -> None:
        try:
            ask = decode_ask(said)
        except msgspec.MsgspecError as error:
            log.warning("a message over ucx could not be read", reason=str(error))
            return
        if not hmac.compare_digest(ask.token, self._token):
            log.warning("a message over ucx without our token was dropped")
            return
        if isinstance(ask, Hello):
            self._welcome(ask)
        elif (asker := self._askers.get(ask.conn)) is not None:
            self._serve(asker, ask)

    def _welcome(self, hello: Hello) -> None:
        self._drop(hello.conn, "it began anew")
        asker = _Asker(
            hello.conn, hello.peer_id, FailureNote(partial(self._failed.append, hello.conn))
        )
        try:
            asker.endpoint = self._native.create_endpoint(
                self._handle, hello.reply_address, asker.failure
            )
        except UcxError as error:
            log.warning("ucx has no way back to a peer", peer=hello.peer_id, reason=str(error))
            return
        self._askers[hello.conn] = asker
        self._say(asker, Welcome())

    def _serve(self, asker: _Asker, ask: Ask) -> None:
        if isinstance(ask, Notify):
            with contextlib.suppress(RuntimeError):  # that loop has ended
                self._loop.call_soon_threadsafe(self._on_notify, asker.peer_id, ask.message)
            self._say(asker, Done())
            return
        assert isinstance(ask, Read | Write)
        pieces = segments_of_pool(ask, self._pool.address, self._pool.length)
        if isinstance(pieces, str):
            self._say(asker, Refused(pieces))
            return
        until_s = time.monotonic() + ask.within_s
        if isinstance(ask, Read):
            requests = self._native.start_sends(asker.endpoint, pieces, ask.data_tag)
            asker.works.append(_Work(requests, until_s))
            return
        self._data_tag += 1
        requests = self._native.start_receives(self._handle, pieces, self._data_tag)
        done = partial(self._say, asker, Done())
        asker.works.append(_Work(requests, until_s, done, receives=True))
        self._say(asker, Ready(self._data_tag))

    def _say(self, asker: _Asker, answer: Answer) -> None:
        said = encode(answer)
        request = self._native.start_send(asker.endpoint, said, CONTROL_TAG)
        if request is not None:
            asker.works.append(_Work([request], time.monotonic() + _ANSWER_S, keeps=said))
