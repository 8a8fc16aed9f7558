"""OpenAI's response shapes as bytes. Knows values, no streams and no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from trtllm_workers.errors import LaunchError
from trtllm_workers.ingress.detokenize import escaped
from trtllm_workers.types import TokenLogprob

encode = msgspec.json.encode

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer with all its choices; each prompt is counted once."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def as_json(self) -> dict[str, Any]:
        """Return OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class Scored:
    """A token with its probability; ``text`` and ``raw`` are what it stands for on its own.

    ``offset`` is where its text begins in the answer's text, in characters.
    """

    chosen: TokenLogprob
    raw: bytes
    top: tuple[tuple[bytes, float], ...]
    offset: int


class Shape:
    """The shape of one response: chat or completion, with its id, time and model.

    Streamed text is ``text_head(index) + escaped text + text_tail``; both are made once a request.
    """

    def __init__(
        self, *, chat: bool, response_id: str, created: int, model: str, usage_field: bool
    ) -> None:
        self.chat = chat
        self._head = {
            "id": response_id,
            "object": "chat.completion" if chat else "text_completion",
            "created": created,
            "model": model,
        }
        kind = "chat.completion.chunk" if chat else "text_completion"
        head = encode({**self._head, "object": kind})[:-1]
        self._event_head = b"data: " + head + b',"choices":['
        # OpenAI: with include_usage every event has the field, null in all but the last.
        self._event_tail = b'],"usage":null}\n\n' if usage_field else b"]}\n\n"
        self.text_tail = b"".join(
            (b'"}' if chat else b'"', b',"logprobs":null,"finish_reason":null}', self._event_tail)
        )

    def text_head(self, index: int) -> bytes:
        """Return what stands before the text in an event of choice ``index``."""
        opening = b',"delta":{"content":"' if self.chat else b',"text":"'
        return b'%b{"index":%d%b' % (self._event_head, index, opening)

    def text_event(self, index: int, text: str, logprobs: Sequence[Scored] | None) -> bytes:
        """Return the event that adds ``text`` to choice ``index``."""
        head = self.text_head(index) + escaped(text)
        if logprobs is None:
            return head + self.text_tail
        closing = b'"}' if self.chat else b'"'
        scores = encode(self.logprobs(logprobs))
        return b"".join(
            (head, closing, b',"logprobs":', scores, b',"finish_reason":null}', self._event_tail)
        )

    def role_event(self, index: int) -> bytes:
        """Return a chat's first event of choice ``index``: who speaks."""
        return self._event(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def end_event(self, index: int, reason: str, logprobs: Sequence[Scored] | None) -> bytes:
        """Return the event that ends choice ``index``."""
        nothing: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return self._event(index, nothing, reason, logprobs)

    def usage_event(self, usage: Usage) -> bytes:
        """Return the event with the usage, for streams that asked for it."""
        return self._event_head + b'],"usage":' + encode(usage.as_json()) + b"}\n\n"

    def _event(
        self,
        index: int,
        said: dict[str, Any],
        reason: str | None,
        logprobs: Sequence[Scored] | None = None,
    ) -> bytes:
        scores = self.logprobs(logprobs) if logprobs else None
        choice = encode({"index": index, **said, "logprobs": scores, "finish_reason": reason})
        return self._event_head + choice + self._event_tail

    def choice(
        self, index: int, text: str, reason: str, logprobs: Sequence[Scored] | None
    ) -> dict[str, Any]:
        """Return a finished choice of a whole response."""
        said: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self.chat
            else {"text": text}
        )
        scores = None if logprobs is None else self.logprobs(logprobs)
        return {"index": index, **said, "logprobs": scores, "finish_reason": reason}

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage) -> bytes:
        """Return the body of a response that is not streamed."""
        return encode({**self._head, "choices": choices, "usage": usage.as_json()})

    def logprobs(self, tokens: Sequence[Scored]) -> dict[str, Any]:
        """Return OpenAI's logprobs object for these tokens."""
        if self.chat:
            return {"content": [_chat_logprob(token) for token in tokens], "refusal": None}
        return {
            "tokens": [_as_text(token.raw) for token in tokens],
            "token_logprobs": [token.chosen.logprob for token in tokens],
            "top_logprobs": [
                {_as_text(raw): logprob for raw, logprob in token.top} for token in tokens
            ],
            "text_offset": [token.offset for token in tokens],
        }


def _as_text(raw: bytes) -> str:
    return raw.decode(errors="replace")


def _logprob(raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _as_text(raw), "logprob": logprob, "bytes": list(raw)}


def _chat_logprob(token: Scored) -> dict[str, Any]:
    entry = _logprob(token.raw, token.chosen.logprob)
    entry["top_logprobs"] = [_logprob(raw, logprob) for raw, logprob in token.top]
    return entry


def error_body(error: LaunchError, request_id: str | None = None) -> bytes:
    """Return OpenAI's error object."""
    return encode({"error": _error(error, request_id)})


def error_event(error: LaunchError, request_id: str | None = None) -> bytes:
    """Return the event that ends a stream with an error."""
    return b"data: " + error_body(error, request_id) + b"\n\n"


def _error(error: LaunchError, request_id: str | None) -> dict[str, Any]:
    shape: dict[str, Any] = {
        "message": str(error),
        "type": error.error_type,
        "param": error.param,
        "code": error.code,
    }
    if request_id is not None and error.http_status >= 500:
        shape["request_id"] = request_id
    return shape
