"""The prefill worker's side of handoffs: compute, pin, offer, release. Moves no bytes itself.

Whoever wants the blocks reads them; this side only guarantees that they stay what they are until
the reader says it is done, cancels, is lost, or the deadline is over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import msgspec
import structlog

from trtllm_workers.engines.base import Engine
from trtllm_workers.errors import HandoffExpired, LaunchError, PeerLost, Unavailable
from trtllm_workers.planes.base import Peer
from trtllm_workers.planes.messages import (
    Abort,
    CancelHandoff,
    Fetched,
    Message,
    Offer,
    PrefillAsk,
    PrefillRefused,
    Released,
    Submit,
)
from trtllm_workers.transfer.handoff import Handoff, HandoffState, Rate, handoff_timeout_s
from trtllm_workers.types import FinishReason, GenerateRequest, Prefilled, TokenChunk
from trtllm_workers.worker.handoff_meters import HandoffMeters
from trtllm_workers.worker.media_desk import MediaDesk
from trtllm_workers.worker.outbox import StreamOut

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class HandoffLimits:
    """Deadlines in seconds; see ``transfer/handoff.py: handoff_timeout_s``."""

    min_timeout_s: float = 5.0
    max_timeout_s: float = 120.0
    prefill_timeout_s: float = 60.0


def _nothing() -> None:
    """Tell nobody."""


@dataclass(slots=True, eq=False)
class _Entry:
    """One prompt on its way: computing while ``handoff`` is None, then offered to ``peer``.

    ``submit`` and ``out`` belong to prefill_first: what to pass on, and where errors go. ``computed`` and
    ``ended`` are called once each at most, ``ended`` always.
    """

    handoff_id: str
    request_id: str
    peer: Peer
    submit: Submit | None = None
    out: StreamOut | None = None
    handoff: Handoff | None = None
    timer: asyncio.TimerHandle | None = None
    cancelled: str = ""
    computed: Callable[[], None] = _nothing
    ended: Callable[[], None] = _nothing


class PrefillDesk:
    """Prompts that this worker computes for decode workers."""

    def __init__(
        self, worker_id: str, engine: Engine, meters: HandoffMeters, limits: HandoffLimits
    ) -> None:
        self._worker_id = worker_id
        self._engine = engine
        self._meters = meters
        self._limits = limits
        self._entries: dict[str, _Entry] = {}  # by the engine's request id
        self._rates: dict[tuple[str, str], Rate] = {}  # by decode worker
        self.draining = ""
        self.media: MediaDesk | None = None  # of an engine that takes images

    @property
    def num_open(self) -> int:
        """Prompts that have not been handed over or given up."""
        return len(self._entries)

    @property
    def request_ids(self) -> Collection[str]:
        """The engine's requests that it may hold blocks for on our behalf."""
        return self._entries.keys()

    # --- asked ---------------------------------------------------------------------------------

    def ask(self, peer: Peer, message: PrefillAsk) -> None:
        """Begin a prefill that a decode worker asks for (decode_first)."""
        entry = _Entry(message.handoff, _key(peer, message.handoff), peer)
        if self.draining:
            why = f"prefill worker {self._worker_id} is draining: {self.draining}"
            self._refuse(entry, Unavailable(why))
            return
        self._begin(entry, message.request)

    def do_job(
        self,
        peer: Peer,
        message: PrefillAsk,
        computed: Callable[[], None],
        ended: Callable[[], None],
    ) -> None:
        """Begin a prefill taken from the prefill queue, also while draining.

        ``computed`` is called when the engine is done with it, ``ended`` when nothing is held any more.
        """
        entry = _Entry(message.handoff, _key(peer, message.handoff), peer)
        entry.computed, entry.ended = computed, ended
        self._begin(entry, message.request)

    def hand_over(
        self, peer: Peer, submit: Submit, request: GenerateRequest, out: StreamOut
    ) -> None:
        """Begin a prefill whose stream goes on at decode worker ``peer`` (prefill_first)."""
        entry = _Entry(request.request_id, request.request_id, peer, submit, out)
        self._begin(entry, request)

    def _begin(self, entry: _Entry, request: GenerateRequest) -> None:
        if entry.request_id in self._entries:
            self._refuse(entry, LaunchError(f"handoff {entry.handoff_id} is under way already"))
            return
        self._entries[entry.request_id] = entry
        request = msgspec.structs.replace(request, request_id=entry.request_id)
        if request.media and self.media is not None:
            aborted = Prefilled(first=TokenChunk((), FinishReason.ABORT))
            self.media.when_here(
                request,
                begin=partial(self._compute, entry, request),
                failed=partial(self._refuse, entry),
                aborted=partial(self._prefilled, entry, aborted),
            )
            return
        self._compute(entry, request)

    def _compute(self, entry: _Entry, request: GenerateRequest) -> None:
        try:
            self._engine.prefill(request, partial(self._prefilled, entry))
        except LaunchError as error:
            self._refuse(entry, error)

    def _refuse(self, entry: _Entry, error: LaunchError) -> None:
        if self._entries.get(entry.request_id) is entry:
            del self._entries[entry.request_id]
        entry.ended()
        code = error.code or "engine_error"
        if entry.out is not None:
            entry.out.fail(code, str(error), error.param)
        else:
            self._send(entry.peer, PrefillRefused(entry.handoff_id, code, str(error), error.param))

    # --- computed ------------------------------------------------------------------------------

    def _prefilled(self, entry: _Entry, prefilled: Prefilled) -> None:
        """Take the engine's result; called exactly once per prompt."""
        first = prefilled.first
        entry.computed()
        if first.finish_reason is not None:
            self._entries.pop(entry.request_id, None)
            entry.ended()
            self._ended_at_once(entry, prefilled)
            return
        if entry.cancelled:
            self._end(entry, HandoffState.RELEASED, entry.cancelled)
            return
        layout = self._engine.kv_pool.layout if self._engine.kv_pool is not None else None
        num_bytes = len(prefilled.block_ids) * (layout.block_bytes if layout else 0)
        address = entry.peer.address
        rate = self._rates.get((address.peer_id, address.incarnation))
        # An engine that moves its own KV has a deadline of its own, and no other one holds.
        timeout_s = prefilled.hold_s or handoff_timeout_s(
            num_bytes,
            rate.bytes_per_s if rate is not None and rate.telling else 0.0,
            min_timeout_s=self._limits.min_timeout_s,
            max_timeout_s=self._limits.max_timeout_s,
        )
        entry.handoff = Handoff(
            entry.handoff_id,
            address.peer_id,
            len(prefilled.block_ids),
            num_bytes,
            offered_s=time.monotonic(),
            timeout_s=timeout_s,
        )
        self._meters.offered += 1
        entry.timer = asyncio.get_running_loop().call_later(timeout_s, self._expire, entry)
        try:
            entry.peer.send(Offer(entry.handoff_id, prefilled, timeout_s, entry.submit))
        except PeerLost as error:
            self._lost(entry, error)

    def _ended_at_once(self, entry: _Entry, prefilled: Prefilled) -> None:
        """Pass on a first token that is also the last, or a failure; nothing is pinned."""
        first = prefilled.first
        if entry.out is not None:
            entry.out(first)
        elif first.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._send(entry.peer, Offer(entry.handoff_id, prefilled, 0.0))
        elif not entry.cancelled:
            code = first.error_code or Unavailable.code or ""
            why = first.error_message or f"prefill worker {self._worker_id} gave the prompt up"
            refused = PrefillRefused(entry.handoff_id, code, why, first.error_param)
            self._send(entry.peer, refused)

    # --- offered -------------------------------------------------------------------------------

    def fetching(self, peer: Peer, handoff_id: str) -> None:
        """Note that the decode worker begins to read."""
        entry = self._find(peer, handoff_id)
        if entry is None or entry.handoff is None:
            return  # it will hear so when it says that it is done
        try:
            entry.handoff.fetch(time.monotonic())
        except HandoffExpired:
            self._expire(entry)
        else:
            self._meters.fetching += 1

    def fetched(self, peer: Peer, message: Fetched) -> None:
        """Release the blocks and say whether they were pinned until now."""
        entry = self._find(peer, message.handoff)
        valid = entry is not None and entry.handoff is not None and entry.handoff.pinned
        self._send(peer, Released(message.handoff, valid))
        if entry is None or not valid:
            return
        key = (peer.address.peer_id, peer.address.incarnation)
        if message.num_bytes:
            self._rates.setdefault(key, Rate()).note(message.num_bytes, message.seconds)
        self._end(entry, HandoffState.RELEASED, "fetched")

    def cancel(self, peer: Peer, message: CancelHandoff) -> None:
        """Give up a handoff that the decode worker does not want any more."""
        entry = self._find(peer, message.handoff)
        if entry is None:
            return
        if entry.handoff is None:
            entry.cancelled = message.reason
            self._stop(entry)
        else:
            self._end(entry, HandoffState.RELEASED, message.reason)

    def abort(self, request_id: str) -> bool:
        """Abort a stream of an ingress (prefill_first); False when it is not here.

        Once offered the decode worker decides: it may be reading, and it hears of the abort on the
        connection that brought it the offer, so never before it.
        """
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        if entry.handoff is None:
            self._stop(entry)
        elif entry.submit is not None:
            self._send(entry.peer, Abort([entry.submit.stream], entry.submit.reply_to))
        return True

    def peer_lost(self, peer: Peer, error: PeerLost) -> None:
        """Give up what was meant for a decode worker that is gone."""
        for entry in [entry for entry in self._entries.values() if entry.peer is peer]:
            self._lost(entry, error)
        address = peer.address
        self._rates.pop((address.peer_id, address.incarnation), None)

    def _lost(self, entry: _Entry, error: PeerLost) -> None:
        why = f"decode worker {entry.peer.address.peer_id} was lost: {error}"
        if entry.handoff is None:
            entry.cancelled = "peer_lost"
            if entry.out is not None:
                entry.out.fail(PeerLost.code or "", why)
                entry.out = None
            self._stop(entry)
            return
        fetching = entry.handoff.state is HandoffState.FETCHING
        if entry.out is not None and not fetching:
            # It may never have heard of the stream; if it has, the ingress aborts it there.
            entry.out.fail(PeerLost.code or "", why)
        self._end(entry, HandoffState.RELEASED, "peer_lost")

    def _expire(self, entry: _Entry) -> None:
        handoff = entry.handoff
        assert handoff is not None, "only offers have a deadline"
        now_s = time.monotonic()
        if not handoff.expire(max(now_s, handoff.deadline_s)):
            return
        error = handoff.expired(now_s)
        log.warning("handoff expired", request_id=entry.request_id, reason=str(error))
        self._send(entry.peer, Released(entry.handoff_id, False))
        if entry.out is not None:
            entry.out.fail(HandoffExpired.code or "", str(error))
        self._end(entry, HandoffState.EXPIRED, "deadline")

    def _end(self, entry: _Entry, state: HandoffState, cause: str) -> None:
        """Unpin the blocks; with prefill_first the stream is the decode worker's now."""
        if self._entries.get(entry.request_id) is entry:
            del self._entries[entry.request_id]
        if entry.timer is not None:
            entry.timer.cancel()
        if entry.handoff is not None:
            entry.handoff.release(cause)
        if entry.out is not None:
            entry.out.hand_over()
        self._meters.ended(str(state), cause)
        self._engine.release(entry.request_id)
        entry.ended()

    # --- the end -------------------------------------------------------------------------------

    def abort_all(self) -> None:
        """Give up every prompt: the worker is going down."""
        for entry in list(self._entries.values()):
            if entry.handoff is None:
                self._stop(entry)
            else:
                self._send(entry.peer, Released(entry.handoff_id, False))
                if entry.out is not None:
                    why = f"prefill worker {self._worker_id} is going down"
                    entry.out.fail(Unavailable.code or "", why)
                self._end(entry, HandoffState.RELEASED, "shutdown")

    def _stop(self, entry: _Entry) -> None:
        """Abort a prompt that is not computed; its end is told to ``_prefilled``."""
        if self.media is None or not self.media.abort(entry.request_id):
            self._engine.abort(entry.request_id)

    def _find(self, peer: Peer, handoff_id: str) -> _Entry | None:
        for request_id in (_key(peer, handoff_id), handoff_id):
            entry = self._entries.get(request_id)
            if entry is not None and entry.peer.address == peer.address:
                return entry
        return None

    def _send(self, peer: Peer, message: Message) -> None:
        try:
            peer.send(message)
        except PeerLost:
            return  # peer_lost tells the rest


def _key(peer: Peer, handoff_id: str) -> str:
    """Return the engine's id for a handoff asked for by ``peer``: no two peers can collide."""
    return f"{peer.address.peer_id}.{peer.address.incarnation}/{handoff_id}"
