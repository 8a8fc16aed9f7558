"""The correctness gate: a greedy probe through one prefill–decode pair against an aggregated run.

Wrong KV does not fail, it makes wrong text with HTTP 200; only a comparison of tokens finds it. Knows
no socket and no pair: who runs the probe is told by the caller.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from enum import StrEnum
from hashlib import blake2b
from itertools import count

import structlog

from trtllm_workers.engines.base import Engine, generate
from trtllm_workers.errors import LaunchError
from trtllm_workers.transfer.base import KvLink
from trtllm_workers.types import (
    EngineInfo,
    GenerateRequest,
    Reservation,
    SamplingParams,
    TokenChunk,
)

log = structlog.get_logger(__name__)

NUM_TOKENS = 8
# Enough bytes to show a rate rather than a latency, where blocks and sequences allow.
_RATE_BYTES = 32 << 20
_RATE_TIMEOUT_S = 10.0
# Longer than a prefill worker may take by default: what is slow then is this worker itself.
TIMEOUT_S = 120.0


class Verdict(StrEnum):
    """What a probe found.

    FAILED: it did not get through the pair. BUSY: this worker had no room for it in time. Neither
    says anything about tokens, and BUSY nothing about the pair.
    """

    PASSED = "passed"
    MISMATCH = "mismatch"
    FAILED = "failed"
    BUSY = "busy"


class ProbeOut:
    """Collects the tokens of a probe; ``ended`` resolves with the last chunk."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.on_first: Callable[[], None] | None = None
        self.tokens: list[int] = []
        self.ended: asyncio.Future[TokenChunk] = asyncio.get_running_loop().create_future()

    def __call__(self, chunk: TokenChunk) -> None:
        self.tokens += chunk.token_ids
        if chunk.finish_reason is not None and not self.ended.done():
            self.ended.set_result(chunk)


class Canary:
    """Makes probes and compares. ``name`` keeps its request ids apart from everybody else's."""

    def __init__(self, name: str, engine: Engine, info: EngineInfo) -> None:
        self._name = name
        self._engine = engine
        self._info = info
        self._prompt = probe_prompt(info)
        self._numbers = count(1)
        self._reference: list[int] | None = None
        self.running: set[str] = set()

    def request(self) -> GenerateRequest:
        """Return a fresh probe: always the same tokens, never the same prefix cache."""
        number = next(self._numbers)
        request_id = f"{self._name}/canary-{number}"
        return GenerateRequest(
            request_id=request_id,
            prompt_token_ids=self._prompt,
            sampling=SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True),
            cache_salt=request_id,  # blocks must be computed and moved, not found
        )

    async def compare(
        self, probe: Callable[[GenerateRequest, ProbeOut], Awaitable[None]]
    ) -> tuple[Verdict, str]:
        """Run one probe and return the verdict with its reason. Never raises LaunchError.

        ``probe(request, out)`` sends the request through the pair, delivers to ``out``, and returns
        when it is resumed here; it raises LaunchError when it does not get through.
        """
        request = self.request()
        out = ProbeOut(request.request_id)
        self.running.add(request.request_id)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                reference = await self._aggregated()
                await probe(request, out)
                last = await out.ended
                if last.error_code:
                    return Verdict.FAILED, last.error_message or last.error_code
                if out.tokens == reference:
                    return Verdict.PASSED, ""
                # Not the reference's fault? It is made anew before anybody is blamed.
                self._reference = None
                again = await self._aggregated()
        except LaunchError as error:
            return Verdict.FAILED, str(error)
        except TimeoutError:
            self._engine.abort(request.request_id)
            return Verdict.BUSY, f"this worker did not decode the probe within {TIMEOUT_S:g} s"
        finally:
            self.running.discard(request.request_id)
        if again != reference:
            self._reference = None
            return Verdict.FAILED, f"this worker's own tokens changed from {reference} to {again}"
        return Verdict.MISMATCH, f"tokens {out.tokens}, an aggregated run gives {reference}"

    async def measure(self, link: KvLink, num_remote_blocks: int) -> tuple[int, float]:
        """Read blocks from a peer; return how many bytes in how many seconds; (0, 0): not measured.

        Reads what lies in the peer's first blocks, whatever it is, into blocks that are reserved for
        that and given back.
        """
        pool = self._engine.kv_pool
        info = self._info
        if pool is None:
            return 0, 0.0
        num_blocks = min(
            _RATE_BYTES // pool.layout.block_bytes or 1,
            (info.max_seq_len - 1) // info.block_size,
            info.num_blocks // 4,
            num_remote_blocks,
        )
        if num_blocks < 1:
            return 0, 0.0
        number = next(self._numbers)
        request = GenerateRequest(
            request_id=f"{self._name}/rate-{number}",
            prompt_token_ids=self._prompt[:1] * (num_blocks * info.block_size),
            sampling=SamplingParams(max_tokens=1, temperature=0.0),
            cache_salt=f"{self._name}/rate-{number}",
        )
        reserved: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()
        self.running.add(request.request_id)
        try:
            self._engine.reserve(
                request, lambda told: None if reserved.done() else reserved.set_result(told)
            )
            async with asyncio.timeout(_RATE_TIMEOUT_S):
                local = (await reserved).block_ids
                remote = range(len(local))
                await link.read(remote, local, _RATE_TIMEOUT_S)  # the first finds its way
                began_s = time.monotonic()
                await link.read(remote, local, _RATE_TIMEOUT_S)
            return len(local) * pool.layout.block_bytes, time.monotonic() - began_s
        except (LaunchError, TimeoutError) as error:
            log.info("rate of a prefill worker not measured", peer=link.peer_id, reason=str(error))
            return 0, 0.0
        finally:
            self._engine.abort(request.request_id)
            self.running.discard(request.request_id)

    async def _aggregated(self) -> list[int]:
        """Return the tokens of a run that stays on this worker; computed once."""
        if self._reference is None:
            request = self.request()
            self.running.add(request.request_id)
            tokens: list[int] = []
            try:
                async for chunk in generate(self._engine, request):
                    if chunk.error_code:
                        raise LaunchError(chunk.error_message or chunk.error_code)
                    tokens += chunk.token_ids
            finally:
                self.running.discard(request.request_id)
            self._reference = tokens
        return self._reference


def probe_prompt(info: EngineInfo) -> list[int]:
    """Return two and a half blocks of tokens, the same for every worker of a model.

    Spread over the vocabulary, without eos; shorter where the engine takes no such prompt.
    """
    length = 2 * info.block_size + info.block_size // 2
    limit = min(info.max_seq_len, info.num_blocks * info.block_size) - NUM_TOKENS
    length = max(1, min(length, limit, info.max_num_tokens))
    digest = b""
    tokens: list[int] = []
    while len(tokens) < length:
        digest = blake2b(digest + info.model_id.encode(), digest_size=64).digest()
        for high, low in zip(digest[::2], digest[1::2], strict=True):
            token = (high << 8 | low) * info.vocab_size >> 16
            if token not in info.eos_token_ids:
                tokens.append(token)
    return tokens[:length]
