"""A streamed answer: text to server-sent events, events to bytes on the connection.

Knows no worker and no tokenizer. One event per token. Tokens in hand go straight from the frame
callback to the connection's transport when the server publishes it, else through ASGI's ``send``.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence

import structlog

from trtllm_workers.ingress.answer import Answer
from trtllm_workers.ingress.choice import Choice
from trtllm_workers.ingress.exchange import Connection, Exchange
from trtllm_workers.ingress.responses import DONE, Scored, Shape, error_event
from trtllm_workers.ingress.settings import IngressSettings

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)

Path = Callable[[int], None]

log = structlog.get_logger(__name__)

_size_lines: list[bytes] = []


def size_lines(up_to: int) -> list[bytes]:
    """Return HTTP chunk heads by chunk length, for lengths up to ``up_to``."""
    if len(_size_lines) <= up_to:
        _size_lines.extend(b"%x\r\n" % size for size in range(len(_size_lines), up_to + 1))
    return _size_lines


class Wire:
    """The way of one answer's events to its client. Also the Sink of its choices.

    ``pending`` holds what waits for the handler to send it: everything before the response has
    started and after the last choice ended; everything always, without a published connection.
    """

    def __init__(self, exchange: Exchange, shape: Shape, settings: IngressSettings) -> None:
        self._exchange = exchange
        self._shape = shape
        self._max_unread_bytes = settings.max_unread_bytes
        self._stall_timeout_s = settings.client_stall_timeout_s
        self._connection: Connection | None = None
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self.num_events = 0
        self.answer: Answer | None = None

    @property
    def has_pending(self) -> bool:
        """True while something waits for the handler."""
        return bool(self._pending)

    def take(self) -> bytes:
        """Return and forget what waits."""
        taken = b"".join(self._pending)
        self._pending.clear()
        self._pending_bytes = 0
        return taken

    def text(self, index: int, text: str, logprobs: Sequence[Scored] | None) -> None:
        """Send one event with text."""
        self._event(self._shape.text_event(index, text, logprobs))

    def end(self, index: int, reason: str, logprobs: Sequence[Scored] | None) -> None:
        """Send the event that ends a choice; the last one goes out with the end of the response."""
        event = self._shape.end_event(index, reason, logprobs)
        assert self.answer is not None, "choices end after the answer has begun"
        if self.answer.running == 1:
            self._hold(event)
        else:
            self._event(event)

    def forget(self, index: int) -> None:
        """Nothing to do: a choice only begins anew before its first event."""

    def _event(self, event: bytes) -> None:
        connection = self._connection
        if connection is None:
            self._hold(event)
            self._exchange.wake()
            return
        self.num_events += 1
        if connection.flow.write_paused:
            self.look_at_unread()
        try:
            connection.transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        except RuntimeError:
            self.client_left()

    def _hold(self, event: bytes) -> None:
        self.num_events += 1
        self._pending.append(event)
        self._pending_bytes += len(event)
        if self._pending_bytes > self._max_unread_bytes:
            self._too_slow(f"{self._pending_bytes} bytes were waiting for it")

    def go_direct(self, choices: Sequence[Choice], fast: Callable[[Choice], Path | None]) -> None:
        """Write straight to the transport from now on, if the server lets us.

        ``fast`` gives a choice its shortest way from token to transport, where there is one.
        """
        connection = self._exchange.connection
        if connection is None or connection.flow.write_paused:
            return
        self._connection = connection
        for choice in choices:
            if choice.finish_reason is None:
                choice.calm = fast(choice)
                choice.settle()

    def go_held(self) -> None:
        """Leave the transport to the handler again."""
        self._connection = None

    def client_left(self) -> None:
        """Abort: the connection is closed, though nobody was told yet."""
        if self.answer is not None:
            self.answer.abandon("client_left")

    def look_at_unread(self) -> None:
        """Drop a client that leaves its stream unread. Called while writing is paused."""
        connection = self._connection
        assert connection is not None, "only direct writing looks at the transport"
        unread = connection.transport.get_write_buffer_size()
        if unread > self._max_unread_bytes:
            self._too_slow(f"{unread} bytes were waiting for it")
        since_s = connection.paused_since_s
        if since_s is not None:
            stalled_s = asyncio.get_running_loop().time() - since_s
            if stalled_s > self._stall_timeout_s:
                self._too_slow(f"it read nothing for {stalled_s:.0f} s")

    def _too_slow(self, why: str) -> None:
        if self.answer is None or self.answer.cause:
            return
        log.warning("client dropped", request_id=self._exchange.request_id, reason=why)
        self.answer.abandon("slow_client")
        self._exchange.drop()


def direct_path(
    choice: Choice,
    wire: Wire,
    connection: Connection,
    shape: Shape,
    fragments: Sequence[bytes | None],
    risky: Callable[[bytes], object] | None,
) -> Path:
    """Return the shortest way of a token: table lookup, one join, one write.

    ``risky(fragment)`` is true when a stop string could begin in it; such tokens, and those that
    are no whole characters, go the choice's careful way. The closure keeps everything at hand:
    this runs once per token.
    """
    write = connection.transport.write
    flow = connection.flow
    head = shape.text_head(choice.index)
    tail = shape.text_tail + b"\r\n"
    fixed = len(head) + len(shape.text_tail)
    sizes = size_lines(fixed + 1024)
    longest = len(sizes) - fixed
    append = choice.token_ids.append
    careful = choice.text_token
    join = b"".join

    def on_token(token_id: int) -> None:
        fragment = fragments[token_id]
        if fragment is None or (risky is not None and risky(fragment)) or len(fragment) >= longest:
            careful(token_id)
            return
        append(token_id)
        if flow.write_paused:
            wire.look_at_unread()
        try:
            write(join((sizes[fixed + len(fragment)], head, fragment, tail)))
        except RuntimeError:
            wire.client_left()

    return on_token


def risk(stops: Sequence[str]) -> Callable[[bytes], object] | None:
    """Return a test for fragments in which one of ``stops`` could begin; None without stops."""
    if not stops:
        return None
    # Fragments are escaped for JSON: a backslash stands for some other character.
    first_bytes = {stop.encode()[:1] for stop in stops} | {b"\\"}
    return re.compile(b"[" + b"".join(map(re.escape, sorted(first_bytes))) + b"]").search


async def stream_answer(
    exchange: Exchange,
    answer: Answer,
    wire: Wire,
    shape: Shape,
    *,
    opening: bytes,
    include_usage: bool,
    fast: Callable[[Choice], Path | None],
) -> None:
    """Send the response until the answer is over. ``opening`` goes before the first event.

    Raises the answer's failure while nothing was sent; later it becomes the stream's last event.
    """
    while not (wire.has_pending or answer.over):
        await exchange.woken()
        if exchange.gone:
            return
    if answer.failure is not None:
        raise answer.failure
    await exchange.start(200, list(HEADERS))
    first = opening + wire.take()
    if not answer.over:
        await exchange.write(first)
        first = b""
        wire.go_direct(answer.choices, fast)
    while not answer.over:
        await exchange.woken()
        if exchange.gone:
            return
        if wire.has_pending and not answer.over:
            await exchange.write(wire.take())
    wire.go_held()
    await exchange.write(
        first + wire.take() + _closing(answer, shape, exchange, include_usage), more=False
    )


def _closing(answer: Answer, shape: Shape, exchange: Exchange, include_usage: bool) -> bytes:
    if answer.failure is not None:
        return error_event(answer.failure, exchange.request_id)
    return (shape.usage_event(answer.usage()) if include_usage else b"") + DONE
