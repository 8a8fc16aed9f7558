"""``trtllm-launch embed``: images to a file of embeddings that requests may name in place of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trtllm_workers.cli.common import explicit, warn
from trtllm_workers.cli.options import GroupedCommand, own_options, table_options
from trtllm_workers.config.options import Option
from trtllm_workers.errors import ConfigError

if TYPE_CHECKING:
    from trtllm_workers.worker.embed import Embeddings

MODEL = Option(
    name="model",
    flag="--model",
    env=("MODEL_PATH",),
    default=None,
    kind=Path,
    metavar="DIR",
    help="Folder of the vision-language checkpoint that will be served.",
    group="model",
)
DTYPES = ("float32", "float16", "bfloat16")
_OPTIONS = (
    "served_model_name",
    "encode_engine_config",
    "overrides",
    "max_file_size_mb",
    "max_image_pixels",
    "media_timeout_s",
    "log_level",
    "log_format",
)


@click.command("embed", cls=GroupedCommand)
@click.argument(
    "images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE..."
)
@own_options(MODEL)
@table_options(_OPTIONS)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE|DIR",
    help="The .safetensors file to write; a folder that exists: a file for each image.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="What rows are written in.  [default: the model's, which serves them as they are]",
)
@click.option("--force", is_flag=True, help="Write over files that exist.")
def command(
    images: tuple[Path, ...], output: Path, dtype: str | None, force: bool, **values: Any
) -> int:
    """Make a file of embeddings of images, to name in requests.

    Runs the model's vision tower as a worker would. Several images of one number of tokens go into one
    file, as (images, tokens, hidden).
    """
    files = _files(images, output)
    for path in files:
        _require_writable(path, force=force)
    _require_images(images)
    made = _make(images, values)
    from trtllm_workers.worker.embed import one_by_one, write_embeddings

    dtype = dtype or made.dtype
    parts = one_by_one(made) if output.is_dir() else [made]
    for path, part in zip(files, parts, strict=True):
        try:
            shape = write_embeddings(path, part, dtype=dtype)
        except OSError as wrong:
            raise ConfigError(
                f"{path} cannot be written: {wrong.strerror}", param="output"
            ) from wrong
        print(f"{path}: {dtype} {shape}, {path.stat().st_size / 2**20:.1f} MiB")
        for image in part.images:
            grid = f", grid {image.grid}" if image.grid else ""
            print(f"  {image.source}: {image.num_tokens} tokens{grid}")
    return 0


def _make(images: tuple[Path, ...], values: dict[str, Any]) -> Embeddings:
    from trtllm_workers.config.env import calm_openmp, environment
    from trtllm_workers.config.images import MULTIMODAL, media_settings
    from trtllm_workers.deploy.engine_configs import load_engine_configs
    from trtllm_workers.deploy.inventory import vision_lacks
    from trtllm_workers.deploy.prepare import prepare_settings
    from trtllm_workers.observe.logs import setup_logs
    from trtllm_workers.types import Role

    given = explicit(values) | {"engine": "torch"}
    if values["model"] is not None:
        given["model_path"] = values["model"]
    environ = environment()
    settings = prepare_settings(given, environ, only=("model_path", *_OPTIONS))
    warn(settings.warnings)
    if settings.modality != MULTIMODAL:
        raise ConfigError(
            f"{settings.model_path} takes text only: its config.json has no vision_config; "
            "give --model the folder of a vision-language checkpoint",
            param="model_path",
        )
    if lacks := vision_lacks("torch"):
        raise ConfigError(
            f"missing: {', '.join(lacks)}; run: pip install 'trtllm-launch[vision]'", param="model"
        )
    files = {Role.ENCODE: settings.encode_engine_config}
    config = load_engine_configs(settings, files, environ).configs[Role.ENCODE]
    setup_logs("embed", fmt="console", level=settings.log_level, path=None)
    calm_openmp()  # before torch is loaded

    from trtllm_workers.engines.base import EngineOptions
    from trtllm_workers.engines.registry import build_engine
    from trtllm_workers.media.loader import MediaLoader
    from trtllm_workers.worker.embed import embed_images

    media = media_settings(settings)
    options = EngineOptions(
        model_path=settings.model_path, config=config, media=media, generates=False
    )
    return asyncio.run(
        embed_images(
            build_engine(settings.engine, options),
            MediaLoader,
            images,
            settings=media,
            model_path=settings.model_path,
            model=settings.served_model_name,
        )
    )


def _files(images: tuple[Path, ...], output: Path) -> list[Path]:
    """Return the files to write: one, or one for each image. Raises ConfigError."""
    if not output.is_dir():
        if output.suffix != ".safetensors":
            raise ConfigError(
                f"-o {output}: give a file whose name ends in .safetensors, or a folder that exists",
                param="output",
            )
        return [output]
    files = [output / f"{image.stem}.safetensors" for image in images]
    twice = sorted({str(one) for one in files if files.count(one) > 1})
    if twice:
        raise ConfigError(f"two images would become {', '.join(twice)}; rename one", param="output")
    return files


def _require_writable(path: Path, *, force: bool) -> None:
    if not path.parent.is_dir():
        raise ConfigError(f"-o: there is no folder {path.parent}", param="output")
    if path.exists() and not force:
        raise ConfigError(f"{path} exists; --force writes over it", param="output")


def _require_images(images: tuple[Path, ...]) -> None:
    """Say at once what is wrong with a path; the loader, made for strangers, would not."""
    from trtllm_workers.worker.embed import EMBEDDINGS

    for path in images:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise ConfigError(f"{path} {what}; give image files", param="images")
        if path.suffix.lower() in EMBEDDINGS:
            raise ConfigError(f"{path} is a file of embeddings by its name; give images")
