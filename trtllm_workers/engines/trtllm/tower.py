"""A vision tower apart: TensorRT-LLM's MultimodalEncoder, for workers of the role encode.

It answers with a handle to memory of the GPU, which works on its own host, and once: who opens it takes
the memory over. So it is opened here, at once, and copied into rows of embeddings that can be kept, fetched
from any host and used again. A handle never leaves this process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from trtllm_workers.config.vision_model import VALUE_BYTES, VisionModel
from trtllm_workers.engines.base import ImagePlan
from trtllm_workers.engines.trtllm.api import Api
from trtllm_workers.engines.trtllm.failures import SUSPICIOUS_FAILURES, in_words, is_fatal
from trtllm_workers.engines.trtllm.media_api import MediaApi
from trtllm_workers.errors import ConfigError, EngineError
from trtllm_workers.types import VisionInfo

# Below what the end of an engine waits for.
ENCODE_TIMEOUT_S = 20.0


class TowerEncoder:
    """See ``engines/base.py: ImageEncoder``. ``start`` blocks until the tower is loaded.

    ``on_broken`` is told, in any thread, why it cannot go on.
    """

    def __init__(
        self,
        api: Api,
        media: MediaApi,
        model: VisionModel,
        vision: VisionInfo,
        model_id: str,
        on_broken: Callable[[str], None],
    ) -> None:
        self._api = api
        self._media = media
        self._model = model
        self._vision = vision
        self._row_bytes = vision.hidden_size * VALUE_BYTES[vision.dtype]
        named = f"trtllm tower\0{api.version}\0{model_id}\0{vision.dtype}"
        self._fingerprint = blake2b(named.encode(), digest_size=16).digest()
        self._on_broken = on_broken
        self._tower: Any = None
        self._num_failures = 0  # in a row
        self._lock = threading.Lock()  # one image at a time, and none while it ends

    def start(self, model_path: Path, options: dict[str, Any]) -> None:
        """Load the tower. Raises ConfigError."""
        assert self._media.encoder is not None, "asked for when it was imported"
        try:
            self._tower = self._media.encoder(model=str(model_path), **options)
        except Exception as error:  # whatever it cannot do with this model or these options
            raise ConfigError(
                f"TensorRT-LLM's MultimodalEncoder did not start: {in_words(error)}",
                param="engine_config",
            ) from error

    @property
    def fingerprint(self) -> bytes:
        return self._fingerprint

    def plan(self, height: int, width: int) -> ImagePlan:
        num_tokens, grid = self._model.size_of(height, width)
        return ImagePlan(num_tokens, num_tokens * self._row_bytes, grid)

    def check_grid(
        self, num_tokens: int, grid: tuple[int, int, int] | None
    ) -> tuple[int, int, int] | None:
        return self._model.check_grid(num_tokens, grid)

    def encode(
        self, pixels: memoryview, height: int, width: int, into: Sequence[memoryview]
    ) -> None:
        rows = self._rows(pixels, height, width)
        num_tokens, _grid = self._model.size_of(height, width)
        expected = (num_tokens, self._vision.hidden_size)
        if tuple(rows.shape) != expected:
            raise EngineError(
                f"TensorRT-LLM made embeddings {tuple(rows.shape)} of an image of {width} × {height} "
                f"pixels, where {expected} were counted"
            )
        torch = self._media.torch
        flat = rows.to(getattr(torch, self._vision.dtype)).contiguous().flatten().view(torch.uint8)
        at = 0
        for piece in into:
            torch.frombuffer(piece, dtype=torch.uint8).copy_(flat[at : at + len(piece)])
            at += len(piece)

    def close(self) -> None:
        """End the tower's processes; blocks."""
        with self._lock:
            tower, self._tower = self._tower, None
            if tower is not None:
                tower.shutdown()

    def _rows(self, pixels: memoryview, height: int, width: int) -> Any:
        """Return an image's embeddings in this process's memory."""
        inputs = {
            "prompt": self._vision.placeholder,
            "multi_modal_data": {"image": [self._media.picture((height, width), pixels)]},
        }
        with self._lock:
            if self._tower is None:
                raise EngineError("the vision tower has ended")
            try:
                result = self._tower.generate_async(inputs).result(ENCODE_TIMEOUT_S)
                assert self._media.open_handle is not None, "imported with the encoder"
                rows = self._media.open_handle(_handle_of(result)).clone().cpu()
            except Exception as error:
                self._num_failures += 1
                if is_fatal(error) or self._num_failures >= SUSPICIOUS_FAILURES:
                    self._on_broken(f"TensorRT-LLM's vision tower is broken: {in_words(error)}")
                raise EngineError(f"TensorRT-LLM's vision tower: {in_words(error)}") from error
            self._num_failures = 0
            return rows


def _handle_of(result: Any) -> dict[str, Any]:
    """Return the one handle of a result; it stands in one of two places."""
    params = getattr(result, "disaggregated_params", None)
    handles = getattr(params, "multimodal_embedding_handles", None)
    if not handles:
        single = getattr(result, "mm_embedding_handle", None)
        handles = [single] if single else []
    if len(handles) != 1:
        raise EngineError(f"TensorRT-LLM gave {len(handles)} embeddings for one image")
    handle: dict[str, Any] = handles[0]
    return handle
