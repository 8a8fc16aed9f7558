"""TensorRT-LLM's outputs to our chunks: one mutable object with all tokens so far, made into what is new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trtllm_workers.types import FinishReason, TokenChunk, TokenLogprob

# "timeout" and "cancelled" are not ends that a client asked for: who asked says so by aborting.
_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "cancelled": FinishReason.ABORT,
    "timeout": FinishReason.ERROR,
}


class ChunkMaker:
    """Makes the chunks of one stream.

    ``stops`` are the ids that end an answer unseen. TensorRT-LLM takes stop words off the end again, so a
    list may be shorter than before; what was told stays told. ``first`` are tokens that came with a handoff:
    they stand at the beginning of the output, and are told only once.
    """

    __slots__ = (
        "_cached",
        "_first",
        "_max_tokens",
        "_num_logprobs",
        "_num_told",
        "_shift",
        "_stops",
    )

    def __init__(
        self,
        max_tokens: int,
        stops: frozenset[int],
        num_logprobs: int | None = None,
        first: TokenChunk | None = None,
    ) -> None:
        self._max_tokens = max_tokens
        self._stops = stops
        self._num_logprobs = num_logprobs
        self._first = first
        self._num_told = 0  # of the whole answer
        self._shift = 0  # how many of these TensorRT-LLM does not list
        self._cached = first.cached_tokens if first is not None else -1

    @property
    def begun(self) -> bool:
        """Whether anything was told."""
        return self._num_told > 0

    def take(self, output: Any, cached_tokens: int) -> TokenChunk | None:
        """Return what is new in a CompletionOutput; None when nothing is.

        The last chunk has a finish reason; nothing may be taken after it.
        """
        ids: Sequence[int] = output.token_ids
        if self._cached < 0:
            self._cached = cached_tokens
        if self._first is not None:
            return self._begin(ids, output)
        told = self._num_told - self._shift
        if output.finish_reason is None:
            if len(ids) <= told:
                return None
            return self._chunk(ids, told, output, None)
        return self._chunk(ids, told, output, output.finish_reason)

    def _begin(self, ids: Sequence[int], output: Any) -> TokenChunk | None:
        """Tell the handoff's tokens and what came after them as one chunk."""
        first = self._first
        assert first is not None, "asked for by take"
        if not ids and output.finish_reason is None:
            return None
        self._first = None
        known = first.token_ids
        # Releases differ in whether the output repeats the prefill's token.
        told = len(known) if tuple(ids[: len(known)]) == known else 0
        self._num_told, self._shift = len(known), len(known) - told
        rest = self._chunk(ids, told, output, output.finish_reason)
        if rest is None:
            return first
        logprobs = None
        if first.logprobs is not None or rest.logprobs is not None:
            logprobs = (*(first.logprobs or ()), *(rest.logprobs or ()))
        return TokenChunk(
            (*known, *rest.token_ids),
            rest.finish_reason,
            self._cached,
            rest.num_hidden_tokens,
            logprobs,
            rest.stop_token_id,
            rest.error_code,
            rest.error_message,
        )

    def _chunk(
        self, ids: Sequence[int], told: int, output: Any, finished: str | None
    ) -> TokenChunk | None:
        new = tuple(ids[told:])
        reason = _REASONS.get(finished, FinishReason.ERROR) if finished is not None else None
        stop_id: int | None = None
        hidden = 0
        if reason is FinishReason.STOP:
            hidden = 1
            if isinstance(output.stop_reason, int):
                stop_id = output.stop_reason
            if new and new[-1] in self._stops:  # an eos is listed, a stop word is not
                stop_id, new = new[-1], new[:-1]
        room = self._max_tokens - self._num_told
        if len(new) > room:
            new, reason, hidden, stop_id = new[:room], FinishReason.LENGTH, 0, None
        if not new and reason is None:
            return None
        self._num_told += len(new)
        logprobs = None
        if self._num_logprobs is not None:
            logprobs = _logprobs(output.logprobs, told, new, self._num_logprobs)
        if reason is FinishReason.ERROR:
            return TokenChunk(
                new,
                reason,
                self._cached,
                logprobs=logprobs,
                error_code="engine_error",
                error_message=f"TensorRT-LLM ended the request with '{finished}'",
            )
        return TokenChunk(new, reason, self._cached, hidden, logprobs, stop_id)


def _logprobs(
    listed: Sequence[Any] | None, told: int, new: tuple[int, ...], num_top: int
) -> tuple[TokenLogprob, ...]:
    """Return the logprobs of ``new``; those that TensorRT-LLM left out are left out here too."""
    found = []
    for token, entry in zip(new, (listed or ())[told : told + len(new)], strict=False):
        if not isinstance(entry, Mapping):
            found.append(TokenLogprob(token, float(entry)))
            continue
        ranked = sorted(entry.items(), key=lambda item: item[1].rank or 0)
        top = [(other, float(one.logprob)) for other, one in ranked[:num_top]]
        chosen = entry.get(token)
        found.append(TokenLogprob(token, float(chosen.logprob) if chosen else float("-inf"), top))
    return tuple(found)
