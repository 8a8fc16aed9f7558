"""An engine that is only eyes: it loads a vision tower and no language model (role encode)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from trtllm_workers.engines.base import (
    Deliver,
    DeliverPrefilled,
    DeliverReservation,
    EngineOptions,
    ImageEncoder,
)
from trtllm_workers.engines.event_log import KvEventLog
from trtllm_workers.engines.torch.eyes import Eyes, load_eyes
from trtllm_workers.errors import (
    EngineDead,
    EngineError,
    LaunchError,
    NotSupported,
    StartError,
)
from trtllm_workers.observe.logs import get_logger
from trtllm_workers.transfer.base import KvPool
from trtllm_workers.transfer.media_store import MediaStore
from trtllm_workers.types import (
    EngineInfo,
    EngineStats,
    GenerateRequest,
    KvEvent,
    TokenChunk,
)

log = get_logger(__name__)


class _Stopped(Exception):
    """``close`` was called while the tower was loading."""


class EncodingEngine:
    """See ``engines/base.py: Engine``. It refuses every request: all it has to give is its ``encoder``."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._events = KvEventLog()
        self._loading: asyncio.Future[Eyes] | None = None
        self._stopping = threading.Event()
        self._eyes: Eyes | None = None
        self._closed = False

    async def start(self) -> EngineInfo:
        if self._closed or self._loading is not None:
            raise EngineDead("this engine was started or closed before; build another")
        if not self._options.encodes:
            raise StartError("an engine that neither generates nor encodes has nothing to do")
        thread = ThreadPoolExecutor(1, thread_name_prefix="torch-encoder-loading")
        self._loading = asyncio.get_running_loop().run_in_executor(thread, self._load)
        try:
            # Shielded: the thread ends by itself, and ``close`` waits for that.
            self._eyes = await asyncio.shield(self._loading)
        finally:
            thread.shutdown(wait=False)
        return self._eyes.info

    def _load(self) -> Eyes:
        options = self._options
        try:
            return load_eyes(
                options.model_path,
                options.config,
                self._progress,
                options.media,
            )
        except LaunchError:
            raise
        except _Stopped:
            raise StartError("the engine was closed while it was loading") from None
        except Exception as error:  # the thread's border: start() raises it
            log.error("loading failed", exc_info=True)
            raise StartError(f"the vision tower could not be loaded: {error!r}") from error

    def _progress(self, share: float) -> None:
        if self._stopping.is_set():
            raise _Stopped
        self._options.on_progress(share)

    def submit(self, request: GenerateRequest, deliver: Deliver) -> None:
        self._refuse(request)

    def prefill(self, request: GenerateRequest, deliver: DeliverPrefilled) -> None:
        self._refuse(request)

    def reserve(self, request: GenerateRequest, deliver: DeliverReservation) -> None:
        self._refuse(request)

    def prefill_reserved(
        self, request_id: str, num_filled_blocks: int, deliver: DeliverPrefilled
    ) -> None:
        raise EngineError(f"request {request_id}: nothing is reserved in an engine that encodes")

    def resume(
        self, request_id: str, first: TokenChunk | None, deliver: Deliver, opaque: bytes = b""
    ) -> None:
        raise EngineError(f"request {request_id}: nothing is reserved in an engine that encodes")

    def abort(self, request_id: str) -> None:
        """Do nothing: no request was ever taken."""

    def release(self, request_id: str) -> None:
        """Do nothing: no request was ever taken."""

    @property
    def kv_pool(self) -> KvPool | None:
        return None

    @property
    def media_store(self) -> MediaStore | None:
        return None if self._eyes is None else self._eyes.vision.store

    @property
    def encoder(self) -> ImageEncoder | None:
        return None if self._eyes is None else self._eyes.vision.encoder

    async def holdings(self) -> Mapping[str, int]:
        return {}

    def kv_events(self) -> AsyncIterator[KvEvent]:
        return self._events.follow()

    def stats(self) -> EngineStats:
        return EngineStats()

    async def died(self) -> EngineDead:
        # Nothing runs here that could die: an image that cannot be encoded fails alone.
        await asyncio.get_running_loop().create_future()
        raise AssertionError  # nobody settles it

    async def close(self) -> None:
        self._closed = True
        self._stopping.set()
        if self._loading is not None:
            await asyncio.wait([self._loading])
        self._eyes = None
        self._events.close()

    def _refuse(self, request: GenerateRequest) -> None:
        if self._closed or self._eyes is None:
            state = "is closed" if self._closed else "has not started"
            raise EngineDead(f"request {request.request_id}: the torch engine {state}")
        raise NotSupported(
            f"request {request.request_id}: this worker only encodes images; send prompts to another"
        )
