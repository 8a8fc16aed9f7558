"""What the adapter keeps of one request. Decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from trtllm_workers.transfer.media_store import Entry as Kept
from trtllm_workers.types import GenerateRequest


class Phase(Enum):
    """Where a request is.

    GENERATING and PREFILLING run in TensorRT-LLM; of a PREFILLED one it holds the KV until somebody
    fetches it; a RESERVED one is only known here; a FETCHING one runs, but its KV is still on its way.
    """

    GENERATING = auto()
    PREFILLING = auto()
    PREFILLED = auto()
    RESERVED = auto()
    FETCHING = auto()


@dataclass(slots=True, eq=False)
class Entry:
    """One request. ``result`` is TensorRT-LLM's, ``task`` reads it. ``deliver`` None: nobody listens any more.

    ``pinned`` are the bytes of its images. ``brought``: its prompt was computed elsewhere, so what was cached there counts there.
    """

    request: GenerateRequest
    phase: Phase
    deliver: Callable[[Any], None] | None
    result: Any = None
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None
    aborted: bool = False
    brought: bool = False
    began_s: float = 0.0
    pinned: list[Kept] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        """The caller's name for it."""
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)
