"""What a folder tells of its model's eyes: which token stands for images, and for how many of them.

Reads JSON files only: no weights, no tokenizer and no transformers, whose processors it agrees with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtllm_workers.config.hf_model import read_json
from trtllm_workers.config.image_sizes import (
    AnyResolution,
    Grid,
    PatchGrid,
    one_size,
    select_tokens,
)
from trtllm_workers.errors import ConfigError, MediaRejected
from trtllm_workers.types import VisionInfo

# Of the values that rows of embeddings can have.
VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Size = tuple[int, Grid | None]


@dataclass(frozen=True, slots=True)
class _Family:
    """What a family's configs leave out."""

    image_token_id: int
    placeholder: str


_FAMILIES = {
    "llava": _Family(32000, "<image>"),
    "llava_next": _Family(32000, "<image>"),
    "qwen2_vl": _Family(151655, "<|image_pad|>"),
    "qwen2_5_vl": _Family(151655, "<|image_pad|>"),
    "mistral3": _Family(10, "[IMG]"),
    "llama4": _Family(200092, "<|patch|>"),
}
# transformers' own for language models whose config.json leaves theirs out.
_HIDDEN_SIZES = {"llama": 4096, "mistral": 4096, "qwen2": 4096}
_WITH_CLASS_TOKEN = ("clip_vision_model",)


@dataclass(frozen=True, slots=True)
class VisionModel:
    """A vision-language model.

    ``image_token_id`` stands in a prompt for one row of ``hidden_size`` values; ``placeholder`` is its
    text. ``dtype`` is the checkpoint's, "" when it does not tell. ``spatial_merge_size`` patches a side
    become one row. ``uses_grid``: its positions are in space.
    """

    family: str
    image_token_id: int
    placeholder: str
    hidden_size: int
    dtype: str = ""
    spatial_merge_size: int = 1
    uses_grid: bool = False
    _count: Callable[[int, int], Size] | None = field(default=None, repr=False, compare=False)

    def info(self, dtype: str, *, encodes: bool) -> VisionInfo:
        """Return what an engine that serves it tells; a ``dtype`` that rows cannot have becomes bfloat16."""
        return VisionInfo(
            family=self.family,
            image_token_id=self.image_token_id,
            placeholder=self.placeholder,
            hidden_size=self.hidden_size,
            dtype=dtype if dtype in VALUE_BYTES else "bfloat16",
            encodes=encodes,
            images=self.counts_tokens,
            uses_grid=self.uses_grid,
        )

    @property
    def counts_tokens(self) -> bool:
        """Whether it is known here how many tokens an image of a size takes."""
        return self._count is not None

    def size_of(self, height: int, width: int) -> Size:
        """Return the tokens of an image, and its grid in merged patches for models that use one.

        Raises MediaRejected for what the model cannot take.
        """
        if self._count is None:
            raise MediaRejected(
                f"images are not taken for models of family {self.family} here, as it is not known how "
                "many tokens they become; send precomputed embeddings"
            )
        if height < 1 or width < 1:
            raise MediaRejected(f"an image of {width} × {height} pixels shows nothing")
        return self._count(height, width)

    def check_grid(self, num_tokens: int, grid: Grid | None) -> Grid | None:
        """Return the grid of embeddings of so many tokens. Raises MediaRejected for one that is wrong."""
        if not self.uses_grid:
            if grid is not None:
                raise MediaRejected(
                    f"the embeddings come with a grid, which models of family {self.family} have no use for"
                )
            return None
        if grid is None:
            raise MediaRejected(
                f"models of family {self.family} place images in space, and these embeddings come without "
                "their grid (image_grid_thw)"
            )
        if min(grid) < 1 or math.prod(grid) != num_tokens:
            shown = " × ".join(str(side) for side in grid)
            raise MediaRejected(f"a grid of {shown} does not make {num_tokens} embeddings")
        if grid[0] != 1:
            raise MediaRejected(
                f"a grid with {grid[0]} time steps is a video's; only images are taken"
            )
        return grid


def read_vision(folder: Path) -> VisionModel | None:
    """Return what a model folder tells of images; None for a model that takes text only.

    Raises ConfigError, naming file and key, for what is broken or contradicts itself.
    """
    path = folder / "config.json"
    config = read_json(path) or {}
    family = config.get("model_type")
    if family not in _FAMILIES:
        return None
    known = _FAMILIES[family]
    text = config.get("text_config")
    text = {**config, **text} if isinstance(text, dict) else config
    vision = config.get("vision_config")
    vision = vision if isinstance(vision, dict) else {}
    token = _int(path, config, "image_token_id") or _int(path, config, "image_token_index")
    token = known.image_token_id if token is None else token
    hidden = _int(path, text, "hidden_size") or _HIDDEN_SIZES.get(str(text.get("model_type")))
    if not hidden:
        raise ConfigError(f"{path}: 'hidden_size' is missing", param="model_path")
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype")
    merge, count = _counting(folder, family, config, vision)
    return VisionModel(
        family=family,
        image_token_id=token,
        placeholder=_token_text(folder, token) or known.placeholder,
        hidden_size=hidden,
        dtype=str(dtype or text.get("torch_dtype") or ""),
        spatial_merge_size=merge,
        uses_grid=family in ("qwen2_vl", "qwen2_5_vl"),
        _count=count,
    )


def _counting(
    folder: Path, family: str, config: Mapping[str, Any], vision: Mapping[str, Any]
) -> tuple[int, Callable[[int, int], Size] | None]:
    """Return patches a side of one row, and what tells how many rows an image becomes."""
    path = folder / "config.json"
    images = _processor(folder)
    if family in ("qwen2_vl", "qwen2_5_vl"):
        patch = _int(path, vision, "patch_size") or 14
        merge = _int(path, vision, "spatial_merge_size") or 2
        for name, ours in (("patch_size", patch), ("merge_size", merge)):
            if images.get(name, ours) != ours:
                raise ConfigError(
                    f"{folder}: preprocessor_config.json has {name} {images[name]}, config.json {ours}",
                    param="model_path",
                )
        lowest, highest = _pixel_bounds(images)
        return merge, PatchGrid(patch * merge, lowest, highest)
    tower = str(vision.get("model_type") or "clip_vision_model")
    if family in ("llava", "llava_next") and tower in ("clip_vision_model", "siglip_vision_model"):
        side = _int(path, vision, "image_size") or (336 if not vision else 224)
        patch = _int(path, vision, "patch_size") or (
            14 if not vision else 32 if tower == "clip_vision_model" else 16
        )
        strategy = str(config.get("vision_feature_select_strategy") or "default")
        extra = select_tokens(strategy, has_class_token=tower in _WITH_CLASS_TOKEN)
        if family == "llava":
            return 1, one_size(side, patch, extra)
        pinpoints = config.get("image_grid_pinpoints") or images.get("image_grid_pinpoints")
        return 1, AnyResolution(side, patch, extra, _pinpoints(path, pinpoints))
    merge = _int(path, config, "spatial_merge_size") or 1
    return merge, None


def _processor(folder: Path) -> Mapping[str, Any]:
    """Return how images are prepared; newer folders keep it inside processor_config.json."""
    nested = (read_json(folder / "processor_config.json") or {}).get("image_processor")
    if isinstance(nested, dict):
        return nested
    return read_json(folder / "preprocessor_config.json") or {}


def _pixel_bounds(images: Mapping[str, Any]) -> tuple[int, int]:
    size = images.get("size")
    size = size if isinstance(size, dict) else {}
    lowest = images.get("min_pixels") or size.get("shortest_edge") or 56 * 56
    highest = images.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
    return int(lowest), int(highest)


def _pinpoints(path: Path, given: Any) -> tuple[tuple[int, int], ...]:
    if given is None:
        given = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    try:
        return tuple((int(height), int(width)) for height, width in given)
    except (TypeError, ValueError):
        raise ConfigError(
            f"{path}: 'image_grid_pinpoints' must be pairs of height and width", param="model_path"
        ) from None


def _token_text(folder: Path, token: int) -> str | None:
    """Return a special token's text; the small file is asked before the large one."""
    decoder = (read_json(folder / "tokenizer_config.json") or {}).get("added_tokens_decoder")
    if isinstance(decoder, dict) and isinstance(decoder.get(str(token)), dict):
        content = decoder[str(token)].get("content")
        if isinstance(content, str):
            return content
    for entry in (read_json(folder / "tokenizer.json") or {}).get("added_tokens") or ():
        if isinstance(entry, dict) and entry.get("id") == token:
            content = entry.get("content")
            return content if isinstance(content, str) else None
    return None


def _int(path: Path, config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise ConfigError(
            f"{path}: '{key}' must be a whole number, not {value!r}", param="model_path"
        )
    return value
