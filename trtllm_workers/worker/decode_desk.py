"""The decode worker's side of handoffs: reserve blocks, get them filled, go on from there.

Each request is one task from its arrival until the engine decodes it; tokens need none. The story
of a request is ``_bring``: reserve, ask (or take what was offered), fetch, confirm; whatever goes wrong
on that way, the prompt is computed here instead, once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from functools import partial
from typing import TypeVar

import structlog

from trtllm_workers.engines.base import ENGINE_NATIVE, Engine
from trtllm_workers.errors import (
    EngineError,
    HandoffExpired,
    HandoffRefused,
    LaunchError,
    PeerLost,
    TransferError,
    TransferFailed,
)
from trtllm_workers.planes.base import Peer
from trtllm_workers.planes.messages import (
    CancelHandoff,
    Fetched,
    Fetching,
    Message,
    Offer,
    PrefillAsk,
    PrefillRefused,
)
from trtllm_workers.types import (
    Address,
    EngineInfo,
    FinishReason,
    GenerateRequest,
    Reservation,
    TokenChunk,
)
from trtllm_workers.worker.handoff_job import (
    EXPIRED,
    LOST,
    NO_PREFILL,
    PREFILL_TIMEOUT,
    REFUSED,
    TRANSFER,
    Aborted,
    Job,
    Out,
    WentWrong,
    fail,
    handoff_key,
    now_s,
    settle,
)
from trtllm_workers.worker.handoff_meters import HandoffMeters
from trtllm_workers.worker.media_desk import MediaDesk
from trtllm_workers.worker.native_fetch import fetch_natively
from trtllm_workers.worker.pairs import READY, Pair, Pairs
from trtllm_workers.worker.queued_prefill import QueuedPrefills

log = structlog.get_logger(__name__)
T = TypeVar("T")


class DecodeDesk:
    """Requests on their way into this worker's engine."""

    def __init__(
        self,
        engine: Engine,
        info: EngineInfo,
        meters: HandoffMeters,
        *,
        max_local_prefill_length: int,
        prefill_timeout_s: float,
    ) -> None:
        self._engine = engine
        self._info = info
        self._meters = meters
        self._max_local = max_local_prefill_length
        self._prefill_timeout_s = prefill_timeout_s
        self._jobs: dict[str, Job] = {}  # by request id
        self._by_handoff: dict[tuple[str, str, str], Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.pairs: Pairs | None = None
        self.queued: QueuedPrefills | None = None  # with a prefill queue
        self.media: MediaDesk | None = None  # of an engine that takes images

    @property
    def request_ids(self) -> Collection[str]:
        """Requests that are not decoding yet: the engine may hold blocks for them."""
        return self._jobs.keys()

    # --- requests ------------------------------------------------------------------------------

    def submit(self, request: GenerateRequest, out: Out, prefill: Address | None = None) -> None:
        """Take a request of an ingress (decode_first, and prefill_first without a prefill).

        ``prefill`` is the prefill worker that the router chose; another one does when it cannot.
        """
        self._start(Job(request, out, request.request_id, now_s(), wish=prefill))

    def take_over(self, peer: Peer, offer: Offer, request: GenerateRequest, out: Out) -> None:
        """Take a request that a prefill worker hands over (prefill_first)."""
        pair = self.pairs.of(peer) if self.pairs is not None else None
        job = Job(request, out, offer.handoff, now_s(), pair, handed_over=True, asked=True)
        job.offered_s = job.arrived_s
        if pair is None or pair.state != READY:  # one that drains still hands over what it has
            why = pair.reason if pair is not None else "it is unknown here"
            text = f"prefill worker {peer.address.peer_id} is no pair of this worker: {why}"
            job.offer.set_result(HandoffRefused(text))
            self._send(peer, CancelHandoff(offer.handoff, REFUSED))
            job.pair = None
        else:
            job.offer.set_result(offer)
        self._start(job)

    async def probe(self, pair: Pair, request: GenerateRequest, out: Out) -> None:
        """Send a request through one pair; return once it decodes here. Raises LaunchError."""
        job = Job(request, out, request.request_id, now_s(), pair, probe=True)
        self._register(job)
        try:
            await self._serve(job)
        finally:
            self._forget(job)

    def _start(self, job: Job) -> None:
        self._register(job)
        task = asyncio.create_task(self._run(job), name=f"handoff {job.handoff_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _register(self, job: Job) -> None:
        self._jobs[job.request.request_id] = job
        if job.pair is not None:
            self._by_handoff[handoff_key(job.pair, job.handoff_id)] = job

    def _forget(self, job: Job) -> None:
        if self._jobs.get(job.request.request_id) is job:
            del self._jobs[job.request.request_id]
        if job.pair is not None:
            self._by_handoff.pop(handoff_key(job.pair, job.handoff_id), None)

    def abort(self, request_id: str) -> bool:
        """Abort a request that is not decoding yet; False when it is not here."""
        job = self._jobs.get(request_id)
        if job is None:
            return False
        if not job.aborted.done():
            job.aborted.set_result(None)
            if not job.reserved.done():
                self._engine.abort(request_id)
        return True

    # --- news from prefill workers -------------------------------------------------------------

    def offered(self, peer: Peer, offer: Offer) -> None:
        """Take an offer that was asked for."""
        job = self._of(peer, offer.handoff)
        if job is not None and not job.offer.done():
            job.offered_s = now_s()
            job.offer.set_result(offer)
        elif offer.prefilled.first.finish_reason is None:
            self._send(peer, CancelHandoff(offer.handoff, "unknown"))

    def refused(self, peer: Peer, message: PrefillRefused) -> None:
        """Take a refusal."""
        job = self._of(peer, message.handoff)
        if job is not None and not job.offer.done():
            job.offer.set_result(HandoffRefused(message.message))

    def released(self, peer: Peer, handoff_id: str, *, valid: bool) -> None:
        """Take notice that the blocks are not pinned any more."""
        job = self._of(peer, handoff_id)
        if job is not None and not job.released.done():
            job.released.set_result(valid)

    def pair_lost(self, pair: Pair, error: PeerLost) -> None:
        """Take notice that a prefill worker is gone."""
        for job in list(self._jobs.values()):
            if job.pair is pair:
                for future in (job.offer, job.released):
                    if not future.done():
                        future.set_result(error)

    def _of(self, peer: Peer, handoff_id: str) -> Job | None:
        address = peer.address
        return self._by_handoff.get((address.peer_id, address.incarnation, handoff_id))

    # --- the story -----------------------------------------------------------------------------

    async def _run(self, job: Job) -> None:
        try:
            await self._serve(job)
        except LaunchError as error:
            fail(job, error)
        except Exception as error:  # the border: one request must not end the others
            log.exception("request failed in the worker", request_id=job.request.request_id)
            fail(job, EngineError(f"internal error: {error!r}"))
        finally:
            self._forget(job)

    async def _serve(self, job: Job) -> None:
        """Bring a request to the point where the engine decodes it, or end it."""
        request_id = job.request.request_id
        ended: TokenChunk | None = None
        try:
            self._engine.reserve(job.request, partial(settle, job.reserved))
            reservation = await job.reserved
        except BaseException:
            self._give_up(job, "refused")
            self._engine.abort(request_id)
            raise
        if reservation.ended is not None:
            self._give_up(job, "aborted")
            job.out(reservation.ended)
            return
        try:
            first = await self._bring(job, reservation)
            if job.streaming:
                if job.aborted.done():  # it came while this task waited for its turn
                    self._engine.abort(request_id)
                return
            if first is not None and first.finish_reason is not None:
                ended = first
            elif job.aborted.done():
                raise Aborted
            elif first is None and job.request.media and self.media is not None:
                async with self.media.here(job.request.media, job.aborted):
                    self._engine.resume(request_id, None, job.out)
                return
        except Aborted:
            ended = TokenChunk((), FinishReason.ABORT)
        except BaseException:
            self._engine.abort(request_id)
            raise
        if ended is not None:
            self._engine.abort(request_id)
            job.out(ended)
            return
        self._engine.resume(request_id, first, job.out)

    async def _bring(self, job: Job, reservation: Reservation) -> TokenChunk | None:
        """Return the first token, its KV being here; None when it is to be computed here."""
        cached = reservation.num_cached_blocks * self._info.block_size
        uncached = len(job.request.prompt_token_ids) - cached
        if not job.asked and job.pair is None and uncached <= self._max_local:
            self._meters.local += 1
            return None
        try:
            if self.queued is not None and not job.asked and job.pair is None:
                return await self._have_filled(self.queued, job, reservation)
            return await self._fetch(job, reservation)
        except Aborted:
            self._give_up(job, "aborted")
            raise
        except WentWrong as wrong:
            self._give_up(job, wrong.cause)
            if job.probe or (job.handed_over and wrong.cause == EXPIRED):
                raise wrong.error from None  # with prefill_first the ingress has moved it already
            self._meters.fell_back(wrong.cause)
            log.warning(
                "prompt is computed here after all",
                request_id=job.request.request_id,
                peer=job.pair.peer_id if job.pair is not None else None,
                cause=wrong.cause,
                reason=str(wrong),
            )
            return None
        except BaseException:
            self._give_up(job, "shutdown")
            raise

    async def _have_filled(
        self, queued: QueuedPrefills, job: Job, reservation: Reservation
    ) -> TokenChunk:
        filled = await queued.bring(job, reservation)
        if filled is None:
            return await self._fetch(job, reservation)
        job.offered_s = now_s() - filled.seconds
        if filled.first.finish_reason is None:
            self._time_first_token(job, filled.queue_s, filled.compute_s)
        return filled.first

    async def _fetch(self, job: Job, reservation: Reservation) -> TokenChunk:
        pair = self._choose(job)
        if not job.asked:
            self._ask(job, pair)
        offer = await self._hear(job, job.offer, self._prefill_timeout_s, PREFILL_TIMEOUT)
        prefilled = offer.prefilled
        if prefilled.first.finish_reason is not None:
            return prefilled.first
        if self._info.kv_transport == ENGINE_NATIVE:
            return await self._fetch_natively(job, pair, offer)
        deadline_s = job.offered_s + offer.timeout_s
        began_s = now_s()
        num_bytes = await self._read(job, pair, offer, reservation, deadline_s - began_s)
        seconds = now_s() - began_s
        self._say(pair, Fetched(job.handoff_id, num_bytes, seconds))
        if not await self._hear(job, job.released, deadline_s - now_s(), EXPIRED):
            raise WentWrong(
                EXPIRED,
                HandoffExpired(
                    f"handoff {job.handoff_id}: prefill worker {pair.peer_id} had released the "
                    "blocks before they were read; what was read is dropped"
                ),
            )
        if num_bytes:
            pair.moved(num_bytes, seconds)
        self._time_first_token(job, prefilled.queue_s, prefilled.compute_s)
        return prefilled.first

    async def _fetch_natively(self, job: Job, pair: Pair, offer: Offer) -> TokenChunk:
        """Let the engine fetch the KV itself; the stream runs afterwards."""

        def begun(seconds: float) -> None:
            pair.moved(0, seconds)
            self._time_first_token(job, offer.prefilled.queue_s, offer.prefilled.compute_s)
            job.streaming = True

        self._say(pair, Fetching(job.handoff_id))
        left_s = job.offered_s + offer.timeout_s - now_s()
        began_s = now_s()
        await fetch_natively(self._engine, job, offer, max(left_s, 0.0), begun)
        if pair.peer is not None:
            self._send(pair.peer, Fetched(job.handoff_id, 0, now_s() - began_s))
        return offer.prefilled.first

    def granted(self, job: Job, pair: Pair) -> None:
        """Take notice who has taken a request from the prefill queue, and will offer it."""
        job.pair, job.asked = pair, True
        self._by_handoff[handoff_key(pair, job.handoff_id)] = job

    def _choose(self, job: Job) -> Pair:
        if job.pair is None and not job.offer.done():
            job.pair = self.pairs.take(job.request, job.wish) if self.pairs is not None else None
            if job.pair is None:
                missing = self.pairs.missing if self.pairs is not None else "it is stopping"
                raise WentWrong(NO_PREFILL, HandoffRefused(f"no prefill worker: {missing}"))
            self._by_handoff[handoff_key(job.pair, job.handoff_id)] = job
        if job.pair is None:
            refusal = job.offer.result()
            assert isinstance(refusal, LaunchError), "an offer comes from a pair"
            raise WentWrong(REFUSED, refusal)
        return job.pair

    def _ask(self, job: Job, pair: Pair) -> None:
        self._say(pair, PrefillAsk(job.handoff_id, job.request))
        job.asked = True

    async def _read(
        self, job: Job, pair: Pair, offer: Offer, reservation: Reservation, timeout_s: float
    ) -> int:
        """Read the blocks that are not here yet; return how many bytes that was."""
        remote, local = offer.prefilled.block_ids, reservation.block_ids
        if len(remote) != len(local):
            raise WentWrong(
                TRANSFER,
                TransferFailed(
                    f"handoff {job.handoff_id}: prefill worker {pair.peer_id} offers {len(remote)} "
                    f"blocks for a prompt of {len(local)}"
                ),
            )
        skip = reservation.num_cached_blocks
        self._say(pair, Fetching(job.handoff_id))
        if skip == len(local):
            return 0
        if pair.link is None:
            raise WentWrong(LOST, PeerLost(f"prefill worker {pair.peer_id}: {pair.reason}"))
        if timeout_s <= 0:
            text = f"handoff {job.handoff_id} waited too long for free blocks here"
            raise WentWrong(EXPIRED, HandoffExpired(text))
        try:
            await pair.link.read(remote[skip:], local[skip:], timeout_s)
        except TransferError as error:
            raise WentWrong(TRANSFER, error) from error
        pool = self._engine.kv_pool
        assert pool is not None, "a link needs a pool"
        return (len(local) - skip) * pool.layout.block_bytes

    async def _hear(
        self, job: Job, said: asyncio.Future[T | LaunchError], timeout_s: float, cause: str
    ) -> T:
        """Wait for what the prefill worker says, an abort, or the deadline."""
        await asyncio.wait(
            (said, job.aborted),
            timeout=max(timeout_s, 0.0),
            return_when=asyncio.FIRST_COMPLETED,
        )
        if job.aborted.done():
            raise Aborted
        peer_id = job.pair.peer_id if job.pair is not None else "?"
        if not said.done():
            text = (
                f"handoff {job.handoff_id}: prefill worker {peer_id} was silent for {timeout_s:.1f} s; "
                "does it stand still, or is its queue long? Add prefill workers, or give it more time "
                "with --prefill-timeout-s or --handoff-min-timeout-s"
            )
            raise WentWrong(cause, HandoffExpired(text))
        result = said.result()
        if isinstance(result, LaunchError):
            raise WentWrong(LOST if isinstance(result, PeerLost) else REFUSED, result)
        return result

    def _time_first_token(self, job: Job, queue_s: float, compute_s: float) -> None:
        """Note the phases once the first token is out; ``queue_s`` is the prefill worker's own."""
        brought_s = now_s()
        if not job.handed_over:
            queue_s = max(0.0, job.offered_s - job.arrived_s - compute_s)
        transfer_s = brought_s - job.offered_s

        def told() -> None:
            self._meters.first_token(queue_s, compute_s, transfer_s, now_s() - brought_s)

        if not job.probe:
            job.out.on_first = told

    def _give_up(self, job: Job, reason: str) -> None:
        """Tell the prefill worker that its blocks are not read (any more)."""
        if job.asked and job.pair is not None and not job.released.done():
            peer = job.pair.peer
            if peer is not None:
                self._send(peer, CancelHandoff(job.handoff_id, reason))

    def _say(self, pair: Pair, message: Message) -> None:
        try:
            if pair.peer is None:
                raise PeerLost(f"prefill worker {pair.peer_id}: {pair.reason}")
            pair.peer.send(message)
        except PeerLost as error:
            raise WentWrong(LOST, error) from error

    def _send(self, peer: Peer, message: Message) -> None:
        try:
            peer.send(message)
        except PeerLost:
            return  # what depended on it is told by pair_lost

    async def close(self) -> None:
        """End every request that is not decoding; no byte moves afterwards."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
