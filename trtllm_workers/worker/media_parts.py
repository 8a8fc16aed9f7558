"""What images need besides an engine: transports for their bytes, a loader, and the desks. Knows no request."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import cast

import msgspec
import structlog

from trtllm_workers.config.media import MediaSettings
from trtllm_workers.engines.base import Engine
from trtllm_workers.errors import ConfigError, TransportUnavailable
from trtllm_workers.planes.base import RequestPlane
from trtllm_workers.transfer.base import KvTransport
from trtllm_workers.transfer.media_store import MediaStore
from trtllm_workers.transfer.registry import start_transports
from trtllm_workers.types import EngineInfo, Role, VisionInfo
from trtllm_workers.worker.encode_desk import EncodeDesk
from trtllm_workers.worker.media_desk import MediaDesk
from trtllm_workers.worker.media_maker import ItemMaker, Loader
from trtllm_workers.worker.prefill_desk import HandoffLimits
from trtllm_workers.worker.service import WorkerService

log = structlog.get_logger(__name__)


def check_role(role: Role, engine: Engine, info: EngineInfo, model: str) -> None:
    """Raise ConfigError when a worker is to make embeddings of images with a model that has no images."""
    if role is not Role.ENCODE:
        return
    if info.vision is None or engine.media_store is None:
        raise ConfigError(
            f"model {model} ({info.model_path}) takes text only; role encode needs a model with a vision "
            "tower: serve a vision-language model, or leave the encode workers out",
            param="role",
        )
    if engine.encoder is None:
        raise ConfigError(
            f"engine {info.engine} makes no embeddings of images for model {model} ({info.model_path}); "
            "leave the encode workers out",
            param="role",
        )


async def open_media_transports(
    wanted: str, role: Role, engine: Engine, info: EngineInfo, *, worker_id: str, host: str
) -> tuple[KvTransport, ...]:
    """Start the transports that move images' bytes; none of a worker that takes text only.

    Raises TransportUnavailable, which says what is missing and what to install. An aggregated worker needs
    no other worker, so there it is tcp then, with a word in the log.
    """
    store = engine.media_store
    if store is None or info.vision is None:
        return ()
    try:
        transports = await _started(wanted, store, worker_id, host)
    except TransportUnavailable as error:
        if role is not Role.AGGREGATED:
            raise
        log.warning("images move by tcp between this worker and others", reason=str(error))
        transports = await _started("tcp", store, worker_id, host)
    for transport in transports:
        log.info("transport for images started", transport=transport.name, wanted=wanted)
    return transports


async def _started(
    wanted: str, store: MediaStore, worker_id: str, host: str
) -> tuple[KvTransport, ...]:
    return await start_transports(
        wanted, store.pool, peer_id=f"{worker_id}/media", host=host, on_notify=_no_notice
    )


def _no_notice(peer_id: str, message: bytes) -> None:
    """Nothing is announced by transports: reads are told on the request plane."""
    log.warning("unexpected notice of a transport", peer=peer_id, size=len(message))


def encodes_here(engine: Engine, info: EngineInfo) -> bool:
    """Whether this worker makes items of references."""
    return info.vision is not None and info.vision.encodes and engine.media_store is not None


def told_info(engine: Engine, info: EngineInfo) -> EngineInfo:
    """Return what others are told of the engine: ``encodes`` only where it is so."""
    if info.vision is None or info.vision.encodes == encodes_here(engine, info):
        return info
    vision = msgspec.structs.replace(info.vision, encodes=False)
    return msgspec.structs.replace(info, vision=vision)


def join_media(
    service: WorkerService,
    worker_id: str,
    engine: Engine,
    info: EngineInfo,
    plane: RequestPlane,
    transports: Sequence[KvTransport],
    settings: MediaSettings,
    limits: HandoffLimits,
    loader: Loader | None = None,
) -> None:
    """Let a service take images, if its engine does; ``service.close`` ends that.

    ``loader`` is the built-in one unless another is given.
    """
    store = engine.media_store
    if store is None or info.vision is None:
        return
    media = MediaDesk(
        worker_id,
        store,
        plane,
        transports,
        service.media_meters,
        min_timeout_s=limits.min_timeout_s,
        max_timeout_s=limits.max_timeout_s,
    )
    encodes: EncodeDesk | None = None
    if encodes_here(engine, info):
        assert info.vision is not None, "see encodes_here"
        maker = ItemMaker(
            loader or _built_in(settings, info.vision),
            store,
            engine.encoder,
            info.vision,
            service.media_meters,
        )
        encodes = EncodeDesk(
            worker_id,
            maker,
            store,
            plane.address,
            service.media_meters,
            max_items=settings.max_items,
        )
    service.use_media(media, encodes)


def _built_in(settings: MediaSettings, vision: VisionInfo) -> Loader:
    # By name: libraries for images and HTTP are imported by the workers that need them.
    module = importlib.import_module("trtllm_workers.media.loader")
    return cast("Loader", module.MediaLoader(settings, vision))
