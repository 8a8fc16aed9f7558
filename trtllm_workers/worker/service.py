"""A worker's desk: frames in, engine calls out, tokens back. Starts and registers nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec
import structlog

from trtllm_workers.engines.base import Engine
from trtllm_workers.errors import (
    LaunchError,
    LayoutMismatch,
    NotSupported,
    PeerLost,
    Unavailable,
)
from trtllm_workers.planes.base import Peer, RequestPlane
from trtllm_workers.planes.media_messages import EncodeAsk, EncodeFailed
from trtllm_workers.planes.messages import (
    Abort,
    CancelHandoff,
    Drain,
    EventsAsk,
    Fetched,
    Fetching,
    Message,
    Offer,
    PairAnswer,
    PairAsk,
    PairReady,
    PrefillAsk,
    PrefillRefused,
    Released,
    StatsAsk,
    StopAsk,
    Submit,
    WorkerStats,
)
from trtllm_workers.transfer.base import KvTransport, check_layouts
from trtllm_workers.types import Address, EngineInfo, Role, TransportCard
from trtllm_workers.worker.decode_desk import DecodeDesk
from trtllm_workers.worker.encode_desk import EncodeDesk
from trtllm_workers.worker.handoff_meters import HandoffMeters
from trtllm_workers.worker.kv_feeds import KvFeeds
from trtllm_workers.worker.media_desk import MediaDesk
from trtllm_workers.worker.media_meters import MediaMeters
from trtllm_workers.worker.outbox import ReplyLine, StreamOut
from trtllm_workers.worker.pairs import Pairs, check_models
from trtllm_workers.worker.prefill_desk import HandoffLimits, PrefillDesk
from trtllm_workers.worker.prefill_puller import PrefillPuller
from trtllm_workers.worker.queued_prefill import QueuedPrefills
from trtllm_workers.worker.roles import ROLES, Desks

log = structlog.get_logger(__name__)


class WorkerService:
    """Serves one engine to any number of ingresses and partner workers.

    Request ids are the caller's and may collide between ingresses, so the engine sees
    ``<ingress>/<stream>/<request id>``, which cannot.
    """

    def __init__(
        self,
        worker_id: str,
        role: Role,
        engine: Engine,
        *,
        limits: HandoffLimits = HandoffLimits(),  # noqa: B008 - frozen
        on_stop_ask: Callable[[StopAsk], None] | None = None,
    ) -> None:
        self._worker_id = worker_id
        self._role = role
        self._engine = engine
        self._limits = limits
        self._on_stop_ask = on_stop_ask
        self._kv_feeds = KvFeeds(engine)
        self.meters = HandoffMeters()
        self.media_meters = MediaMeters()
        self.prefills = PrefillDesk(worker_id, engine, self.meters, limits)
        self.decodes: DecodeDesk | None = None
        self.pairs: Pairs | None = None
        self.queue_end: PrefillPuller | QueuedPrefills | None = None
        self.media: MediaDesk | None = None
        self.encodes: EncodeDesk | None = None
        self._desks: Desks | None = None
        self._plane: RequestPlane | None = None
        self._info: EngineInfo | None = None
        self._transports: Sequence[KvTransport] = ()
        self._lines: dict[Address, ReplyLine] = {}
        self._watchers: dict[Address, Peer] = {}
        self._draining = ""
        self._num_frames = 0
        self._num_given = 0

    def attach(
        self,
        plane: RequestPlane,
        info: EngineInfo | None = None,
        transports: Sequence[KvTransport] = (),
        *,
        max_local_prefill_length: int = 0,
    ) -> None:
        """Use this plane for answers; its ``on_message`` and ``on_lost`` are ours.

        ``info`` and ``transports`` of the started engine are needed by the roles prefill and decode.
        """
        self._plane, self._info, self._transports = plane, info, transports
        if self._role is Role.DECODE:
            assert info is not None, "a decode worker knows its engine"
            self.decodes = DecodeDesk(
                self._engine,
                info,
                self.meters,
                max_local_prefill_length=max_local_prefill_length,
                prefill_timeout_s=self._limits.prefill_timeout_s,
            )
        self._desks = Desks(self._engine, plane, self.prefills, self.decodes)

    def use_pairs(self, pairs: Pairs) -> None:
        """Take prefill workers from here."""
        assert self.decodes is not None, "only decode workers have pairs"
        self.pairs = self.decodes.pairs = pairs
        if isinstance(self.queue_end, QueuedPrefills):
            self.queue_end.pairs = pairs

    def use_media(self, media: MediaDesk, encodes: EncodeDesk | None) -> None:
        """Take prompts with images from now on, after ``attach``; and make items of them, with ``encodes``."""
        assert self._desks is not None, "attach() comes first"
        self.media = self.prefills.media = media
        self.encodes = encodes
        if self.decodes is not None:
            self.decodes.media = media
        self._desks = replace(self._desks, media=media)

    def use_queue(self, end: PrefillPuller | QueuedPrefills) -> None:
        """Take part in the prefill queue, and close that end with this service."""
        self.queue_end = end
        if isinstance(end, QueuedPrefills):
            assert self.decodes is not None, "only decode workers put jobs"
            self.decodes.queued, end.pairs = end, self.pairs

    @property
    def num_streams(self) -> int:
        """Streams, handoffs, jobs of the prefill queue, and images in use elsewhere, that have not ended."""
        streams = sum(len(line.streams) for line in self._lines.values())
        jobs = self.queue_end.num_open if self.queue_end is not None else 0
        media = self.media.num_open if self.media is not None else 0
        encodes = self.encodes.num_open if self.encodes is not None else 0
        return streams + self.prefills.num_open + jobs + media + encodes

    @property
    def progress(self) -> int:
        """Grows with everything that only a working engine gives: tokens, ends of answers, prompts' KV."""
        return self._num_given + self.meters.offered + self.meters.filled

    def owned(self) -> set[str]:
        """Return the engine's requests that some stream or handoff here stands for."""
        owned = {out.request_id for line in self._lines.values() for out in line.streams.values()}
        owned.update(self.prefills.request_ids)
        if self.decodes is not None:
            owned.update(self.decodes.request_ids)
        if self.queue_end is not None:
            owned.update(self.queue_end.request_ids)
        return owned

    # --- messages ------------------------------------------------------------------------------

    def on_message(self, peer: Peer, message: Message) -> None:
        """Take one message from an ingress or a partner worker."""
        if isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, Abort):
            self._abort(message)
        elif isinstance(message, StatsAsk):
            self._watchers[peer.address] = peer
            self._tell_stats(peer, self._stats(with_phases=False))
        elif isinstance(message, EventsAsk):
            self._kv_feeds.ask(peer, message)
        elif isinstance(message, StopAsk):
            self._asked_to_stop(peer, message)
        elif isinstance(message, Drain):
            if self.pairs is not None:
                self.pairs.drains(peer, message.reason)
        elif not (self._on_handoff(peer, message) or self._on_media(peer, message)):
            log.warning("unexpected message", kind=type(message).__name__, peer=str(peer.address))

    def _on_handoff(self, peer: Peer, message: Message) -> bool:
        """Take a message between prefill and decode; False when it is none or not for this role."""
        if self.queue_end is not None and self.queue_end.on_message(peer, message):
            return True
        if self._role is Role.PREFILL:
            if isinstance(message, PrefillAsk):
                self.prefills.ask(peer, message)
            elif isinstance(message, Fetching):
                self.prefills.fetching(peer, message.handoff)
            elif isinstance(message, Fetched):
                self.prefills.fetched(peer, message)
            elif isinstance(message, CancelHandoff):
                self.prefills.cancel(peer, message)
            elif isinstance(message, PairAsk):
                peer.send(self._pair_answer(peer, message))
            elif isinstance(message, PairReady):
                pass  # only those who take jobs from a queue need to know
            else:
                return False
            return True
        desk, pairs = self.decodes, self.pairs
        if desk is None or pairs is None:
            return False
        if isinstance(message, Offer):
            if message.submit is None:
                desk.offered(peer, message)
            else:
                self._take_over(peer, message, message.submit)
        elif isinstance(message, PrefillRefused):
            desk.refused(peer, message)
        elif isinstance(message, Released):
            desk.released(peer, message.handoff, valid=message.valid)
        elif isinstance(message, PairAnswer):
            pairs.answered(peer, message)
        else:
            return False
        return True

    def _on_media(self, peer: Peer, message: Message) -> bool:
        """Take a message about images; False when it is none or not for this worker."""
        if self.encodes is not None:
            if self.encodes.on_message(peer, message):
                return True
        elif isinstance(message, EncodeAsk):
            why = f"worker {self._worker_id} makes no embeddings of images"
            peer.send(EncodeFailed(message.ask, NotSupported.code or "", why))
            return True
        return self.media is not None and self.media.on_message(peer, message)

    def on_lost(self, peer: Peer, error: PeerLost) -> None:
        """Give up what depended on a lost connection."""
        watcher = self._watchers.get(peer.address)
        if watcher is peer:
            del self._watchers[peer.address]
        self._kv_feeds.forget(peer.address)
        self.prefills.peer_lost(peer, error)
        if self.media is not None:
            self.media.peer_lost(peer, error)
        if self.encodes is not None:
            self.encodes.peer_lost(peer)
        if self.queue_end is not None:
            self.queue_end.peer_lost(peer, error)
        if self.pairs is not None and self.decodes is not None:
            pair = self.pairs.peer_lost(peer, error)
            if pair is not None:
                self.decodes.pair_lost(pair, error)
        line = self._lines.get(peer.address)
        if line is not None and self._plane is not None and self._plane.peer(peer.address) is None:
            line.lost(str(error))

    # --- requests ------------------------------------------------------------------------------

    def _open(self, submit: Submit) -> StreamOut:
        line = self._lines.get(submit.reply_to)
        if line is None:
            assert self._plane is not None, "attach() comes before the first message"
            line = ReplyLine(self._plane, submit.reply_to, self._abandon, self._count_frame)
            self._lines[submit.reply_to] = line
        name = f"{submit.reply_to.peer_id}/{submit.stream}/{submit.request.request_id}"
        return line.open(submit.stream, name)

    def _submit(self, message: Submit) -> None:
        out = self._open(message)
        if self._draining:
            why = f"worker {self._worker_id} is draining: {self._draining}"
            out.fail(Unavailable.code or "", why)
            return
        assert self._desks is not None, "attach() comes before the first message"
        request = msgspec.structs.replace(message.request, request_id=out.request_id)
        try:
            ROLES[self._role](self._desks, message, request, out)
        except LaunchError as error:
            out.fail(error.code or "engine_error", str(error), error.param)
        except Exception as error:
            log.exception("request failed in the worker", request_id=message.request.request_id)
            out.fail("engine_error", f"internal error in worker {self._worker_id}: {error!r}")

    def _take_over(self, peer: Peer, offer: Offer, submit: Submit) -> None:
        """Go on with a stream that a prefill worker hands over, also while draining."""
        assert self.decodes is not None, "only decode workers take over"
        out = self._open(submit)
        request = msgspec.structs.replace(submit.request, request_id=out.request_id)
        self.decodes.take_over(peer, offer, request, out)

    def _abort(self, message: Abort) -> None:
        line = self._lines.get(message.reply_to)
        if line is None:
            return
        for stream in message.streams:
            out = line.streams.get(stream)
            if out is not None:
                self._abort_request(out.request_id)

    def _abort_request(self, request_id: str) -> None:
        if self.prefills.abort(request_id):
            return
        if self.media is not None and self.media.abort(request_id):
            return
        if self.decodes is None or not self.decodes.abort(request_id):
            self._engine.abort(request_id)

    def _abandon(self, line: ReplyLine) -> None:
        self._lines.pop(line.address, None)
        for out in list(line.streams.values()):
            self._abort_request(out.request_id)

    def _count_frame(self, made_by_engine: bool) -> None:
        self._num_frames += 1
        self._num_given += made_by_engine

    # --- pairs ---------------------------------------------------------------------------------

    def _pair_answer(self, peer: Peer, ask: PairAsk) -> PairAnswer:
        assert self._info is not None, "a prefill worker knows its engine"
        ours = {transport.name: transport for transport in self._transports}
        cards: list[TransportCard] = []
        try:
            check_models(self._info.model_id, ask.model_id, peer.address.peer_id)
            for theirs in ask.cards:
                transport = ours.get(theirs.transport)
                if transport is not None:
                    cards.append(transport.card())
                    check_layouts(cards[-1].layout, theirs.layout, peer.address.peer_id)
            if not cards and (ours or ask.cards):
                told = ", ".join(card.transport for card in ask.cards)
                raise LayoutMismatch(
                    f"prefill worker {self._worker_id} moves KV by "
                    f"{', '.join(ours) or 'its engine'}, {peer.address.peer_id} by "
                    f"{told or 'its engine'}; give both the same engine and --kv-transport"
                )
        except LaunchError as error:
            log.error("decode worker refused", peer=str(peer.address), reason=str(error))
            return PairAnswer(self._info.model_id, [], error.code or "", str(error))
        return PairAnswer(self._info.model_id, cards)

    # --- stats, drain, end ---------------------------------------------------------------------

    def _stats(self, *, with_phases: bool = True) -> WorkerStats:
        pairs = self.pairs.stats() if self.pairs is not None else []
        # Phases are told once: in the round that goes to everybody.
        handoffs = self.meters.take() if with_phases else self.meters.counts()
        store = self._engine.media_store if self.media is not None else None
        return WorkerStats(
            self._worker_id,
            self._engine.stats(),
            self._num_frames,
            handoffs,
            pairs,
            self.media_meters.stats(store) if store is not None else None,
        )

    def publish_stats(self) -> None:
        """Tell everybody who asked the engine's load and the handoffs."""
        if not self._watchers:
            return
        message = self._stats()
        for peer in list(self._watchers.values()):
            self._tell_stats(peer, message)

    def _tell_stats(self, peer: Peer, message: WorkerStats) -> None:
        try:
            peer.send(message)
        except PeerLost:
            return  # on_lost tells the rest

    def drain(self, reason: str) -> None:
        """Take no new request; running ones go on. Every connected process is told at once."""
        self._draining = self.prefills.draining = reason
        if self.encodes is not None:
            self.encodes.drain(reason)
        if self.queue_end is not None:
            self.queue_end.drain()
        for peer in self._plane.peers() if self._plane is not None else ():
            try:
                peer.send(Drain(reason))
            except PeerLost:
                continue

    def _asked_to_stop(self, peer: Peer, message: StopAsk) -> None:
        if self._on_stop_ask is None:
            log.warning("a request to stop is not for this worker", peer=str(peer.address))
            return
        log.info("asked to stop", peer=str(peer.address), reason=message.reason)
        peer.send(Drain(message.reason))
        self._on_stop_ask(message)

    def abort_all(self) -> None:
        """Abort every stream."""
        self.prefills.abort_all()
        if self.queue_end is not None:
            self.queue_end.abort_all()
        for line in list(self._lines.values()):
            for out in list(line.streams.values()):
                self._abort_request(out.request_id)
        if self.encodes is not None:
            self.encodes.abort_all()
        if self.media is not None:
            self.media.abort_all()

    async def close(self) -> None:
        """Send what is gathered and forget the ingresses."""
        await self._kv_feeds.close()
        if self.decodes is not None:
            await self.decodes.close()
        if self.queue_end is not None:
            await self.queue_end.close()
        if self.encodes is not None:
            await self.encodes.close()
        if self.media is not None:
            await self.media.close()
        for line in list(self._lines.values()):
            await line.close()
        self._lines.clear()
