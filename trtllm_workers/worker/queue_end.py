"""How a worker takes part in the prefill queue: opens it and makes the end that its role has."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trtllm_workers.config.outside import NatsLogin
from trtllm_workers.engines.base import ENGINE_NATIVE, Engine
from trtllm_workers.errors import StartError
from trtllm_workers.observe.status import read_status
from trtllm_workers.planes.base import RequestPlane
from trtllm_workers.planes.queue import ACK_WAIT_S, WorkQueue
from trtllm_workers.planes.queue_nats import QueueSpec, open_nats_queue, queue_name
from trtllm_workers.transfer.base import KvTransport
from trtllm_workers.types import EngineInfo, Role
from trtllm_workers.worker.prefill_fill import Filler
from trtllm_workers.worker.prefill_puller import PrefillPuller
from trtllm_workers.worker.queued_prefill import FenceTimes, QueuedPrefills
from trtllm_workers.worker.service import WorkerService

# Decode removes what it does not want any more; this is for jobs of a decode worker that died.
_AGE_MARGIN_S = 10.0
_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class PrefillQueue:
    """Which queue to use. ``max_size`` 0: no limit.

    Without ``servers`` a server tells its URL in ``status_file`` within ``start_timeout_s``.
    """

    login: NatsLogin
    namespace: str
    model: str
    servers: Sequence[str] = ()
    status_file: Path | None = None
    start_timeout_s: float = 60.0
    max_size: int = 0
    storage: Literal["file", "memory"] = "file"


async def open_prefill_queue(
    wanted: PrefillQueue, role: Role, *, worker_id: str, prefill_timeout_s: float
) -> WorkQueue:
    """Connect to NATS and make the queue of this deployment and model. Raises ConfigError, StartError."""
    servers = wanted.servers or [await _told(wanted.status_file, wanted.start_timeout_s)]
    spec = QueueSpec(
        queue_name("trtllm", "prefill", wanted.namespace, wanted.model),
        max_items=wanted.max_size,
        max_age_s=prefill_timeout_s + _AGE_MARGIN_S,
        storage=wanted.storage,
    )
    return await open_nats_queue(
        servers, wanted.login, spec, name=worker_id, decides=role is Role.DECODE
    )


async def _told(status_file: Path | None, timeout_s: float) -> str:
    """Return the URL that a server of this run tells once it listens."""
    assert status_file is not None, "without servers there is a file that names one"
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                status = read_status(status_file)
                if status is not None and status.step == "listening":
                    return status.detail
                await asyncio.sleep(_LOOK_S)  # files of another process have no event here
    except TimeoutError as error:
        raise StartError(
            f"the NATS server of this run did not listen within {timeout_s:g} s ({status_file})"
        ) from error


def join_queue(
    service: WorkerService,
    queue: WorkQueue,
    role: Role,
    plane: RequestPlane,
    engine: Engine,
    info: EngineInfo,
    transports: Sequence[KvTransport],
    *,
    prefill_timeout_s: float,
    fence: FenceTimes = FenceTimes(),  # noqa: B008 - frozen
    ack_wait_s: float = ACK_WAIT_S,
) -> None:
    """Begin to put or to take jobs; ``service.close`` ends that."""
    if role is Role.PREFILL:
        filler = Filler(engine, transports, info.block_size)
        filler.media = service.media
        service.use_queue(
            PrefillPuller(
                queue,
                plane,
                engine,
                info,
                filler,
                service.prefills,
                service.meters,
                ack_wait_s=ack_wait_s,
            )
        )
        return
    assert service.decodes is not None, "only prefill and decode workers use a queue"
    native = info.kv_transport == ENGINE_NATIVE
    service.use_queue(
        QueuedPrefills(
            queue,
            plane.address,
            lambda: [transport.card() for transport in transports],
            service.meters,
            prefill_timeout_s=prefill_timeout_s,
            fence=fence,
            on_granted=service.decodes.granted if native else None,
        )
    )
