"""Messages to peers over UCX, on a worker of its own that the event loop drives. Knows no pool.

The worker's event descriptor is watched by the loop, so an idle notifier costs nothing and every
message is delivered on the loop. A message is believed only with this worker's token, which peers have
from its card.
"""

from __future__ import annotations

import asyncio
import ctypes
import hmac
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import structlog

from trtllm_workers.transfer.base import OnNotify
from trtllm_workers.transfer.ucx_native import IN_PROGRESS, OK, Native, UcxError

log = structlog.get_logger(__name__)

MAX_MESSAGE_BYTES: Final = 1 << 20
_TAG: Final = 0x74726B76  # any number: the worker receives nothing else
_ROUNDS: Final = 16  # of progress before other work of the loop gets its turn
_AGAIN_S: Final = 0.001


class _Notice(msgspec.Struct, frozen=True, array_like=True):
    token: bytes
    peer_id: str
    message: bytes


class Notifier:
    """Sends messages to notifiers of peers, and gives those that arrive to ``on_notify``."""

    def __init__(
        self,
        native: Native,
        options: Mapping[str, str],
        *,
        peer_id: str,
        token: bytes,
        on_notify: OnNotify,
    ) -> None:
        self._native = native
        self._peer_id = peer_id
        self._token = token
        self._on_notify = on_notify
        self._loop = asyncio.get_running_loop()
        self._arriving: deque[tuple[int | None, ctypes.Array[ctypes.c_char]]] = deque()
        self._again: asyncio.TimerHandle | None = None
        self._ending: list[tuple[list[int | None], bytes]] = []
        feature = native.ucxx.Feature
        self._context = native.ucxx.UCXContext(dict(options), (feature.TAG, feature.WAKEUP))
        self._worker: Any = native.ucxx.UCXWorker(self._context)
        self.address = bytes(self._worker.address.tobytes())
        self._worker.init_blocking_progress_mode()
        self._descriptor = int(self._worker.epoll_file_descriptor)
        self._loop.add_reader(self._descriptor, self._progress)
        self._progress()

    def connect(self, address: bytes) -> int:
        """Return an endpoint to a peer's notifier. Raises UcxError."""
        return self._native.create_endpoint(int(self._worker.handle), address)

    async def send(self, endpoint: int, token: bytes, message: bytes) -> None:
        """Send one message; cancel to stop waiting. Raises UcxError."""
        if len(message) > MAX_MESSAGE_BYTES:
            raise UcxError(f"a message of {len(message)} bytes is over {MAX_MESSAGE_BYTES}")
        notice = msgspec.msgpack.encode(_Notice(token, self._peer_id, message))
        requests = [self._native.start_send(endpoint, notice, _TAG)]
        requests.append(self._native.start_flush(endpoint))
        try:
            while not self._settled(requests):
                self._progress()
                if not self._settled(requests):
                    await asyncio.sleep(_AGAIN_S)
        except BaseException:
            # UCX may read the message until its request has ended.
            self._ending.append((requests, notice))
            raise
        states = [self._native.state(request) for request in requests]
        for request in requests:
            self._native.finish(request)
        for state in states:
            self._native.check(state, "sending a message")

    def disconnect(self, endpoint: int) -> None:
        """Begin to close an endpoint by force, once; its requests end soon."""
        self._ending.append(([self._native.start_close(endpoint)], b""))
        self._progress()

    def close(self) -> None:
        """Stop receiving; nothing may be being sent any more. Safe twice."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if self._worker is not None:
            self._loop.remove_reader(self._descriptor)
            self._worker = None
            self._context = None
            self._arriving.clear()
            self._ending.clear()

    def _settled(self, requests: list[int | None]) -> bool:
        return all(self._native.state(request) != IN_PROGRESS for request in requests)

    def _reap(self) -> None:
        for ended in [entry for entry in self._ending if self._settled(entry[0])]:
            self._ending.remove(ended)
            for request in ended[0]:
                self._native.finish(request)

    def _progress(self) -> None:
        """Move what can be moved, and make the descriptor tell when there is more."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        for _ in range(_ROUNDS):
            if self._worker is None:  # closed by a receiver of a message
                return
            self._worker.progress()
            self._receive()
            self._reap()
            if self._worker is None or self._worker.arm():
                return
        self._again = self._loop.call_later(_AGAIN_S, self._progress)

    def _receive(self) -> None:
        handle = int(self._worker.handle)
        for message, length in self._native.take_messages(handle, _TAG):
            # A longer one is no message of ours: UCX cuts it off and reports an error.
            into = ctypes.create_string_buffer(min(length, 2 * MAX_MESSAGE_BYTES))
            self._arriving.append((self._native.start_receive(handle, message, into), into))
        while self._arriving and self._native.state(self._arriving[0][0]) != IN_PROGRESS:
            request, into = self._arriving.popleft()
            status = self._native.state(request)
            self._native.finish(request)
            if status == OK:
                self._deliver(into.raw)
            else:
                log.warning("a KV notification was lost", reason=self._native.describe(status))

    def _deliver(self, received: bytes) -> None:
        try:
            notice = msgspec.msgpack.decode(received, type=_Notice)
        except msgspec.MsgspecError as error:
            log.warning("a KV notification could not be read", reason=str(error))
            return
        if not hmac.compare_digest(notice.token, self._token):
            log.warning("a KV notification without our token was dropped", peer=notice.peer_id)
            return
        self._on_notify(notice.peer_id, notice.message)
