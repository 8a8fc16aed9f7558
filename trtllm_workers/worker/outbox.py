"""Tokens on their way out of a worker: one frame per engine step and ingress. Knows no engine.

An engine delivers a step's chunks one by one within one loop iteration. A ``ReplyLine`` gathers
them and sends once, in the next iteration: one frame, one write, whatever the batch size.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from trtllm_workers.errors import PlaneError
from trtllm_workers.planes.base import Peer, RequestPlane
from trtllm_workers.planes.frames import TokenBatch
from trtllm_workers.planes.messages import Tokens
from trtllm_workers.types import Address, FinishReason, TokenChunk

log = structlog.get_logger(__name__)


class StreamOut:
    """One stream's way out; calling it is the engine's ``deliver``.

    ``on_first`` is called with the first chunk.
    """

    __slots__ = ("_line", "_started", "on_first", "request_id", "stream")

    def __init__(self, line: ReplyLine, stream: int, request_id: str) -> None:
        self._line = line
        self.stream = stream
        self.request_id = request_id
        self.on_first: Callable[[], None] | None = None
        self._started = False

    def __call__(self, chunk: TokenChunk) -> None:
        """Put the chunk into the frame of this step."""
        line = self._line
        line.batch.add(self.stream, chunk, first=not self._started)
        if not self._started:
            self._started = True
            if self.on_first is not None:
                self.on_first()
        if not line.flush_scheduled:
            line.schedule_flush()
        if chunk.finish_reason is not None:
            line.streams.pop(self.stream, None)

    def hand_over(self) -> None:
        """Leave the stream to another worker: nothing more is sent from here."""
        self._line.streams.pop(self.stream, None)

    def fail(self, code: str, message: str, param: str | None = None) -> None:
        """End the stream with an error."""
        self(
            TokenChunk(
                token_ids=(),
                finish_reason=FinishReason.ERROR,
                error_code=code,
                error_message=message,
                error_param=param,
            )
        )


def _made_by_an_engine(tokens: Tokens) -> bool:
    """Return whether a frame holds more than errors and aborts, which need no engine that works."""
    return bool(tokens.tokens) or any(
        chunk.token_ids or chunk.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        for _, chunk in tokens.rich
    )


class ReplyLine:
    """All streams that answer to one ingress, and the connection to it.

    ``on_frame`` is called for each frame that was sent, and told whether an engine made some of it.

    ``on_unreachable`` is called once, with this line, when the ingress cannot be reached or was lost;
    the streams in ``streams`` are then nobody's and should be aborted.
    """

    def __init__(
        self,
        plane: RequestPlane,
        address: Address,
        on_unreachable: Callable[[ReplyLine], None],
        on_frame: Callable[[bool], None],
    ) -> None:
        self.address = address
        self.batch = TokenBatch()
        self.streams: dict[int, StreamOut] = {}
        self.flush_scheduled = False
        self._plane = plane
        self._peer: Peer | None = plane.peer(address)
        self._connecting: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._on_unreachable = on_unreachable
        self._on_frame = on_frame
        self._closed = False

    def open(self, stream: int, request_id: str) -> StreamOut:
        """Begin a stream; the number is the ingress's."""
        out = StreamOut(self, stream, request_id)
        self.streams[stream] = out
        return out

    def schedule_flush(self) -> None:
        """Send what is gathered once this loop iteration is over."""
        self.flush_scheduled = True
        self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self.flush_scheduled = False
        if self._closed:
            return
        if self._peer is None:
            self._peer = self._plane.peer(self.address)
        if self._peer is None:
            if self._connecting is None:  # what gathers meanwhile is bounded by connect's deadline
                self._connecting = self._loop.create_task(self._connect())
            return
        tokens = self.batch.take()
        if tokens is None:
            return
        try:
            self._peer.send(tokens)
            self._on_frame(_made_by_an_engine(tokens))
        except PlaneError as error:
            self._give_up(str(error))

    async def _connect(self) -> None:
        try:
            self._peer = await self._plane.connect(self.address)
        except PlaneError as error:
            self._give_up(str(error))
            return
        finally:
            self._connecting = None
        self._flush()

    def _give_up(self, reason: str) -> None:
        if not self._closed:
            self._closed = True
            if self.streams:
                log.warning(
                    "ingress lost; its streams are aborted",
                    ingress=str(self.address),
                    streams=len(self.streams),
                    reason=reason,
                )
            self._on_unreachable(self)

    def lost(self, reason: str) -> None:
        """Take notice that the connection ended."""
        self._give_up(reason)

    async def close(self) -> None:
        """Send what is still gathered and forget the connection."""
        if self.flush_scheduled:
            self._flush()
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
