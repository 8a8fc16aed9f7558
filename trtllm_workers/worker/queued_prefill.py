"""The decode worker's side of the prefill queue: put a job, grant it, wait until it is filled.

A job, as seen from here::

    waiting ──FillAsk──▶ granted ──Filled──▶ done
       ▲                    │ FillStopped, or the writer is lost and the fence time is over
       └────────────────────┘

While a job is granted one prefill worker may write into the request's blocks, so they stay reserved,
and nobody computes into them: not another prefill worker, and not this one. Whoever wants them back
(abort, deadline) asks the writer to stop and waits for its word. A writer that is lost cannot give it;
then the wait is as long as it may take until it has noticed the loss too and has stopped.

With engines that move their own KV nobody writes: who is granted a job makes an Offer, as if it had been
asked directly, and the queue is left.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import structlog

from trtllm_workers.errors import (
    HandoffExpired,
    HandoffRefused,
    PeerLost,
    QueueAway,
    QueueFull,
    TransferError,
    error_for_code,
)
from trtllm_workers.planes.base import Peer
from trtllm_workers.planes.messages import (
    FillAnswer,
    FillAsk,
    FillCancel,
    Filled,
    FillGrant,
    FillKeep,
    FillKept,
    FillRefused,
    FillStopped,
    Message,
    PrefillJob,
)
from trtllm_workers.planes.queue import WorkQueue
from trtllm_workers.types import Address, Reservation, TransportCard
from trtllm_workers.worker.handoff_job import (
    NO_PREFILL,
    PREFILL_TIMEOUT,
    QUEUE_AWAY,
    QUEUE_FULL,
    REFUSED,
    TRANSFER,
    Aborted,
    Job,
    WentWrong,
    now_s,
    settle,
)
from trtllm_workers.worker.handoff_meters import HandoffMeters
from trtllm_workers.worker.pairs import READY, Pair, Pairs

log = structlog.get_logger(__name__)

JOB_VERSION = 1
_GONE = -1.0
_LOOK_S = 0.5  # how often a waiting request sees whether anybody is left to do it
_DEPTH_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class FenceTimes:
    """How long blocks stay untouched after their writer was lost, in seconds.

    * ``ended_s``: the writer's side ended the connection, so its process is gone or ends its writes now;
      what its kernel had sent already is in our memory long before.
    * ``silent_s``: we ended it, or the writer was silent. It may believe for as long as a mesh waits for
      a silent peer (10 s, looked at every 2 s) that all is well, and write.
    * ``stop_s``: a writer that was asked to stop has said so by then, or is treated as silent; longer
      than a single write may take (``prefill_puller.WRITE_TIMEOUT_S``).
    * ``lonely_s``: a job that no prefill worker could take for so long is computed here.
    """

    ended_s: float = 1.0
    silent_s: float = 15.0
    stop_s: float = 30.0
    lonely_s: float = 2.0


@dataclass(slots=True, eq=False)
class _Grant:
    """Leave to write. ``over`` resolves once it is certain that nothing is written any more."""

    peer: Peer
    pair: Pair
    over: asyncio.Future[None]
    fence: asyncio.TimerHandle | None = None


@dataclass(slots=True, eq=False)
class _Entry:
    """One job. ``result`` is what came of it; ``closing``: it is not wanted any more."""

    job: Job
    reservation: Reservation
    put_s: float
    deadline_s: float
    result: asyncio.Future[Filled | WentWrong | None]  # None: an Offer will come
    grant: _Grant | None = None
    num_grants: int = 0
    closing: bool = False
    lonely_since_s: float | None = field(default=None)


class QueuedPrefills:
    """Jobs of one decode worker. ``address`` and ``cards`` are this worker's.

    ``on_granted`` is given with engines that move their own KV: it is told who will make the Offer.
    """

    def __init__(
        self,
        queue: WorkQueue,
        address: Address,
        cards: Callable[[], Sequence[TransportCard]],
        meters: HandoffMeters,
        *,
        prefill_timeout_s: float,
        fence: FenceTimes = FenceTimes(),
        on_granted: Callable[[Job, Pair], None] | None = None,
    ) -> None:
        self._queue = queue
        self._address = address
        self._cards = cards
        self._meters = meters
        self._timeout_s = prefill_timeout_s
        self._fence = fence
        self._on_granted = on_granted
        self._entries: dict[str, _Entry] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.pairs: Pairs | None = None
        self._keep(self._watch_depth())

    @property
    def num_open(self) -> int:
        """Nothing of its own: each job stands for a stream."""
        return 0

    @property
    def request_ids(self) -> frozenset[str]:
        """None: the desk owns the requests."""
        return frozenset()

    # --- the story -----------------------------------------------------------------------------

    async def bring(self, job: Job, reservation: Reservation) -> Filled | None:
        """Have a reserved request's blocks filled by whoever takes the job; return what came with it.

        None: an Offer will come from who has taken the job, in place of bytes.
        When it returns or raises, nobody writes into the blocks any more. Raises WentWrong and Aborted.
        """
        self._require_somebody(job)
        now = now_s()
        entry = _Entry(
            job,
            reservation,
            now,
            now + self._timeout_s,
            asyncio.get_running_loop().create_future(),
        )
        self._entries[job.handoff_id] = entry
        handle: int | None = None
        try:
            handle = await self._put(entry)
            return await self._wait(entry)
        except asyncio.CancelledError:
            # This worker ends: its pool is not given to anybody, and goes after the transports.
            self._cancel(entry, "shutdown")
            raise
        except BaseException as wrong:
            self._meters.queue_job(_outcome(wrong))
            await self._recall(entry, str(wrong) or type(wrong).__name__)
            raise
        finally:
            entry.closing = True
            del self._entries[job.handoff_id]
            # Otherwise it goes when its taker acknowledges it.
            if handle is not None and not _is_done(entry):
                self._keep(self._queue.remove(handle))

    async def _put(self, entry: _Entry) -> int:
        job, reservation = entry.job, entry.reservation
        body = PrefillJob(
            JOB_VERSION,
            job.handoff_id,
            self._address,
            len(job.request.prompt_token_ids),
            reservation.num_cached_blocks,
            self._timeout_s,
            time.time(),
        )
        try:
            return await self._queue.put(msgspec.msgpack.encode(body))
        except QueueFull as error:
            raise WentWrong(QUEUE_FULL, error) from error
        except QueueAway as error:
            raise WentWrong(QUEUE_AWAY, error) from error

    async def _wait(self, entry: _Entry) -> Filled | None:
        job = entry.job
        while True:
            left_s = entry.deadline_s - now_s()
            await asyncio.wait(
                (entry.result, job.aborted),
                timeout=max(min(left_s, _LOOK_S), 0.0),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if job.aborted.done():
                raise Aborted
            if entry.result.done():
                result = entry.result.result()
                if isinstance(result, WentWrong):
                    raise result
                self._meters.queue_job("filled" if result is not None else "granted")
                return result
            if left_s <= 0:
                raise WentWrong(PREFILL_TIMEOUT, self._too_late(entry))
            self._look_around(entry)

    def _too_late(self, entry: _Entry) -> HandoffExpired:
        grant = entry.grant
        what = f"is with prefill worker {grant.pair.peer_id}" if grant else "waits for a taker"
        return HandoffExpired(
            f"job {entry.job.handoff_id} of the prefill queue still {what} after {self._timeout_s:g} s; "
            "add prefill workers, bound the queue with --max-prefill-queue-size, or give it more time "
            "with --prefill-timeout-s"
        )

    def _look_around(self, entry: _Entry) -> None:
        """Raise WentWrong once nobody could take the job for too long."""
        request = entry.job.request
        if entry.grant is not None or (self.pairs and self.pairs.any_can_take(request)):
            entry.lonely_since_s = None
            return
        if entry.lonely_since_s is None:
            entry.lonely_since_s = now_s()
        elif now_s() - entry.lonely_since_s >= self._fence.lonely_s:
            self._require_somebody(entry.job)

    def _require_somebody(self, job: Job) -> None:
        if self.pairs is None or not self.pairs.any_can_take(job.request):
            missing = self.pairs.missing if self.pairs is not None else "it is stopping"
            raise WentWrong(NO_PREFILL, HandoffRefused(f"no prefill worker: {missing}"))

    # --- the fence -----------------------------------------------------------------------------

    async def _recall(self, entry: _Entry, reason: str) -> None:
        """Return once nobody writes into the blocks any more."""
        entry.closing = True
        grant = entry.grant
        if grant is None:
            return
        self._cancel(entry, reason)
        await asyncio.wait((grant.over,), timeout=self._fence.stop_s)
        if not grant.over.done():
            log.error(
                "a prefill worker does not say that it has stopped writing",
                peer=grant.pair.peer_id,
                request_id=entry.job.request.request_id,
                waited_s=self._fence.stop_s,
            )
            await asyncio.wait((grant.over,), timeout=self._fence.silent_s)

    def _cancel(self, entry: _Entry, reason: str) -> None:
        entry.closing = True
        if entry.grant is not None:
            self._send(entry.grant.peer, FillCancel(entry.job.handoff_id, reason))

    def _end_grant(self, entry: _Entry, grant: _Grant) -> None:
        if grant.fence is not None:
            grant.fence.cancel()
        if entry.grant is grant:
            entry.grant = None
        settle(grant.over, None)

    # --- news from prefill workers -------------------------------------------------------------

    def on_message(self, peer: Peer, message: Message) -> bool:
        """Take a message of the prefill queue; False when it is none."""
        if isinstance(message, FillAsk):
            self._send(peer, self._answer(peer, message.job))
        elif isinstance(message, FillKeep):
            self._send(peer, FillKept(message.job, self._granted(peer, message.job) is not None))
        elif isinstance(message, Filled):
            self._filled(peer, message)
        elif isinstance(message, FillStopped):
            self._stopped(peer, message)
        else:
            return False
        return True

    def _answer(self, peer: Peer, job_id: str) -> FillGrant | FillRefused:
        entry = self._entries.get(job_id)
        if entry is None or entry.closing or entry.result.done():
            return FillRefused(job_id, _GONE, "it is done or not wanted any more")
        pair = self.pairs.of(peer) if self.pairs is not None else None
        if pair is None or pair.state != READY:  # one that drains still does what it has taken
            why = pair.reason if pair is not None else "it is unknown here"
            return FillRefused(job_id, 0.2, f"the pair is not ready: {why}")
        request = entry.job.request
        if not pair.can_take(request):
            return FillRefused(job_id, 0.2, "that prefill worker cannot compute this request")
        if entry.grant is not None:
            return FillRefused(job_id, 1.0, f"prefill worker {entry.grant.pair.peer_id} has it")
        now = now_s()
        timeout_s = entry.deadline_s - now
        if timeout_s <= 0:
            return FillRefused(job_id, _GONE, "its time is over")
        if self._on_granted is not None:
            self._on_granted(entry.job, pair)
            entry.result.set_result(None)
        else:
            over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            entry.grant = _Grant(peer, pair, over)
        if not entry.num_grants:
            self._meters.queue_wait(now - entry.put_s)
        entry.num_grants += 1
        reservation = entry.reservation
        return FillGrant(
            job_id,
            request,
            reservation.block_ids,
            reservation.num_cached_blocks,
            list(self._cards()),
            timeout_s,
        )

    def _granted(self, peer: Peer, job_id: str) -> _Entry | None:
        """Return the job that ``peer`` may write for now."""
        entry = self._entries.get(job_id)
        if entry is None or entry.grant is None or entry.grant.peer is not peer:
            return None
        return entry

    def _filled(self, peer: Peer, message: Filled) -> None:
        entry = self._granted(peer, message.job)
        valid = entry is not None and not entry.closing and not entry.result.done()
        self._send(peer, FillAnswer(message.job, valid))
        if entry is None or entry.grant is None:
            return
        grant = entry.grant
        self._end_grant(entry, grant)
        if valid:
            if message.num_bytes:
                grant.pair.moved(message.num_bytes, message.seconds)
            entry.job.pair = grant.pair
            entry.result.set_result(message)

    def _stopped(self, peer: Peer, message: FillStopped) -> None:
        entry = self._granted(peer, message.job)
        if entry is None or entry.grant is None:
            return
        self._end_grant(entry, entry.grant)
        if not message.code:
            if not entry.closing:
                self._meters.queue_job("given_back")
        elif not entry.result.done():
            error = error_for_code(message.code, message.message)
            cause = TRANSFER if isinstance(error, TransferError) else REFUSED
            entry.result.set_result(WentWrong(cause, error))

    def peer_lost(self, peer: Peer, error: PeerLost) -> None:
        """Take notice that a prefill worker is gone: keep its blocks for the fence time."""
        fence_s = self._fence.ended_s if error.ended_there else self._fence.silent_s
        loop = asyncio.get_running_loop()
        for entry in self._entries.values():
            grant = entry.grant
            if grant is None or grant.peer is not peer or grant.fence is not None:
                continue
            self._meters.queue_job("lost")
            log.warning(
                "prefill worker lost while it filled blocks; they wait for the fence",
                peer=grant.pair.peer_id,
                request_id=entry.job.request.request_id,
                fence_s=fence_s,
                reason=str(error),
            )
            grant.fence = loop.call_later(fence_s, self._end_grant, entry, grant)

    # --- the rest ------------------------------------------------------------------------------

    async def _watch_depth(self) -> None:
        while True:
            try:
                self._meters.queue_depth = await self._queue.depth()
            except QueueAway:
                self._meters.queue_depth = -1
            await asyncio.sleep(_DEPTH_EVERY_S)

    def _send(self, peer: Peer, message: Message) -> None:
        try:
            peer.send(message)
        except PeerLost:
            return  # what depended on it is told by peer_lost

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def drain(self) -> None:
        """Nothing changes: requests that are here go on."""

    def abort_all(self) -> None:
        """Nothing to do: the desk aborts its requests."""

    async def close(self) -> None:
        """End what runs here; the desk has ended its requests before."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._queue.close()


def _is_done(entry: _Entry) -> bool:
    return entry.result.done() and not isinstance(entry.result.result(), WentWrong)


def _outcome(wrong: BaseException) -> str:
    if isinstance(wrong, WentWrong):
        return wrong.cause
    return "aborted" if isinstance(wrong, Aborted) else type(wrong).__name__


def read_job(body: bytes) -> PrefillJob | None:
    """Return what a queue's item says, or None for one that another version or a stranger put."""
    try:
        job = msgspec.msgpack.decode(body, type=PrefillJob)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return job if job.version == JOB_VERSION else None
