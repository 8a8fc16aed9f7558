"""A worker's desk: frames in, engine calls out, tokens back. Starts and registers nothing."""

from __future__ import annotations

import msgspec
import structlog

from trtllm_workers.engines.base import Engine
from trtllm_workers.errors import LaunchError, PeerLost, Unavailable
from trtllm_workers.planes.base import Peer, RequestPlane
from trtllm_workers.planes.messages import Abort, Drain, Message, Submit, WorkerStats
from trtllm_workers.types import Address, Role
from trtllm_workers.worker.outbox import ReplyLine
from trtllm_workers.worker.roles import ROLES

log = structlog.get_logger(__name__)


class WorkerService:
    """Serves one engine to any number of ingresses.

    Request ids are the caller's and may collide between ingresses, so the engine sees
    ``<ingress>/<stream>/<request id>``, which cannot.
    """

    def __init__(self, worker_id: str, role: Role, engine: Engine) -> None:
        self._worker_id = worker_id
        self._handle = ROLES[role]
        self._engine = engine
        self._plane: RequestPlane | None = None
        self._lines: dict[Address, ReplyLine] = {}
        self._draining = ""
        self._num_frames = 0

    def attach(self, plane: RequestPlane) -> None:
        """Use this plane for answers; its ``on_message`` and ``on_lost`` are ours."""
        self._plane = plane

    @property
    def num_streams(self) -> int:
        """Streams that have not ended."""
        return sum(len(line.streams) for line in self._lines.values())

    def on_message(self, peer: Peer, message: Message) -> None:
        """Take one message from an ingress."""
        if isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, Abort):
            self._abort(message)
        elif not isinstance(message, Drain | WorkerStats):
            log.warning("unexpected message", kind=type(message).__name__, peer=str(peer.address))

    def on_lost(self, peer: Peer, error: PeerLost) -> None:
        """Abort what a lost ingress had asked for: nobody is left to read it."""
        line = self._lines.get(peer.address)
        if line is not None and self._plane is not None and self._plane.peer(peer.address) is None:
            line.lost(str(error))

    def _submit(self, message: Submit) -> None:
        line = self._lines.get(message.reply_to)
        if line is None:
            assert self._plane is not None, "attach() comes before the first message"
            line = ReplyLine(self._plane, message.reply_to, self._abandon, self._count_frame)
            self._lines[message.reply_to] = line
        reply_to = message.reply_to
        asked_id = message.request.request_id
        request_id = f"{reply_to.peer_id}/{message.stream}/{asked_id}"
        out = line.open(message.stream, request_id)
        if self._draining:
            out.fail(
                Unavailable.code or "", f"worker {self._worker_id} is draining: {self._draining}"
            )
            return
        request = msgspec.structs.replace(message.request, request_id=request_id)
        try:
            self._handle(self._engine, request, out)
        except LaunchError as error:
            out.fail(error.code or "engine_error", str(error), error.param)
        except Exception as error:
            log.exception("request failed in the worker", request_id=asked_id)
            out.fail("engine_error", f"internal error in worker {self._worker_id}: {error!r}")

    def _abort(self, message: Abort) -> None:
        line = self._lines.get(message.reply_to)
        if line is None:
            return
        for stream in message.streams:
            out = line.streams.get(stream)
            if out is not None:
                self._engine.abort(out.request_id)

    def _abandon(self, line: ReplyLine) -> None:
        self._lines.pop(line.address, None)
        for out in list(line.streams.values()):
            self._engine.abort(out.request_id)

    def _count_frame(self) -> None:
        self._num_frames += 1

    def publish_stats(self) -> None:
        """Tell every connected ingress the engine's load."""
        if self._plane is None:
            return
        message = WorkerStats(self._worker_id, self._engine.stats(), self._num_frames)
        for peer in self._plane.peers():
            try:
                peer.send(message)
            except PeerLost:
                continue  # on_lost tells the rest

    def drain(self, reason: str) -> None:
        """Take no new request; running ones go on. Every connected ingress is told at once."""
        self._draining = reason
        for peer in self._plane.peers() if self._plane is not None else ():
            try:
                peer.send(Drain(reason))
            except PeerLost:
                continue

    def abort_all(self) -> None:
        """Abort every stream."""
        for line in list(self._lines.values()):
            for out in list(line.streams.values()):
                self._engine.abort(out.request_id)

    async def close(self) -> None:
        """Send what is gathered and forget the ingresses."""
        for line in list(self._lines.values()):
            await line.close()
        self._lines.clear()
