"""Asks to workers that make items of images: whom, and what comes of it. Knows no request's text.

Every ask that was sent is ended with one EncodeDone, unless its connection ended first: then the worker has
forgotten it on its own.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection, Sequence
from hashlib import blake2b
from time import perf_counter

import structlog

from trtllm_workers.errors import (
    EngineDead,
    FrameError,
    LaunchError,
    Overloaded,
    PeerLost,
    PlaneError,
    RequestError,
    TooLarge,
    Unavailable,
    error_for_code,
)
from trtllm_workers.ingress.placeholders import check_items
from trtllm_workers.ingress.served import Served, Worker
from trtllm_workers.observe.metrics import Metrics
from trtllm_workers.planes.base import Peer
from trtllm_workers.planes.media_messages import EncodeAsk, Encoded, EncodeDone, EncodeFailed
from trtllm_workers.types import MediaItem, MediaReference

log = structlog.get_logger(__name__)

# Another worker can do what these kept one from.
_NEXT = (PlaneError, EngineDead, Unavailable, Overloaded)

# A worker gets its images, because it may have them already, up to so many asks more than another one.
_MORE_ASKS = 4

# So much of each end of a URL tells enough of them apart; a data: URL may have megabytes.
_KEY_CHARACTERS = 1024

_PREFIX = "trtllm_launch_image_"


class Claim:
    """Items that a worker made, and keeps for us until ``done``; with its connection they go."""

    def __init__(self, worker: Worker, peer: Peer, ask: int) -> None:
        self.worker = worker
        self.items: list[list[MediaItem]] = []
        self.num_cached = 0
        self._peer = peer
        self._ask = ask
        self._is_done = False

    @property
    def holds(self) -> bool:
        """True while the worker keeps the items."""
        return not self._is_done and self.worker.peer is self._peer

    def is_of(self, peer: Peer) -> bool:
        """True for the worker that was asked."""
        return self._peer.address == peer.address

    def done(self) -> None:
        """Tell the worker that nobody needs them any more."""
        if self._is_done:
            return
        holds, self._is_done = self.holds, True
        if holds:
            try:
                self._peer.send(EncodeDone(self._ask))
            except PeerLost:
                return  # the worker forgets what a lost ingress had asked for


class _Ask:
    """An ask that has no answer."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.answer: asyncio.Future[Encoded] = asyncio.get_running_loop().create_future()

    def fail(self, error: LaunchError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Encoders:
    """All asks of one ingress."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._numbers = itertools.count(1)
        self._asks: dict[int, _Ask] = {}

    def on_answer(self, peer: Peer, message: Encoded | EncodeFailed) -> None:
        """Take what a worker says to an ask; one that we gave up is ignored."""
        ask = self._asks.get(message.ask)
        if ask is None or not ask.claim.is_of(peer):
            return
        if isinstance(message, EncodeFailed):
            ask.fail(error_for_code(message.code, message.message, param=message.param))
        elif not ask.answer.done():
            ask.answer.set_result(message)

    def worker_lost(self, worker: Worker, error: PeerLost) -> None:
        """Let every ask fail that went to a worker that is gone."""
        for ask in list(self._asks.values()):
            if ask.claim.worker is worker:
                ask.fail(PeerLost(f"worker {worker.worker_id} was lost: {error}"))

    async def encode(
        self,
        served: Served,
        references: Sequence[MediaReference],
        timeout_s: float,
        avoid: Worker | None = None,
    ) -> Claim:
        """Return items for the references; of ``avoid`` only when nobody else makes them.

        Raises what the worker finds wrong with the request; Unavailable when no worker makes items, or not
        within ``timeout_s``; Overloaded when all that do have too much to do.
        """
        began_s = perf_counter()
        outcome = "abandoned"
        try:
            claim = await self._encode(served, references, timeout_s, avoid)
            outcome = "ok"
        except RequestError:
            outcome = "refused"
            raise
        except LaunchError:
            outcome = "failed"
            raise
        finally:
            self._metrics.histogram(
                f"{_PREFIX}encode_seconds", model=served.name, outcome=outcome
            ).observe(perf_counter() - began_s)
        num_items = sum(map(len, claim.items))
        self._metrics.histogram(f"{_PREFIX}items", model=served.name).observe(num_items)
        cached = self._metrics.counter(f"{_PREFIX}cached_items_total", model=served.name)
        cached.add(min(claim.num_cached, num_items))
        return claim

    async def _encode(
        self,
        served: Served,
        references: Sequence[MediaReference],
        timeout_s: float,
        avoid: Worker | None,
    ) -> Claim:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        failed: list[Worker] = []
        last: LaunchError | None = None
        while True:
            worker = self._choose(served, references[0].url, failed, avoid)
            if worker is None:
                break
            try:
                return await self._ask(worker, references, deadline_s - loop.time())
            except TimeoutError:
                raise Unavailable(
                    f"worker {worker.worker_id} did not encode the images within {timeout_s:g} s"
                ) from None
            except _NEXT as error:
                log.warning("images not encoded", worker_id=worker.worker_id, error=str(error))
                last = error
                failed.append(worker)
                self._metrics.counter(f"{_PREFIX}encode_retries_total", model=served.name).add()
        if isinstance(last, Overloaded):
            raise last
        why = served.no_images or f"no encode worker of '{served.name}' is ready"
        raise Unavailable(f"{why}: {last}" if last is not None else why)

    def _choose(
        self, served: Served, url: str, failed: Collection[Worker], avoid: Worker | None
    ) -> Worker | None:
        """Return the worker that most likely has this image already, unless it has far more to do."""
        able = served.encoders(failed)
        able = [worker for worker in able if worker is not avoid] or able
        if not able:
            return None
        most = min(worker.encoding for worker in able) + _MORE_ASKS
        ends = f"{len(url)} {url[:_KEY_CHARACTERS]} {url[-_KEY_CHARACTERS:]}"
        key = blake2b(ends.encode(errors="replace"), digest_size=32).digest()
        return max(
            (worker for worker in able if worker.encoding <= most),
            key=lambda worker: blake2b(worker.worker_id.encode(), key=key, digest_size=8).digest(),
        )

    async def _ask(
        self, worker: Worker, references: Sequence[MediaReference], timeout_s: float
    ) -> Claim:
        """Ask one worker. Raises TimeoutError, and what it answers instead of items."""
        if timeout_s <= 0:
            raise TimeoutError
        peer = worker.peer
        if peer is None:
            raise PeerLost(f"worker {worker.worker_id} is not connected")
        number = next(self._numbers)
        claim = Claim(worker, peer, number)
        ask = self._asks[number] = _Ask(claim)
        worker.encoding += 1
        try:
            _send(peer, EncodeAsk(number, list(references), timeout_s))
            async with asyncio.timeout(timeout_s):
                answer = await ask.answer
            check_items(answer.items, len(references))
        except BaseException:
            claim.done()
            raise
        finally:
            del self._asks[number]
            worker.encoding -= 1
        claim.items, claim.num_cached = answer.items, answer.num_cached
        return claim


def _send(peer: Peer, ask: EncodeAsk) -> None:
    try:
        peer.send(ask)
    except FrameError as error:
        raise TooLarge(
            f"the request's images are too large to be sent to a worker ({error}); send smaller ones, "
            "or their URLs",
            param=ask.references[0].param,
        ) from error
