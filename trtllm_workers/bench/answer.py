"""The bytes of one streamed answer, as they come, to a record. Knows no socket."""

from __future__ import annotations

import msgspec

from trtllm_workers.bench.records import Record

_LONGEST_SHOWN = 200


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Cached(msgspec.Struct):
    cached_tokens: int | None = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Cached | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(_Event).decode


class Answer:
    """Takes the body of one answer. Each chunk is looked at once, when it comes: what it costs falls
    between two chunks and not on one of them."""

    __slots__ = ("_began_s", "_done", "_keep_text", "_rest", "body", "record", "status", "streamed")

    def __init__(self, record: Record, began_s: float, *, keep_text: bool = False) -> None:
        self.record = record
        self.status = 0
        self.streamed = False
        self.body = bytearray()  # of an answer that is no stream of events
        self._began_s = began_s
        self._keep_text = keep_text
        self._rest = b""
        self._done = False

    def begin(self, status: int, content_type: bytes) -> None:
        """Take status and content type; called once, before any byte of the body."""
        self.status = status
        self.streamed = status == 200 and content_type.startswith(b"text/event-stream")

    def feed(self, piece: bytes, now_s: float) -> None:
        """Take some bytes of the body, read at ``now_s``."""
        if not self.streamed:
            self.body += piece
            return
        if b"\r" in piece:
            piece = piece.replace(b"\r", b"")
        if self._rest:
            piece = self._rest + piece
        *events, self._rest = piece.split(b"\n\n")
        for event in events:
            if event.startswith(b"data: {"):
                self._event(event[6:], now_s)
            else:
                self._odd(event, now_s)

    def end(self, now_s: float) -> None:
        """The body is complete."""
        record = self.record
        record.end_s = now_s - self._began_s
        if record.problem:
            return
        if self.status != 200:
            record.problem = f"HTTP {self.status}: {error_of(bytes(self.body))}"
        elif not self.streamed:
            record.problem = "the answer is no stream of events"
        elif not self._done:
            record.problem = "the stream ended without [DONE]"

    def _event(self, text: bytes, now_s: float) -> None:
        try:
            event = _decode(text)
        except msgspec.DecodeError as wrong:
            self._wrong(f"an event that cannot be read: {wrong}")
            return
        record = self.record
        for choice in event.choices:
            delta = choice.delta
            if delta is not None and (delta.content or delta.reasoning_content):
                record.chunks_s.append(now_s - self._began_s)
                if self._keep_text:
                    record.text += f"{delta.reasoning_content or ''}{delta.content or ''}"
            if choice.finish_reason:
                record.finish_reason = choice.finish_reason
        if event.usage is not None:
            record.prompt_tokens = event.usage.prompt_tokens
            record.output_tokens = event.usage.completion_tokens
            cached = event.usage.prompt_tokens_details
            record.cached_tokens = (cached.cached_tokens or 0) if cached is not None else 0
        if bytes(event.error) not in (b"", b"null"):
            self._wrong(f"error in the stream: {error_of(text)}")

    def _odd(self, event: bytes, now_s: float) -> None:
        """Take an event in other clothes: several lines, comments, the end mark."""
        lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
        text = b"\n".join(lines)
        if text == b"[DONE]":
            self._done = True
        elif text:
            self._event(text, now_s)

    def _wrong(self, problem: str) -> None:
        if not self.record.problem:
            self.record.problem = problem


def error_of(body: bytes) -> str:
    """Return what a server says is wrong: OpenAI's error message, else the beginning of its text."""
    try:
        told = msgspec.json.decode(body)
        error = told["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (msgspec.DecodeError, KeyError, TypeError):
        text = body.decode(errors="replace")
    return " ".join(text.split())[:_LONGEST_SHOWN] or "(nothing said)"
