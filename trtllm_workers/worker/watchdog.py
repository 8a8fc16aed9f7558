"""Finds out that an engine stands still while every light is green. Ends nothing itself.

An engine that is wedged answers its health check and takes requests, and nothing comes of them. The only proof of life is a
token, so when none has come for a while one of our own is asked for. A long prompt may keep an engine busy without a
token for a while; steps that are counted meanwhile are life as well.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import structlog

from trtllm_workers.engines.base import Engine
from trtllm_workers.errors import EngineDead, LaunchError
from trtllm_workers.types import EngineInfo, GenerateRequest, SamplingParams, TokenChunk
from trtllm_workers.worker.canary import probe_prompt

log = structlog.get_logger(__name__)

_PROBE_TOKENS = 4
# A process that was stopped or starved itself must not blame its engine: each look counts so much at most.
_LONGEST_LOOK_S = 5.0
# Steps without a delivery are life, but not for ever: a scheduler may turn and turn.
_STEPS_COUNT_TIMES = 10


class Watchdog:
    """Looks at one engine, a second or so apart.

    ``progress()`` grows with everything that the engine delivers to others. After ``timeout_s`` / 2 without life a
    one-token request is sent; when another ``timeout_s`` passes without life, the engine is taken for dead. ``timeout_s`` 0:
    never. Steps, and blocks that are pinned or reserved for other workers, are life while they change, up to ten
    times as long.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        info: EngineInfo,
        progress: Callable[[], int],
        *,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._engine = engine
        self._prompt = probe_prompt(info)[:_PROBE_TOKENS]
        self._progress = progress
        self._timeout_s = timeout_s
        self._clock = clock
        self._numbers = itertools.count(1)
        self._answers = 0
        self._given: tuple[int, int] = (-1, -1)
        self._stirring: tuple[int, int] = (-1, -1)
        self._looked_s = clock()
        self._silent_s = 0.0
        self._barren_s = 0.0
        self._waited_s = 0.0
        self._probe = ""

    @property
    def request_ids(self) -> set[str]:
        """Requests of our own that have not ended."""
        return {self._probe} if self._probe else set()

    def check(self) -> EngineDead | None:
        """Look once; return why the engine is taken for dead, None while it is not."""
        if not self._timeout_s:
            return None
        now_s = self._clock()
        passed_s = min(now_s - self._looked_s, _LONGEST_LOOK_S)
        self._looked_s = now_s
        stats = self._engine.stats()
        given = (self._progress(), self._answers)
        stirring = (stats.num_steps, stats.pinned_blocks + stats.reserved_blocks)
        if given != self._given:
            self._given, self._stirring = given, stirring
            self._silent_s = self._barren_s = self._waited_s = 0.0
            return None
        self._barren_s += passed_s
        self._silent_s += passed_s
        self._waited_s += passed_s
        if stirring != self._stirring:
            self._stirring = stirring
            self._silent_s = self._waited_s = 0.0
        if self._probe and (
            min(self._silent_s, self._waited_s) >= self._timeout_s
            or self._barren_s >= _STEPS_COUNT_TIMES * self._timeout_s
        ):
            return EngineDead(
                f"the engine stands still: not one token for {self._barren_s:.0f} s and no step for "
                f"{self._silent_s:.0f} s, with {stats.num_running + stats.num_waiting} requests open, one of them "
                "the worker's own of a single token (--stall-timeout-s sets how long that may take)"
            )
        if not self._probe and self._barren_s >= self._timeout_s / 2:
            self._send()
            self._waited_s = 0.0
        return None

    def close(self) -> None:
        """Take back what is open."""
        if self._probe:
            self._engine.abort(self._probe)
            self._probe = ""

    def _send(self) -> None:
        request_id = f"{self._name}/alive-{next(self._numbers)}"
        request = GenerateRequest(
            request_id=request_id,
            prompt_token_ids=self._prompt,
            sampling=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
            cache_salt=request_id,
        )
        self._probe = request_id

        def take(chunk: TokenChunk) -> None:
            # Whatever it says, an engine that says it is not wedged.
            self._answers += 1
            if chunk.finish_reason is not None and self._probe == request_id:
                self._probe = ""

        try:
            self._engine.submit(request, take)
        except LaunchError as error:
            self._probe = ""
            self._answers += 1
            log.info("the engine refuses a probe", reason=str(error))
