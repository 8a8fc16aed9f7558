"""One stream of tokens on its way to text: one of the choices of an answer.

Knows decoders, stop strings and logprobs. Knows no HTTP and no worker: an ``Owner`` stops the
engine, a ``Sink`` takes the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Protocol

from trtllm_workers.errors import EngineError, LaunchError, PeerLost, error_for_code
from trtllm_workers.ingress.detokenize import Decoder
from trtllm_workers.ingress.responses import Scored
from trtllm_workers.ingress.stops import StopMatcher
from trtllm_workers.types import FinishReason, GenerateRequest, TokenChunk, TokenLogprob


class Sink(Protocol):
    """Where a choice's text goes: into events, or into a list until the end.

    ``logprobs`` is None unless asked for; it then holds the tokens not told before. ``forget``:
    the choice begins anew.
    """

    def text(self, index: int, text: str, logprobs: Sequence[Scored] | None) -> None: ...
    def end(self, index: int, reason: str, logprobs: Sequence[Scored] | None) -> None: ...
    def forget(self, index: int) -> None: ...


class Owner(Protocol):
    """Who a choice tells how it ended: exactly one of the two, once.

    ``engine_runs``: the worker does not know yet, and must be told to stop.
    """

    def choice_ended(self, choice: Choice, *, engine_runs: bool) -> None: ...
    def choice_failed(self, choice: Choice, error: LaunchError, *, engine_runs: bool) -> None: ...


class Choice:
    """One answer in the making.

    ``on_token`` is the way of the next token. It is replaced as the stream goes: ``calm`` (set by
    whoever can do it cheaper) while nothing is held back and no character is incomplete, the text
    way otherwise. Every way appends to ``token_ids``, which is also what a move to another worker
    starts from.
    """

    __slots__ = (
        "_decoded",
        "_owner",
        "_scored",
        "_sent",
        "_token_bytes",
        "cached_tokens",
        "calm",
        "decoder",
        "finish_reason",
        "first_s",
        "index",
        "last_s",
        "matcher",
        "moves",
        "num_careful",
        "num_hidden_tokens",
        "on_token",
        "request",
        "silent",
        "sink",
        "token_ids",
    )

    def __init__(
        self,
        *,
        index: int,
        request: GenerateRequest,
        owner: Owner,
        decoder: Decoder,
        matcher: StopMatcher | None,
        token_bytes: Callable[[int], bytes] | None,
        sink: Sink,
    ) -> None:
        self.index = index
        self.request = request
        self._owner = owner
        self.sink = sink
        self.moves = 0
        self.calm: Callable[[int], object] | None = None
        self.silent = False
        self.token_ids: list[int] = []
        self._token_bytes = token_bytes  # None: no logprobs wanted
        self.restart(decoder, matcher)

    def restart(self, decoder: Decoder, matcher: StopMatcher | None) -> None:
        """Begin from nothing; only right while nobody has seen any of the text."""
        self.sink.forget(self.index)
        self.decoder = decoder
        self.matcher = matcher
        self.token_ids.clear()  # in place: ``calm`` may be this very list's append
        self.cached_tokens = 0
        self.num_hidden_tokens = 0
        self.num_careful = 0
        self.finish_reason: str | None = None
        self.first_s = 0.0
        self.last_s = 0.0
        self._decoded = 0
        self._sent = 0
        self._scored: list[Scored] = []
        self.on_token: Callable[[int], object] = self._first_token

    @property
    def completion_tokens(self) -> int:
        """Tokens the engine made for this choice, a final eos or stop id included."""
        return len(self.token_ids) + self.num_hidden_tokens

    @property
    def scores(self) -> bool:
        """True when logprobs were asked for."""
        return self._token_bytes is not None

    def be_silent(self) -> None:
        """Only collect tokens: whoever made this choice decodes them all at once in the end."""
        self.silent = True
        self.calm = self.token_ids.append

    def settle(self) -> None:
        """Take the cheapest way that is right for the next token."""
        if not self.first_s:
            self.on_token = self._first_token
        elif self.calm is None or self.decoder.pending or self._holds():
            self.on_token = self.text_token
        else:
            self.on_token = self.calm

    def _holds(self) -> bool:
        return self.matcher is not None and bool(self.matcher.held)

    def _first_token(self, token_id: int) -> None:
        self.first_s = perf_counter()
        self.settle()
        self.on_token(token_id)

    def text_token(self, token_id: int) -> None:
        """Take a token the careful way: decode, look for stop strings, pass on what is certain."""
        self.token_ids.append(token_id)
        self.num_careful += 1
        self._pass_on(self.decoder.feed(token_id))
        if self.finish_reason is None:
            self.settle()

    def on_chunk(self, chunk: TokenChunk) -> None:
        """Take what a worker said besides a bare token."""
        if self.finish_reason is not None:
            return
        if chunk.finish_reason is FinishReason.ERROR:
            message = chunk.error_message or "the worker gave no reason"
            error = error_for_code(chunk.error_code or "", message, param=chunk.error_param)
            self._owner.choice_failed(self, error, engine_runs=False)
            return
        if chunk.cached_tokens and not self.moves:
            self.cached_tokens = chunk.cached_tokens
        if chunk.logprobs is not None and self._token_bytes is not None:
            for token_id, scored in zip(chunk.token_ids, chunk.logprobs, strict=True):
                self._scored.append(self._score(scored, self._token_bytes))
                self.on_token(token_id)
                if self.finish_reason is not None:
                    return
        else:
            for token_id in chunk.token_ids:
                self.on_token(token_id)
                if self.finish_reason is not None:
                    return
        if chunk.finish_reason is not None:
            self._finish(chunk.finish_reason, chunk.num_hidden_tokens)

    def _finish(self, reason: FinishReason, num_hidden_tokens: int) -> None:
        if reason is FinishReason.ABORT:
            # We forget a stream before we abort it, so this came from the worker's side.
            error = PeerLost("the worker aborted the request; it is going down")
            self._owner.choice_failed(self, error, engine_runs=False)
            return
        self.num_hidden_tokens = num_hidden_tokens
        if not self.silent:
            self._pass_on(self.decoder.flush())
            if self.finish_reason is not None:
                return
            held = self.matcher.flush() if self.matcher is not None else ""
            if held:
                self._emit(held)
        self.finish(reason.value, engine_runs=False)

    def finish(self, reason: str, *, engine_runs: bool) -> None:
        """End the choice; ``engine_runs`` when the worker does not know yet."""
        self.last_s = perf_counter()
        self.finish_reason = reason
        scored, self._scored = self._scored, []
        if engine_runs:  # a stop string: what begins behind it is no part of the answer
            scored = [token for token in scored if token.offset < self._sent]
        self.sink.end(self.index, reason, scored if self._token_bytes is not None else None)
        self._owner.choice_ended(self, engine_runs=engine_runs)

    def _pass_on(self, text: str) -> None:
        if not text:
            return
        self._decoded += len(text)
        if self.matcher is None:
            self._emit(text)
            return
        text, stop = self.matcher.feed(text)
        if text:
            self._emit(text)
        if stop is not None:
            self.finish(FinishReason.STOP.value, engine_runs=True)

    def _emit(self, text: str) -> None:
        self._sent += len(text)
        if self._token_bytes is None:
            self.sink.text(self.index, text, None)
            return
        told = [token for token in self._scored if token.offset < self._sent]
        self._scored = self._scored[len(told) :]
        self.sink.text(self.index, text, told)

    def _score(self, chosen: TokenLogprob, token_bytes: Callable[[int], bytes]) -> Scored:
        top = tuple((token_bytes(token_id), logprob) for token_id, logprob in chosen.top)
        return Scored(chosen, token_bytes(chosen.token_id), top, self._decoded)

    def lost(self, error: LaunchError) -> None:
        """Take notice that no more tokens come from the worker."""
        if self.finish_reason is None:
            self._owner.choice_failed(self, error, engine_runs=False)

    def fail(self, error: Exception) -> None:
        """End the choice because of a fault on this side."""
        if self.finish_reason is None:
            fault = EngineError(f"the ingress failed on this stream: {error!r}")
            self._owner.choice_failed(self, fault, engine_runs=True)
