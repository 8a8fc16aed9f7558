"""A decode worker's prefill workers: found, connected, checked, and taken in turns.

::

    checking ──gate passed──▶ ready ──▶ lost ──▶ checking …
       ├──layouts or models differ──▶ refused
       └──wrong tokens──▶ mismatch

``refused`` and ``mismatch`` last until that prefill worker is another one: its record must go. Knows
no request; what runs over a pair is ``decode_desk.py``'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

import structlog

from trtllm_workers.engines.base import ENGINE_NATIVE
from trtllm_workers.errors import (
    LaunchError,
    LayoutMismatch,
    PeerLost,
    TransferFailed,
    error_for_code,
)
from trtllm_workers.planes.base import Discovery, Peer, RequestPlane
from trtllm_workers.planes.messages import PairAnswer, PairAsk, PairReady, PairStats
from trtllm_workers.transfer.base import KvLink, KvTransport
from trtllm_workers.transfer.handoff import Rate
from trtllm_workers.types import (
    Address,
    EngineInfo,
    GenerateRequest,
    Role,
    TransportCard,
    WorkerRecord,
    WorkerState,
)
from trtllm_workers.worker.canary import Verdict

log = structlog.get_logger(__name__)

CHECKING, READY, REFUSED, MISMATCH, LOST = "checking", "ready", "refused", "mismatch", "lost"
FIRST_RETRY_S = 0.1
LAST_RETRY_S = 5.0
CONNECT_TIMEOUT_S = 10.0
TRY_TIMEOUT_S = 3.0  # for a transport behind which there is another one


class Pair:
    """One prefill worker as this decode worker sees it."""

    def __init__(self, record: WorkerRecord) -> None:
        self.record = record
        self.peer: Peer | None = None
        self.link: KvLink | None = None
        self.state = CHECKING
        self.reason = "not connected yet"
        self.draining = record.state is not WorkerState.READY
        self.told = ""  # the last trouble that was logged
        self.gone = False  # its record has left discovery; what runs goes on while it is connected
        self.lost = asyncio.Event()
        self.answer: asyncio.Future[PairAnswer] | None = None
        self.transport = ""
        self.wire = ""
        self.num_blocks = 0  # of the prefill worker's pool
        self.num_handoffs = 0
        self.num_bytes = 0
        self.seconds = 0.0
        self.rate = Rate()
        self.canaries = dict.fromkeys(Verdict, 0)

    @property
    def peer_id(self) -> str:
        """The prefill worker's name."""
        return self.record.worker_id

    @property
    def usable(self) -> bool:
        """Whether a prompt may be sent there."""
        return self.state == READY and not self.draining and not self.gone

    def can_take(self, request: GenerateRequest) -> bool:
        """Whether it has the request's adapter, and honours what its first token depends on."""
        engine = self.record.engine
        if request.lora and request.lora not in engine.loras:
            return False
        return request.sampling.guided is None or "guided" in engine.capabilities

    def moved(self, num_bytes: int, seconds: float) -> None:
        """Count one transfer; an engine that moves its own KV does not tell its size (0)."""
        self.num_handoffs += 1
        self.num_bytes += num_bytes
        self.seconds += seconds
        if num_bytes:
            self.rate.note(num_bytes, seconds)

    def stats(self) -> PairStats:
        """Return what there is to tell."""
        return PairStats(
            peer=self.record.address,
            transport=self.transport,
            wire=self.link.wire if self.link is not None else self.wire,
            state=self.state,
            reason=self.reason,
            num_handoffs=self.num_handoffs,
            num_bytes=self.num_bytes,
            seconds=self.seconds,
            gb_per_s=self.rate.bytes_per_s / 1e9,
            canary_passed=self.canaries[Verdict.PASSED],
            canary_failed=self.canaries[Verdict.FAILED],
            canary_mismatched=self.canaries[Verdict.MISMATCH],
        )


Gate = Callable[[Pair], Awaitable[tuple[Verdict, str]]]


class Pairs:
    """All pairs of one decode worker. Use ``running``: it owns the tasks.

    ``gate(pair)`` runs the correctness probe. ``changed`` is called after every change of a state.
    ``canary_interval_s`` 0: the gate runs once per connection.
    """

    def __init__(
        self,
        plane: RequestPlane,
        discovery: Discovery,
        transports: Sequence[KvTransport],
        info: EngineInfo,
        model: str,
        *,
        gate: Gate,
        changed: Callable[[], None],
        canary_interval_s: float,
    ) -> None:
        self._plane = plane
        self._discovery = discovery
        self._transports = transports
        self._info = info
        self._model = model
        self._gate = gate
        self._changed = changed
        self._canary_interval_s = canary_interval_s
        self._pairs: dict[tuple[str, str], Pair] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._turn = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Pairs]:
        """Follow discovery until the block ends."""
        watcher = asyncio.create_task(self._watch(), name="pairs-watch")
        try:
            yield self
        finally:
            tasks = [watcher, *self._tasks.values(), *self._ending]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def take(self, request: GenerateRequest, wish: Address | None = None) -> Pair | None:
        """Return a usable pair that can compute the prompt; None when there is none.

        That is the one at ``wish`` if it is usable, else they take turns.
        """
        if wish is not None:
            wished = self._pairs.get((wish.peer_id, wish.incarnation))
            if wished is not None and wished.usable and wished.can_take(request):
                return wished
        usable = [pair for pair in self._pairs.values() if pair.usable and pair.can_take(request)]
        if not usable:
            return None
        self._turn += 1
        return usable[self._turn % len(usable)]

    def any_can_take(self, request: GenerateRequest) -> bool:
        """Whether there is a usable pair that can compute the prompt."""
        return any(pair.usable and pair.can_take(request) for pair in self._pairs.values())

    def of(self, peer: Peer) -> Pair | None:
        """Return the pair at the other end of a connection."""
        address = peer.address
        return self._pairs.get((address.peer_id, address.incarnation))

    @property
    def num_ready(self) -> int:
        """Pairs whose gate has passed."""
        return sum(pair.state == READY and not pair.gone for pair in self._pairs.values())

    @property
    def missing(self) -> str:
        """Why no pair is ready, for people."""
        if not self._pairs:
            return f"no prefill worker of model '{self._model}' has registered"
        return "; ".join(
            f"prefill worker {pair.peer_id}: {pair.state}: {pair.reason}"
            for pair in self._pairs.values()
        )

    def stats(self) -> list[PairStats]:
        """Return what there is to tell about each pair."""
        return [pair.stats() for pair in self._pairs.values()]

    # --- news ----------------------------------------------------------------------------------

    def answered(self, peer: Peer, answer: PairAnswer) -> None:
        """Take a prefill worker's side of a pair."""
        pair = self.of(peer)
        if pair is not None and pair.answer is not None and not pair.answer.done():
            pair.answer.set_result(answer)

    def drains(self, peer: Peer, reason: str) -> None:
        """Take notice that a prefill worker takes nothing new."""
        pair = self.of(peer)
        if pair is not None and not pair.draining:
            pair.draining = True
            pair.reason = f"draining: {reason}"
            self._changed()

    def peer_lost(self, peer: Peer, error: PeerLost) -> Pair | None:
        """Take notice that a connection ended; return the pair that used it, if any."""
        pair = self.of(peer)
        if pair is None or pair.peer is not peer:
            return None
        pair.peer = None
        self._set(pair, LOST, str(error))
        pair.lost.set()
        if pair.answer is not None and not pair.answer.done():
            pair.answer.cancel()
        return pair

    # --- inside --------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            try:
                async for records in self._discovery.watch():
                    self._update(records)
                return  # discovery was closed
            except (LaunchError, OSError) as error:
                log.warning("discovery failed; the known pairs stay", error=str(error))
                await asyncio.sleep(LAST_RETRY_S)

    def _update(self, records: Collection[WorkerRecord]) -> None:
        fresh = {
            (record.worker_id, record.address.incarnation): record
            for record in records
            if record.role is Role.PREFILL and record.model == self._model
        }
        for key, pair in list(self._pairs.items()):
            if key not in fresh and not pair.gone:
                pair.gone = True
                if pair.peer is None or pair.state in (REFUSED, MISMATCH):
                    self._remove(key)
                self._changed()
        for key, record in fresh.items():
            known = self._pairs.get(key)
            if known is not None and known.gone:
                known.gone = False  # discovery had lost sight of it for a while
                self._changed()
            if known is None:
                pair = self._pairs[key] = Pair(record)
                self._tasks[key] = asyncio.create_task(self._follow(pair), name=f"pair-{key[0]}")
            elif record.state is not WorkerState.READY and not known.draining:
                known.draining = True
                self._changed()

    def _remove(self, key: tuple[str, str]) -> None:
        del self._pairs[key]
        task = self._tasks.pop(key)
        if task is not asyncio.current_task():
            task.cancel()
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _follow(self, pair: Pair) -> None:
        """Keep one pair for as long as its record lives, and then until its connection ends."""
        retry_s = FIRST_RETRY_S
        try:
            while True:
                try:
                    await self._connect(pair)
                    retry_s = FIRST_RETRY_S
                    await self._check_until_lost(pair)
                except LayoutMismatch as error:
                    self._set(pair, REFUSED, str(error))
                    log.error("prefill worker refused", peer=pair.peer_id, reason=str(error))
                    return
                except (LaunchError, OSError, TimeoutError, asyncio.CancelledError) as error:
                    task = asyncio.current_task()
                    if isinstance(error, asyncio.CancelledError) and (task and task.cancelling()):
                        raise
                    reason = str(error) or "no answer in time"
                    self._set(pair, LOST, reason)
                    if reason != pair.told:  # once for each cause, however often it is tried
                        pair.told = reason
                        log.warning("no way to a prefill worker yet", peer=pair.peer_id, why=reason)
                await self._unlink(pair)
                if pair.gone:
                    self._remove((pair.peer_id, pair.record.address.incarnation))
                    self._changed()
                    return
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, LAST_RETRY_S)
        except Exception:  # the border: one pair's fault must not end the others
            log.exception("pair failed", peer=pair.peer_id)
            self._set(pair, REFUSED, "internal error; see the log")
        finally:
            await self._unlink(pair)

    async def _connect(self, pair: Pair) -> None:
        self._set(pair, CHECKING, "connecting")
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            pair.lost.clear()
            pair.peer = await self._plane.connect(pair.record.address, CONNECT_TIMEOUT_S)
            cards = [transport.card() for transport in self._transports]
            pair.answer = asyncio.get_running_loop().create_future()
            pair.peer.send(PairAsk(self._info.model_id, cards))
            answer = await pair.answer
        if answer.error_code:
            raise error_for_code(answer.error_code, answer.error_message)
        check_models(self._info.model_id, answer.model_id, pair.peer_id)
        if self._transports:
            await self._link(pair, {card.transport: card for card in answer.cards})
        else:
            self._pair_natively(pair)

    def _pair_natively(self, pair: Pair) -> None:
        """Note how two engines that move their own KV do it. Raises LayoutMismatch when they differ."""
        ours, theirs = self._info.kv_wire, pair.record.engine.kv_wire
        if ours and theirs and ours != theirs:
            raise LayoutMismatch(
                f"{pair.peer_id} moves KV by {theirs}, this worker by {ours}, as their logs say; give "
                "both the same --kv-transport and the same TRTLLM_USE_*_KVCACHE variables"
            )
        pair.transport, pair.wire = ENGINE_NATIVE, ours or theirs

    async def _link(self, pair: Pair, cards: Mapping[str, TransportCard]) -> None:
        """Connect by the best transport that both have and that has a wire between them."""
        common = [transport for transport in self._transports if transport.name in cards]
        for transport in common:
            try:
                timeout_s = CONNECT_TIMEOUT_S if transport is common[-1] else TRY_TIMEOUT_S
                pair.link = await transport.connect(cards[transport.name], timeout_s)
            except TransferFailed as error:
                if transport is common[-1]:
                    raise
                log.warning(
                    "KV transport does not reach a prefill worker; trying the next",
                    peer=pair.peer_id,
                    transport=transport.name,
                    reason=str(error),
                )
            else:
                pair.transport, pair.wire = transport.name, pair.link.wire
                pair.num_blocks = cards[transport.name].num_blocks
                return

    async def _check_until_lost(self, pair: Pair) -> None:
        retry_s = FIRST_RETRY_S
        while True:
            verdict, reason = await self._gate(pair)
            if pair.lost.is_set():
                raise PeerLost(pair.reason)
            pair.canaries[verdict] += 1
            wait_s: float | None = self._canary_interval_s or None
            if verdict is Verdict.PASSED:
                if pair.state != READY:
                    self._tell_ready(pair)
                self._set(pair, READY, "")
                retry_s = FIRST_RETRY_S
            elif verdict is Verdict.MISMATCH:
                self._set(pair, MISMATCH, reason)
                log.error("prefill worker taken out: wrong tokens", peer=pair.peer_id, why=reason)
                wait_s = None
            else:
                log.warning(f"canary {verdict}", peer=pair.peer_id, reason=reason)
                if verdict is Verdict.FAILED or pair.state != READY:
                    self._set(pair, CHECKING, f"canary {verdict}: {reason}")
                    wait_s, retry_s = retry_s, min(2 * retry_s, LAST_RETRY_S)
            try:
                async with asyncio.timeout(wait_s):
                    await pair.lost.wait()
                raise PeerLost(pair.reason)
            except TimeoutError:
                continue

    def _tell_ready(self, pair: Pair) -> None:
        log.info(
            "prefill worker ready",
            peer=pair.peer_id,
            transport=pair.transport,
            wire=pair.link.wire if pair.link is not None else pair.wire,
            gb_per_s=round(pair.rate.bytes_per_s / 1e9, 3),
        )

    def _set(self, pair: Pair, state: str, reason: str) -> None:
        changed = (pair.state, pair.reason) != (state, reason)
        if (pair.state == READY) != (state == READY) and pair.peer is not None:
            with suppress(PeerLost):
                pair.peer.send(PairReady(state == READY))
        pair.state, pair.reason = state, reason
        if changed:
            self._changed()

    async def _unlink(self, pair: Pair) -> None:
        link, pair.link = pair.link, None
        if link is not None:
            await link.close()


def check_models(ours: str, theirs: str, peer_id: str) -> None:
    """Raise LayoutMismatch when two workers of one pair serve different models."""
    if ours != theirs:
        raise LayoutMismatch(
            f"{peer_id} serves model {theirs}, this worker {ours}; prefill and decode need the same "
            "checkpoint"
        )
