"""Images to files of embeddings, as an encode worker would make them. Serves nobody."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trtllm_workers import __version__
from trtllm_workers.config.media import MediaSettings
from trtllm_workers.engines.base import Engine, ImageEncoder
from trtllm_workers.errors import ConfigError, MediaRejected
from trtllm_workers.media.safetensors_writer import Tensor, write_safetensors
from trtllm_workers.types import MediaKind, MediaReference, VisionInfo

# The names by which files of embeddings are known, here and in transformers.
ROWS, GRID = "mm_embeddings", "image_grid_thw"
MADE_BY = "trtllm_launch.made_by"
EMBEDDINGS = (".safetensors", ".pt", ".pth", ".bin")
# What transformers takes where a Qwen2-VL config.json is silent.
_MERGE_SIZE = 2


class Loader(Protocol):
    """The part of ``media.loader.MediaLoader`` that makes pixels of files."""

    async def load(
        self, reference: MediaReference, claim: Callable[[int], Any], drop: Callable[[Any], None]
    ) -> Any: ...
    async def pixels(self, image: Any) -> memoryview: ...
    async def close(self) -> None: ...


OpenLoader = Callable[[MediaSettings, VisionInfo], Loader]


@dataclass(frozen=True, slots=True)
class Embedded:
    """One image's rows [num_tokens, hidden] as bytes; ``grid`` in patches as transformers counts them."""

    source: Path
    num_tokens: int
    rows: bytearray
    grid: tuple[int, int, int] | None


@dataclass(frozen=True, slots=True)
class Embeddings:
    """What the images became, and what made it."""

    images: tuple[Embedded, ...]
    hidden_size: int
    dtype: str
    made_by: str
    model: str


async def embed_images(
    engine: Engine,
    open_loader: OpenLoader,
    images: Sequence[Path],
    *,
    settings: MediaSettings,
    model_path: Path,
    model: str,
) -> Embeddings:
    """Return the embeddings of image files. Ends the engine. Raises ConfigError and MediaRejected.

    ``engine`` is not started, and need not generate. Each image is looked for in its own folder alone.
    """
    try:
        info = await engine.start()
        encoder, vision = engine.encoder, info.vision
        if encoder is None or vision is None:
            raise ConfigError(
                f"engine {info.engine} has no vision tower for {model}; nothing can be embedded",
                param="model_path",
            )
        made = [
            await _embed(encoder, vision, open_loader, path, settings, model_path)
            for path in images
        ]
        return Embeddings(
            tuple(made), vision.hidden_size, vision.dtype, encoder.fingerprint.hex(), model
        )
    finally:
        await engine.close()


def write_embeddings(path: Path, made: Embeddings, *, dtype: str) -> tuple[int, ...]:
    """Write the images of ``made`` into one file; return the shape of their tensor.

    Raises ConfigError where they have different numbers of tokens.
    """
    counts = {image.num_tokens for image in made.images}
    if len(counts) > 1:
        told = ", ".join(f"{image.source.name} {image.num_tokens}" for image in made.images)
        raise ConfigError(
            f"images of different numbers of tokens do not fit into one file ({told}); "
            "give an existing folder for -o, and each gets a file of its own",
            param="output",
        )
    shape: tuple[int, ...] = (made.images[0].num_tokens, made.hidden_size)
    if len(made.images) > 1:
        shape = (len(made.images), *shape)
    tensors = []
    grids = [image.grid for image in made.images if image.grid is not None]
    if grids:
        packed = b"".join(struct.pack("<3q", *grid) for grid in grids)
        tensors.append(Tensor(GRID, "int64", (len(grids), 3), [packed]))
    rows = [_in_dtype(image.rows, made.dtype, dtype) for image in made.images]
    tensors.append(Tensor(ROWS, dtype, shape, rows))
    write_safetensors(
        path,
        tensors,
        {
            MADE_BY: made.made_by,
            "trtllm_launch.model": made.model,
            "trtllm_launch.created_by": f"trtllm-launch {__version__}",
        },
    )
    return shape


def one_by_one(made: Embeddings) -> list[Embeddings]:
    """Return each image by itself."""
    return [dataclasses.replace(made, images=(image,)) for image in made.images]


async def _embed(
    encoder: ImageEncoder,
    vision: VisionInfo,
    open_loader: OpenLoader,
    path: Path,
    settings: MediaSettings,
    model_path: Path,
) -> Embedded:
    real = await asyncio.to_thread(path.resolve)
    # The operator's own file: its folder is allowed, whatever leads there.
    loader = open_loader(dataclasses.replace(settings, allowed_local_path=real.parent), vision)
    try:
        image = await loader.load(MediaReference(real.as_uri(), str(path)), _no_room, _no_room)
        pixels = await loader.pixels(image)
        plan = encoder.plan(image.height, image.width)
        if plan.kind is not MediaKind.EMBEDDINGS:
            raise ConfigError("this engine takes images as they are; nothing can be embedded")
        rows = bytearray(plan.num_bytes)
        await asyncio.to_thread(
            encoder.encode, pixels, image.height, image.width, [memoryview(rows)]
        )
    except MediaRejected as wrong:
        raise ConfigError(f"{path}: {wrong}", param="images") from wrong
    finally:
        await loader.close()
    grid = _in_patches(plan.grid, merge_size(model_path)) if plan.grid else None
    if plan.grid and encoder.check_grid(plan.num_tokens, grid) != plan.grid:
        raise ConfigError(
            f"{path}: the grid {grid} is not read back as {plan.grid}; is spatial_merge_size in "
            f"{model_path / 'config.json'} that of the vision tower?",
            param="model_path",
        )
    return Embedded(path, plan.num_tokens, rows, grid)


def merge_size(model_path: Path) -> int:
    """Return how many patches in each direction the model makes one token of."""
    config = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
    found = config.get("vision_config", {}).get("spatial_merge_size", _MERGE_SIZE)
    return int(found)


def _in_patches(grid: tuple[int, int, int], merge: int) -> tuple[int, int, int]:
    time, height, width = grid
    return time, height * merge, width * merge


def _in_dtype(rows: bytearray, dtype: str, wanted: str) -> bytes | bytearray:
    if dtype == wanted:
        return rows
    import torch

    of = {name: getattr(torch, name) for name in (dtype, wanted)}
    converted = torch.frombuffer(rows, dtype=of[dtype]).to(of[wanted]).contiguous()
    return bytes(converted.view(torch.uint8).numpy().tobytes())


def _no_room(_: Any) -> Any:
    raise MediaRejected("it is a file of embeddings already, not an image")
