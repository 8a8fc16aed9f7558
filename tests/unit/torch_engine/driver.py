"""Drives the engine's core step by step, without its thread. Holds no test."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

from trtllm_workers.engines.acceptance import pin_media
from trtllm_workers.engines.torch.accept import rows_of
from trtllm_workers.engines.torch.core import Core
from trtllm_workers.engines.torch.loading import Loaded
from trtllm_workers.engines.torch.sequence import Purpose, Rows
from trtllm_workers.types import (
    GenerateRequest,
    MediaItem,
    Prefilled,
    Reservation,
    SamplingParams,
    TokenChunk,
)

_IDS = itertools.count()


def prompt_of(seed: int, length: int, vocab_size: int = 512) -> list[int]:
    return random.Random(seed).choices(range(3, vocab_size), k=length)


def request_of(
    prompt: Sequence[int],
    max_tokens: int = 12,
    *,
    cache_salt: str = "",
    media: Sequence[MediaItem] = (),
    **sampling: Any,
) -> GenerateRequest:
    fields = {"temperature": 0.0, "ignore_eos": True, **sampling}
    return GenerateRequest(
        request_id=f"r{next(_IDS)}",
        prompt_token_ids=list(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, **fields),
        cache_salt=cache_salt,
        media=tuple(media),
    )


class Driver:
    """A core, and every chunk of every request given to it; prefills and reservations beside."""

    def __init__(self, loaded: Loaded, *, reuse: bool, chunked: bool) -> None:
        self.core: Core[str] = Core(loaded, reuse=reuse, chunked_prefill=chunked)
        self.requests: dict[str, GenerateRequest] = {}
        self.chunks: dict[str, list[TokenChunk]] = {}
        self.prefilled: dict[str, Prefilled] = {}
        self.reservations: dict[str, Reservation] = {}

    def add(
        self,
        prompt: Sequence[int],
        max_tokens: int = 12,
        *,
        purpose: Purpose = Purpose.GENERATE,
        **options: Any,
    ) -> str:
        request = request_of(prompt, max_tokens, **options)
        rows = () if purpose is Purpose.RESERVE else self.rows(request)
        self.core.add(request.request_id, request, purpose, rows=rows)
        self.requests[request.request_id] = request
        self.chunks[request.request_id] = []
        return request.request_id

    def prefill(self, prompt: Sequence[int], max_tokens: int = 12, **options: Any) -> str:
        return self.add(prompt, max_tokens, purpose=Purpose.PREFILL, **options)

    def reserve(self, prompt: Sequence[int], max_tokens: int = 12, **options: Any) -> str:
        return self.add(prompt, max_tokens, purpose=Purpose.RESERVE, **options)

    def rows(self, request: GenerateRequest) -> Rows:
        """Return where a request's images lie in the store; they stay pinned."""
        vision = self.core.loaded.vision
        if vision is None:
            return ()
        return rows_of(request, pin_media(request, vision.store), vision.store)

    def resume(self, key: str, first: TokenChunk | None) -> None:
        if first is not None:
            self.chunks[key].append(first)
        rows = () if first is not None else self.rows(self.requests[key])
        self.core.resume(key, first, rows)

    def step(self) -> None:
        for key, result in self.core.step():
            if isinstance(result, Prefilled):
                self.prefilled[key] = result
            elif isinstance(result, Reservation):
                self.reservations[key] = result
            else:
                self.chunks[key].append(result)

    def finish(self) -> None:
        while not self.core.is_idle:
            self.step()

    def tokens(self, key: str) -> list[int]:
        return [token for chunk in self.chunks[key] for token in chunk.token_ids]

    def ask(self, prompt: Sequence[int], max_tokens: int = 12, **options: Any) -> list[int]:
        key = self.add(prompt, max_tokens, **options)
        self.finish()
        return self.tokens(key)
