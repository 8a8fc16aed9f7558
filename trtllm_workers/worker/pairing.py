"""What disaggregated roles need besides a desk: a transport, pairs, and their reports. Knows no request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

import structlog

from trtllm_workers.engines.base import ENGINE_NATIVE, Engine
from trtllm_workers.errors import TransportUnavailable
from trtllm_workers.observe.status import PairStatus, StatusFile
from trtllm_workers.planes.base import Discovery, RequestPlane
from trtllm_workers.transfer.base import KvTransport
from trtllm_workers.transfer.registry import start_transports
from trtllm_workers.types import EngineInfo, Role
from trtllm_workers.worker.canary import Canary, Verdict
from trtllm_workers.worker.pairs import READY, Pair, Pairs
from trtllm_workers.worker.service import WorkerService

log = structlog.get_logger(__name__)


async def open_kv_transports(
    wanted: str, role: Role, engine: Engine, info: EngineInfo, *, worker_id: str, host: str
) -> tuple[KvTransport, ...]:
    """Start the transports that a role needs; none for aggregated workers and engine-native KV.

    Raises TransportUnavailable, which says what is missing and what to install.
    """
    if role not in (Role.PREFILL, Role.DECODE) or info.kv_transport == ENGINE_NATIVE:
        return ()
    pool = engine.kv_pool
    if pool is None:
        raise TransportUnavailable(
            f"role {role} moves KV blocks, but this {info.engine} engine (device {info.device}) does not "
            "give its blocks to a transport; serve it with role aggregated"
        )
    transports = await start_transports(
        wanted, pool, peer_id=worker_id, host=host, on_notify=_no_notice
    )
    for transport in transports:
        log.info("KV transport started", transport=transport.name, wanted=wanted)
    return transports


def _no_notice(peer_id: str, message: bytes) -> None:
    """Nothing is announced by transports yet: handoffs are told on the request plane."""
    log.warning("unexpected notice of a transport", peer=peer_id, size=len(message))


@dataclass(slots=True)
class PairReports:
    """Tells ingresses and the launcher about pairs: at once on a change, but once per loop turn."""

    service: WorkerService
    status: StatusFile
    _scheduled: bool = False
    _was_ready: bool = False

    def changed(self) -> None:
        """Take notice of a change."""
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._scheduled = False
        pairs = self.service.pairs
        if pairs is None:
            return
        self.service.publish_stats()
        self.tell_status(pairs)

    def tell_status(self, pairs: Pairs) -> None:
        """Write the status file: the first ready pair makes the worker ready for good."""
        self.status.report_pairs(pair_statuses(pairs))
        if self._was_ready:
            return
        if pairs.num_ready:
            self._was_ready = True
            self.status.report("registered")
        else:
            self.status.report("pairing", detail=pairs.missing)


async def start_pairs(
    service: WorkerService,
    engine: Engine,
    info: EngineInfo,
    plane: RequestPlane,
    discovery: Discovery,
    transports: Sequence[KvTransport],
    status: StatusFile,
    stack: AsyncExitStack,
    *,
    worker_id: str,
    model: str,
    canary_interval_s: float,
) -> Canary:
    """Let a decode worker find its prefill workers; ``stack`` ends that.

    Returns the canary, whose probes are requests that nobody else stands for.
    """
    canary = Canary(worker_id, engine, info)
    reports = PairReports(service, status)
    pairs = Pairs(
        plane,
        discovery,
        transports,
        info,
        model,
        gate=partial(_gate, service, canary),
        changed=reports.changed,
        canary_interval_s=canary_interval_s,
    )
    service.use_pairs(pairs)
    await stack.enter_async_context(pairs.running())
    reports.changed()
    return canary


async def _gate(service: WorkerService, canary: Canary, pair: Pair) -> tuple[Verdict, str]:
    desk = service.decodes
    assert desk is not None, "only decode workers have pairs"
    verdict, reason = await canary.compare(partial(desk.probe, pair))
    if verdict is Verdict.PASSED and pair.link is not None and pair.state != READY:
        # What the probe moved shows little but latency.
        pair.rate.note(*await canary.measure(pair.link, pair.num_blocks))
    return verdict, reason


def pair_statuses(pairs: Pairs) -> list[PairStatus]:
    """Return the pairs as the status file tells them."""
    return [
        PairStatus(
            peer=one.peer.peer_id,
            transport=one.transport,
            wire=one.wire,
            state=one.state,
            gb_per_s=round(one.gb_per_s, 3),
            num_handoffs=one.num_handoffs,
            reason=one.reason,
        )
        for one in pairs.stats()
    ]


def owned_by(service: WorkerService, canary: Canary | None) -> Callable[[], set[str]]:
    """Return what tells the ledger which requests somebody stands for."""

    def owned() -> set[str]:
        return service.owned() | (canary.running if canary is not None else set())

    return owned
