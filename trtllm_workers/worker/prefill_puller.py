"""The prefill worker's side of the prefill queue: takes jobs as the engine has room, and owns each.

What one job is, step by step, is ``prefill_fill.py``'s; here is who begins it, who stops it, and what
the queue is told: ``ack`` when nobody needs it any more, ``nak`` when somebody else should do it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine
from typing import Any

import structlog

from trtllm_workers.engines.base import Engine
from trtllm_workers.errors import PeerLost, PlaneError, StaleIncarnation
from trtllm_workers.planes.base import Peer, RequestPlane
from trtllm_workers.planes.messages import (
    FillAnswer,
    FillAsk,
    FillCancel,
    FillGrant,
    FillKept,
    FillRefused,
    FillStopped,
    Message,
    PairReady,
    PrefillAsk,
)
from trtllm_workers.planes.queue import ACK_WAIT_S, Item, WorkQueue
from trtllm_workers.types import EngineInfo
from trtllm_workers.worker.handoff_job import now_s, settle
from trtllm_workers.worker.handoff_meters import HandoffMeters
from trtllm_workers.worker.prefill_desk import PrefillDesk
from trtllm_workers.worker.prefill_fill import Failed, Fill, Filler, Void
from trtllm_workers.worker.queued_prefill import read_job

log = structlog.get_logger(__name__)

_TAKE_S = 5.0  # one question to the queue lasts so long
_RETRY_S = 1.0
_CONNECT_TIMEOUT_S = 3.0
_ANSWER_TIMEOUT_S = 10.0
# So much work is taken beside what one step can compute, so that the engine never waits for the queue.
_STEPS_AHEAD = 2
# After such a part of the ack wait a decode worker that was lost may be back, and its fence down.
_LOST_RETRY_SHARE = 0.4

SHUTDOWN, LOST = "this prefill worker ends", "lost"


class PrefillPuller:
    """Jobs of the prefill queue that this worker does. Ends what it started in ``close``."""

    def __init__(
        self,
        queue: WorkQueue,
        plane: RequestPlane,
        engine: Engine,
        info: EngineInfo,
        filler: Filler,
        desk: PrefillDesk,
        meters: HandoffMeters,
        *,
        ack_wait_s: float = ACK_WAIT_S,
    ) -> None:
        self._queue = queue
        self._plane = plane
        self._engine = engine
        self._filler = filler
        self._desk = desk
        self._meters = meters
        self._max_tokens = _STEPS_AHEAD * info.max_num_tokens
        self._max_jobs = info.max_batch_size
        self._block_size = info.block_size
        self._ack_wait_s = ack_wait_s
        self._lost_retry_s = ack_wait_s * _LOST_RETRY_SHARE
        self._fills: dict[tuple[str, str, str], Fill] = {}  # by decode worker and job
        self._ready_for: set[tuple[str, str]] = set()  # decode workers that take our blocks
        self._room = asyncio.Event()
        self._draining = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._pulling = self._keep(self._pull())
        self._telling = self._keep(self._tell_working())

    @property
    def num_open(self) -> int:
        """Jobs that were taken and are not done."""
        return len(self._fills)

    @property
    def request_ids(self) -> Collection[str]:
        """The engine's requests that it may hold blocks for on our behalf."""
        return {fill.request_id for fill in self._fills.values()}

    # --- taking --------------------------------------------------------------------------------

    async def _pull(self) -> None:
        while not self._draining:
            while not self._has_room:
                self._room.clear()
                await self._room.wait()
            try:
                item = await self._queue.take(_TAKE_S)
            except Exception:  # the border: whatever it was, prompts must go on coming
                log.exception("taking from the prefill queue failed")
                await asyncio.sleep(_RETRY_S)
                continue
            if item is None:
                continue
            if self._draining:
                await item.nak()
            else:
                await self._begin(item)

    @property
    def _has_room(self) -> bool:
        """Whether the engine could begin another job soon, and anybody would let it."""
        if not self._ready_for:
            return False
        uncomputed = sum(fill.num_uncomputed for fill in self._fills.values())
        return uncomputed < self._max_tokens and len(self._fills) < self._max_jobs

    async def _begin(self, item: Item) -> None:
        job = read_job(item.body)
        if job is None:
            log.warning("the prefill queue holds something that is no job of this version")
            await item.ack()
            return
        if item.num_deliveries > 1:
            self._meters.redelivered += 1
        key = (job.decode.peer_id, job.decode.incarnation, job.job)
        if key in self._fills:  # word that we work on it came too late
            await item.nak(self._ack_wait_s)
            return
        fill = self._fills[key] = Fill(job, item, self._block_size)
        self._keep(self._do(key, fill))

    # --- one job -------------------------------------------------------------------------------

    async def _do(self, key: tuple[str, str, str], fill: Fill) -> None:
        try:
            await self._story(fill)
        except Exception:  # the border: one job must not end the others
            log.exception("a job of the prefill queue failed", request_id=fill.request_id)
            if fill.peer is not None:
                self._send(fill.peer, FillStopped(fill.job.job, "engine_error", "internal error"))
            await fill.item.ack()
        finally:
            self._engine.abort(fill.request_id)  # whatever phase it is in; unknown is fine
            del self._fills[key]
            self._room.set()

    async def _story(self, fill: Fill) -> None:
        job, item = fill.job, fill.item
        try:
            fill.peer = await self._plane.connect(job.decode, _CONNECT_TIMEOUT_S)
            fill.peer.send(FillAsk(job.job))
        except StaleIncarnation:  # restarted: what it wanted went with it
            await item.ack()
            return
        except PlaneError as error:
            await self._unreachable(fill, error)
            return
        answer = await fill.hear(fill.answered, _ANSWER_TIMEOUT_S)
        if isinstance(answer, FillRefused):
            if answer.retry_s < 0:
                await item.ack()
            else:
                await item.nak(answer.retry_s)
            return
        if answer is None:  # lost, stopped, or silent: whatever was granted ends with this word
            self._send(fill.peer, FillStopped(job.job))
            await item.nak(self._lost_retry_s if fill.stop_reason != SHUTDOWN else 0.0)
            return
        await self._fill(fill, fill.peer, answer)

    async def _fill(self, fill: Fill, peer: Peer, grant: FillGrant) -> None:
        """Do the work unless it is stopped; say how it ended once no byte moves any more."""
        item, job_id = fill.item, fill.job.job
        if self._engine.kv_pool is None:
            await self._offer(fill, peer, grant)
            return
        fill.until_s = now_s() + grant.timeout_s
        working = asyncio.create_task(self._filler.fill(fill, peer, grant, self._room.set))
        try:
            await asyncio.wait(
                (working, fill.stop), timeout=grant.timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            if not working.done():
                working.cancel()
            await asyncio.wait((working,))
        if working.cancelled():
            self._engine.abort(fill.request_id)
            self._send(peer, FillStopped(job_id))
            if fill.stop_reason == SHUTDOWN:
                await item.nak()
            elif fill.stop_reason == LOST:
                await item.nak(self._lost_retry_s)
            else:  # decode does not want it any more, or its time is over there too
                await item.ack()
            return
        wrong = working.exception()
        if wrong is None:
            self._meters.filled += 1
            answer = await fill.hear(fill.taken, _ANSWER_TIMEOUT_S)
            if answer is not None or fill.stop_reason not in ("", LOST, SHUTDOWN):
                await item.ack()
            else:  # it may have to be done again; decode knows, and will say
                await item.nak(self._lost_retry_s)
        elif isinstance(wrong, Void):
            self._send(peer, FillStopped(job_id))
            await item.nak(self._lost_retry_s)
        elif isinstance(wrong, Failed):
            log.warning(
                "a prompt of the prefill queue failed",
                request_id=fill.request_id,
                reason=str(wrong),
            )
            self._send(peer, FillStopped(job_id, wrong.code, str(wrong)))
            await item.ack()
        else:
            raise wrong

    async def _offer(self, fill: Fill, peer: Peer, grant: FillGrant) -> None:
        """Let an engine that moves its own KV do it: decode fetches from an Offer, as ever."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def computed() -> None:
            fill.num_uncomputed = 0
            self._room.set()

        ask = PrefillAsk(fill.job.job, grant.request)
        self._desk.do_job(peer, ask, computed, lambda: settle(ended, None))
        await asyncio.wait((ended, fill.stop), return_when=asyncio.FIRST_COMPLETED)
        # However it ended: decode has it, or computes it itself by now.
        await fill.item.ack()

    async def _unreachable(self, fill: Fill, error: PlaneError) -> None:
        """Let another one try while decode may want it; then it is nobody's."""
        job = fill.job
        log.info("decode worker of a job not reached", decode=str(job.decode), reason=str(error))
        if fill.item.num_deliveries * self._lost_retry_s > job.timeout_s:
            await fill.item.ack()
        else:
            await fill.item.nak(self._lost_retry_s)

    # --- news from decode workers --------------------------------------------------------------

    def on_message(self, peer: Peer, message: Message) -> bool:
        """Take a message of the prefill queue; False when it is none."""
        if isinstance(message, PairReady):
            self._note_ready((peer.address.peer_id, peer.address.incarnation), message.ready)
            return True
        if not isinstance(message, FillGrant | FillRefused | FillKept | FillAnswer | FillCancel):
            return False
        address = peer.address
        fill = self._fills.get((address.peer_id, address.incarnation, message.job))
        if fill is None or fill.peer is not peer:
            if isinstance(message, FillGrant):  # it came too late; nobody here writes
                self._send(peer, FillStopped(message.job))
        elif isinstance(message, FillGrant | FillRefused):
            fill.answered.set(message)
        elif isinstance(message, FillKept):
            fill.kept.set(message.valid)
        elif isinstance(message, FillAnswer):
            fill.taken.set(message.valid)
        else:
            fill.end(message.reason)
        return True

    def _note_ready(self, decode: tuple[str, str], ready: bool) -> None:
        (self._ready_for.add if ready else self._ready_for.discard)(decode)
        self._room.set()

    def peer_lost(self, peer: Peer, error: PeerLost) -> None:
        """Stop writing to a decode worker that is gone, at once."""
        if self._plane.peer(peer.address) is None:  # two may have connected to each other at once
            self._note_ready((peer.address.peer_id, peer.address.incarnation), False)
        for fill in self._fills.values():
            if fill.peer is peer:
                fill.end(LOST)
        self._filler.forget(peer)

    # --- the end -------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take nothing more; what was taken is done."""
        if not self._draining:
            self._draining = True
            self._pulling.cancel()
            self._keep(self._queue.stop_taking())

    def abort_all(self) -> None:
        """Give every job back, so that another worker does it."""
        for fill in self._fills.values():
            fill.end(SHUTDOWN)

    async def close(self) -> None:
        """Give back what is under way, once no byte of it moves; then end."""
        self.drain()
        self.abort_all()
        self._telling.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._filler.close()
        await self._queue.close()

    async def _tell_working(self) -> None:
        """Keep what we work on from being given to somebody else."""
        while True:
            await asyncio.sleep(self._ack_wait_s / 3)
            for fill in list(self._fills.values()):
                await fill.item.working()

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _send(self, peer: Peer, message: Message) -> None:
        try:
            peer.send(message)
        except PeerLost:
            return  # peer_lost tells the rest
