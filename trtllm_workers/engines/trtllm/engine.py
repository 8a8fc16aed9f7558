"""TensorRT-LLM behind the engine contract: loads it, follows its statistics and events, notices its death."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog

from trtllm_workers.config.hf_model import HfModel, read_hf_model
from trtllm_workers.config.vision_model import VisionModel, read_vision
from trtllm_workers.engines.base import (
    Deliver,
    DeliverPrefilled,
    DeliverReservation,
    EngineOptions,
    ImageEncoder,
    generate,
)
from trtllm_workers.engines.event_log import KvEventLog
from trtllm_workers.engines.trtllm.api import Api, load_api
from trtllm_workers.engines.trtllm.books import Books
from trtllm_workers.engines.trtllm.failures import in_words
from trtllm_workers.engines.trtllm.images import RgbEncoder, vision_of
from trtllm_workers.engines.trtllm.log_marker import LogMarker
from trtllm_workers.engines.trtllm.media_api import first_text, load_media_api
from trtllm_workers.engines.trtllm.media_prompts import MediaPrompts
from trtllm_workers.engines.trtllm.settings import (
    engine_info,
    read_options,
    require_role_settings,
    transceiver_of,
    transfer_timeout_s,
)
from trtllm_workers.engines.trtllm.streams import Streams
from trtllm_workers.engines.trtllm.tower import TowerEncoder
from trtllm_workers.errors import (
    ConfigError,
    EngineDead,
    EngineError,
    LaunchError,
    NotSupported,
)
from trtllm_workers.lint.engine_config import nested
from trtllm_workers.transfer.base import KvPool
from trtllm_workers.transfer.media_store import MediaStore, byte_store
from trtllm_workers.types import (
    EngineInfo,
    EngineStats,
    GenerateRequest,
    KvEvent,
    Role,
    SamplingParams,
    TokenChunk,
    VisionInfo,
)

log = structlog.get_logger(__name__)

_WARM_UP = "warm-up"
_DOUBT = "doubt"
_MARKER_TIMEOUT_S = 2.0
_DOUBT_TIMEOUT_S = 60.0
_SHUTDOWN_TIMEOUT_S = 30.0


def build(options: EngineOptions) -> TrtllmEngine:
    """Build an adapter; TensorRT-LLM is imported by ``start``."""
    return TrtllmEngine(options)


class TrtllmEngine:
    """See ``engines/base.py: Engine`` for the guarantees.

    TensorRT-LLM moves its own KV, so ``kv_pool`` is None. It has no call for its health: a request that
    fails for a reason of its own, several failures in a row with a probe that fails too, and the worker's
    watchdog are what ends it.

    Its input processor prepares images inside ``generate_async``, on this loop, for its queues take one thread
    only. Workers of the role encode spare the others that: embeddings need no preparing.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._own = read_options(options.extra)
        self._llm: Any = None
        self._info: EngineInfo | None = None
        self._streams: Streams | None = None
        self._books: Books | None = None
        self._media: MediaStore | None = None
        self._encoder: RgbEncoder | TowerEncoder | None = None
        self._death: EngineDead | None = None
        self._has_died = asyncio.Event()
        self._doubting: asyncio.Task[None] | None = None
        # Loading and ending block; both happen in one thread, which is the only one that does.
        self._thread = ThreadPoolExecutor(1, "trtllm")
        self._no_events = KvEventLog()
        self._started = False
        self._closed = False

    async def start(self) -> EngineInfo:
        if self._started or self._closed:
            raise EngineDead("this engine was started or closed before; build another")
        self._started = True
        config, own = self._options.config, self._own
        require_role_settings(config, own)
        model = read_hf_model(self._options.model_path)
        self._options.on_progress(0.0)
        loop = asyncio.get_running_loop()
        api = await loop.run_in_executor(self._thread, load_api)
        eyes, vision = self._look(model)
        if not self._options.generates:
            return await self._start_tower(api, model, eyes, vision)
        self._llm = await loop.run_in_executor(self._thread, self._load, api, vision is not None)
        if self._closed:
            await self._shut_down()
            raise EngineDead("the engine was closed while it loaded")
        self._options.on_progress(1.0)
        info = engine_info(
            config,
            own,
            model,
            self._options.model_path,
            num_blocks=None,
            kv_wire=await self._wire(),
            vision=vision,
        )
        prompts = None
        if eyes is not None and vision is not None:
            prompts = await loop.run_in_executor(self._thread, self._open_eyes, eyes, vision, model)
        self._books = Books(self._llm, info)
        loras = {
            name: api.lora_request(name, number, str(folder))
            for number, (name, folder) in enumerate(own.loras.items(), start=1)
        }
        chunked = config.settings.get("enable_chunked_prefill")
        self._streams = Streams(
            api,
            self._llm,
            info,
            self._books,
            loras=loras,
            # A decode worker takes prompts of any length: their KV comes from elsewhere.
            chunked_prefill=bool(chunked and chunked.value) or own.role is Role.DECODE,
            transfer_timeout_s=transfer_timeout_s(config),
            prompts=prompts,
            on_broken=self._die,
            on_doubt=self._doubt,
        )
        await self._warm_up(info)
        self._info = await self._books.start(info)
        self._streams.info = self._info
        return self._info

    def _look(self, model: HfModel) -> tuple[VisionModel | None, VisionInfo | None]:
        """Return what is known of the model's eyes, and what of it this worker takes."""
        eyes = read_vision(self._options.model_path)
        if eyes is None:
            return None, None
        setting = self._options.config.settings.get("dtype")
        dtype = str(setting.value) if setting is not None and setting.value else "auto"
        apart = not self._options.generates
        encodes = self._options.encodes and (apart or self._own.role is not Role.DECODE)
        vision = vision_of(eyes, dtype, encodes=encodes)
        if vision is None:
            log.warning(
                "images are refused: TensorRT-LLM is not known to take them for this family",
                family=eyes.family,
                model=model.config_id,
            )
        return eyes, vision

    def _open_eyes(self, eyes: VisionModel, vision: VisionInfo, model: HfModel) -> MediaPrompts:
        """Make room for images, and what turns them into inputs. Imports; runs in a thread."""
        media = load_media_api(encoder=False)
        store = self._media = byte_store(self._options.media.cache_bytes)
        if vision.encodes:
            self._encoder = RgbEncoder(eyes, model.config_id)
        return MediaPrompts(media, vision, store, first_text(media, self._options.model_path))

    async def _start_tower(
        self, api: Api, model: HfModel, eyes: VisionModel | None, vision: VisionInfo | None
    ) -> EngineInfo:
        """Start the vision tower alone: role encode. Raises ConfigError."""
        path = self._options.model_path
        if eyes is None or vision is None or not vision.images:
            raise ConfigError(
                f"role encode needs a vision-language model whose images TensorRT-LLM encodes; {path} is "
                f"{'none' if eyes is None else f'of family {eyes.family}'}",
                param="role",
            )
        loop = asyncio.get_running_loop()

        def broken(why: str) -> None:
            loop.call_soon_threadsafe(self._die, EngineDead(why))

        def load() -> TowerEncoder:
            media = load_media_api(encoder=True)
            tower = TowerEncoder(api, media, eyes, vision, model.config_id, broken)
            tower.start(path, api.merge_options({}, nested(self._options.config)))
            return tower

        self._encoder = await loop.run_in_executor(self._thread, load)
        if self._closed:
            await self._shut_down()
            raise EngineDead("the engine was closed while it loaded")
        self._media = byte_store(self._options.media.cache_bytes)
        self._options.on_progress(1.0)
        self._info = engine_info(
            self._options.config, self._own, model, path, num_blocks=0, kv_wire="", vision=vision
        )
        return self._info

    def _load(self, api: Api, sees: bool) -> Any:
        """Build the LLM; blocks until it is ready. Runs in a thread."""
        config = self._options.config
        guided = config.settings.get("guided_decoding_backend")
        arguments: dict[str, Any] = {
            "model": str(self._options.model_path),
            "backend": "pytorch",
            # Tokens in, tokens out; only guided decoding needs to know how tokens are spelled, and
            # images, which come with a prompt's text.
            "skip_tokenizer_init": not (guided and guided.value) and not sees,
        }
        try:
            return api.llm(**api.merge_options(arguments, nested(config)))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"TensorRT-LLM {api.version} refuses the engine config: {in_words(error)}",
                param="engine_config",
            ) from error
        except Exception as error:  # too few GPUs, too little memory, a rank that did not come up
            raise ConfigError(
                f"TensorRT-LLM did not start: {in_words(error)}", param="engine_config"
            ) from error

    async def _wire(self) -> str:
        """Return the transport that the transceiver was seen to use. Raises ConfigError for another one."""
        own, asked = self._own, transceiver_of(self._options.config)
        if own.role not in (Role.PREFILL, Role.DECODE) or own.log is None:
            return ""
        found = await LogMarker(own.log, own.log_begin).wait(_MARKER_TIMEOUT_S)
        if not found:
            log.warning(
                "the log does not tell which transport moves KV", asked=asked, file=str(own.log)
            )
        elif asked != "DEFAULT" and found != asked:
            raise ConfigError(
                f"KV was to be moved by {asked}, but TensorRT-LLM's log says {found} ({own.log}); "
                "look for TRTLLM_USE_*_KVCACHE variables and env_overrides",
                param="kv_transport",
            )
        else:
            log.info("KV transport read from the log", transport=found)
        return found

    async def _warm_up(self, info: EngineInfo) -> None:
        """Make one token: statistics and events begin with the first request, and kernels are chosen."""
        await self._probe(_WARM_UP, info)
        if self._death is not None:
            raise EngineDead(str(self._death))

    async def _probe(self, name: str, info: EngineInfo) -> None:
        """Generate one token. Raises EngineDead when that fails."""
        token = next(one for one in range(info.vocab_size) if one not in info.eos_token_ids)
        request = GenerateRequest(
            request_id=name,
            prompt_token_ids=[token],
            sampling=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
            cache_salt=name,
        )
        async for chunk in generate(self, request):
            if chunk.error_code:
                raise EngineDead(f"TensorRT-LLM fails at one token: {chunk.error_message}")

    def submit(self, request: GenerateRequest, deliver: Deliver) -> None:
        self._alive(request.request_id).submit(request, deliver)

    def prefill(self, request: GenerateRequest, deliver: DeliverPrefilled) -> None:
        self._alive(request.request_id).prefill(request, deliver)

    def prefill_reserved(
        self, request_id: str, num_filled_blocks: int, deliver: DeliverPrefilled
    ) -> None:
        raise EngineError(
            f"request {request_id}: TensorRT-LLM moves its own KV; nobody can bring it blocks"
        )

    def release(self, request_id: str) -> None:
        if self._streams is not None:
            self._streams.release(request_id)

    def reserve(self, request: GenerateRequest, deliver: DeliverReservation) -> None:
        self._alive(request.request_id).reserve(request, deliver)

    def resume(
        self, request_id: str, first: TokenChunk | None, deliver: Deliver, opaque: bytes = b""
    ) -> None:
        self._alive(request_id).resume(request_id, first, deliver, opaque)

    def abort(self, request_id: str) -> None:
        if self._streams is not None:
            self._streams.abort(request_id)

    @property
    def kv_pool(self) -> KvPool | None:
        return None

    @property
    def media_store(self) -> MediaStore | None:
        return self._media

    @property
    def encoder(self) -> ImageEncoder | None:
        return self._encoder

    async def holdings(self) -> Mapping[str, int]:
        return self._books.holdings() if self._books is not None else {}

    def kv_events(self) -> AsyncIterator[KvEvent]:
        if self._books is not None:
            return self._books.follow_events()
        if self._info is None:
            raise EngineDead("the trtllm engine has not started")
        return self._no_events.follow()  # a tower has no KV

    def stats(self) -> EngineStats:
        return self._books.stats() if self._books is not None else EngineStats()

    async def died(self) -> EngineDead:
        await self._has_died.wait()
        assert self._death is not None, "set before the event"
        return self._death

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._doubting is not None:
            self._doubting.cancel()
        if self._streams is not None:
            self._streams.close()
        if self._books is not None:
            await self._books.close()
        self._no_events.close()
        hangs = True
        try:
            await self._shut_down()
            hangs = False
        finally:
            self._thread.shutdown(wait=not hangs)
            if self._streams is not None:
                await self._streams.stop_reading()

    async def _shut_down(self) -> None:
        """Let TensorRT-LLM end its ranks. Raises EngineDead when it does not in time."""
        llm, self._llm = self._llm, None
        tower, self._encoder, self._media = self._encoder, None, None
        if llm is None and not isinstance(tower, TowerEncoder):
            return
        end = tower.close if isinstance(tower, TowerEncoder) else llm.shutdown
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_SHUTDOWN_TIMEOUT_S):
                await loop.run_in_executor(self._thread, end)
        except TimeoutError:
            raise EngineDead(
                f"TensorRT-LLM did not shut down within {_SHUTDOWN_TIMEOUT_S:.0f} s; only the end of the "
                "process will end it"
            ) from None

    def _alive(self, request_id: str) -> Streams:
        if self._death is not None:
            raise EngineDead(str(self._death))
        if self._info is not None and not self._options.generates and not self._closed:
            raise NotSupported(
                f"request {request_id}: this worker encodes images and generates nothing",
                param="model",
            )
        if self._closed or self._streams is None:
            state = "is closed" if self._closed else "has not started"
            raise EngineDead(f"request {request_id}: the trtllm engine {state}")
        return self._streams

    def _die(self, death: EngineDead) -> None:
        if self._death is not None or self._closed:
            return
        log.error("the engine cannot go on", reason=str(death))
        self._death = death
        if self._streams is not None:
            self._streams.bury(death)
        self._has_died.set()

    def _doubt(self) -> None:
        """Many requests failed, and none succeeded: one of our own tells whose fault it is."""
        if self._doubting is None or self._doubting.done():
            self._doubting = asyncio.get_running_loop().create_task(self._judge())

    async def _judge(self) -> None:
        info = self._info
        if info is None:
            return
        try:
            async with asyncio.timeout(_DOUBT_TIMEOUT_S):
                await self._probe(_DOUBT, info)
        except TimeoutError:
            self._die(EngineDead("every request fails, and one token takes longer than a minute"))
        except LaunchError as error:
            self._die(EngineDead(f"every request fails, also one of our own: {error}"))
