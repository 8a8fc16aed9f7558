"""What TensorRT-LLM can do with images, and keeping them until it does."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from trtllm_workers.config.vision_model import VisionModel
from trtllm_workers.engines.base import ImagePlan
from trtllm_workers.errors import NotSupported
from trtllm_workers.types import GenerateRequest, MediaKind, VisionInfo

# Models whose input processors are known to attach embeddings that were made elsewhere (mistral3 and qwen:
# not verified; one that does not refuses the request). llama4's takes them only with special tokens and their
# places among the rows, which items do not carry.
FAMILIES = ("llava_next", "mistral3", "qwen2_5_vl", "qwen2_vl")


def vision_of(model: VisionModel, dtype: str, *, encodes: bool) -> VisionInfo | None:
    """Return what this engine tells of a model's eyes; None: TensorRT-LLM serves its text only."""
    if model.family not in FAMILIES:
        return None
    return model.info(model.dtype if dtype == "auto" else dtype, encodes=encodes)


def salt_of(request: GenerateRequest) -> str:
    """Return what separates a request's blocks from others' in TensorRT-LLM.

    It is not known to tell embeddings apart when it looks for equal prompts, so what images show is
    part of the salt: prompts with other images share nothing, not even the text before them.
    """
    if not request.media:
        return request.cache_salt
    seen = blake2b(digest_size=16)
    for item in request.media:
        seen.update(item.digest)
    return f"media-{seen.hexdigest()}\0{request.cache_salt}"


def check_kinds(request: GenerateRequest, vision: VisionInfo | None) -> None:
    """Raise RequestError, by name, for images that TensorRT-LLM cannot take like this."""
    if vision is None or not request.media:
        return
    kinds = {item.kind for item in request.media}
    if len(kinds) > 1:
        raise NotSupported(
            "TensorRT-LLM takes images or precomputed embeddings, not both in one request: it would "
            "leave the embeddings out; send one kind, or serve with encode workers",
            param="media",
        )
    if any(item.native for item in request.media):
        raise NotSupported(
            "these embeddings are another engine's own handles, which TensorRT-LLM cannot open",
            param="media",
        )
    if kinds == {MediaKind.IMAGE} and not vision.images:
        raise NotSupported(
            f"images are not taken for models of family {vision.family}; send embeddings",
            param="media",
        )


class RgbEncoder:
    """See ``engines/base.py: ImageEncoder``. TensorRT-LLM encodes images with their prompt, so they stay
    the pixels they are.
    """

    def __init__(self, model: VisionModel, model_id: str) -> None:
        self._model = model
        self._fingerprint = blake2b(f"trtllm rgb\0{model_id}".encode(), digest_size=16).digest()

    @property
    def fingerprint(self) -> bytes:
        return self._fingerprint

    def plan(self, height: int, width: int) -> ImagePlan:
        num_tokens, grid = self._model.size_of(height, width)
        return ImagePlan(num_tokens, height * width * 3, grid, MediaKind.IMAGE)

    def check_grid(
        self, num_tokens: int, grid: tuple[int, int, int] | None
    ) -> tuple[int, int, int] | None:
        return self._model.check_grid(num_tokens, grid)

    def encode(
        self, pixels: memoryview, height: int, width: int, into: Sequence[memoryview]
    ) -> None:
        at = 0
        flat = pixels.cast("B")
        for piece in into:
            piece[:] = flat[at : at + len(piece)]
            at += len(piece)
