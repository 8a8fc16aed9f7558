"""What images ask of settings, and whether the model takes any. Reads config.json, and no weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_workers.config.disaggregation import settle_devices
from trtllm_workers.config.layers import Layers, file_problem
from trtllm_workers.config.media import MIB, MediaSettings
from trtllm_workers.config.shipped import shipped_engine_config
from trtllm_workers.config.values import shown

if TYPE_CHECKING:
    from trtllm_workers.config.settings import Settings

TEXT, MULTIMODAL = "text", "multimodal"
_SHIPPED = "encode.yaml"
# What vision-language checkpoints have in config.json, and language models have not.
_VISION_KEY = "vision_config"
# A name, an IPv4 address or an IPv6 one in brackets; perhaps a port.
_HOST = re.compile(r"(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?")
# Without effect where no image is taken.
_OF_IMAGES = (
    "encode_engine_config",
    "encode_cuda_visible_devices",
    "allowed_local_media_path",
    "media_url_host",
    "allow_pickle_embeddings",
    "max_file_size_mb",
    "max_image_pixels",
    "max_images",
    "media_timeout_s",
    "media_cache_mb",
    "encode_timeout_s",
)
# Without effect where no encode worker is started.
_OF_ENCODE_WORKERS = ("encode_engine_config", "encode_cuda_visible_devices")


def takes_images(model_path: Path) -> bool:
    """Return whether the checkpoint has a vision part; False where config.json does not tell."""
    try:
        config = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # the engine will say what is wrong with it
    return isinstance(config, dict) and isinstance(config.get(_VISION_KEY), dict)


def media_settings(settings: Settings) -> MediaSettings:
    """Return what a worker may load for images."""
    return MediaSettings(
        allowed_local_path=settings.allowed_local_media_path,
        max_file_bytes=settings.max_file_size_mb * MIB,
        max_pixels=settings.max_image_pixels,
        url_hosts=settings.media_url_host,
        allow_pickle=settings.allow_pickle_embeddings,
        timeout_s=settings.media_timeout_s,
        max_items=settings.max_images,
        cache_bytes=settings.media_cache_mb * MIB,
    )


def settle_images(layers: Layers, model_path: Path | None, *, of_one_part: bool) -> None:
    """Fill in and check what concerns images; warn of settings without effect.

    ``model_path`` None: this process has no model. ``of_one_part``: it is a part of a run that somebody
    else describes.
    """
    values = layers.values
    _settle_folder(layers)
    for host in values["media_url_host"]:
        found = _HOST.fullmatch(host)
        if found is None or (found[1] and not 0 < int(found[1]) < 65536):
            layers.fail(
                "media_url_host",
                f"must be a host, or host:port, without a scheme or a path, not {shown(host)}",
            )
    layers.default("encode_engine_config", shipped_engine_config(_SHIPPED))
    if values["encode_cuda_visible_devices"] is not None:
        settle_devices(layers, "encode_cuda_visible_devices")
    _settle_modality(layers, model_path)
    if values["num_encode_workers"]:
        _require_vision(layers, model_path)
        if wrong := file_problem(values["encode_engine_config"]):
            layers.fail("encode_engine_config", wrong)
    if not of_one_part:
        _point_out(layers)


def _settle_folder(layers: Layers) -> None:
    folder = layers.values["allowed_local_media_path"]
    if folder is None:
        return
    try:
        wrong = "" if folder.is_dir() else "is no folder" if folder.exists() else "does not exist"
    except OSError as error:
        wrong = f"cannot be read: {error.strerror}"
    if wrong:
        layers.fail("allowed_local_media_path", f"{shown(folder)} {wrong}")
        return
    folder = layers.values["allowed_local_media_path"] = folder.absolute()
    if folder.resolve() == Path("/"):
        source = layers.sources["allowed_local_media_path"]
        layers.warnings.append(f"{source} is /: requests may name every file of a worker's host")


def _settle_modality(layers: Layers, model_path: Path | None) -> None:
    values, sources = layers.values, layers.sources
    if values["modality"] == "auto":
        there = model_path is not None and takes_images(model_path)
        values["modality"] = MULTIMODAL if there else TEXT
        if there:
            sources["modality"] += f" (auto takes {MULTIMODAL}: config.json has {_VISION_KEY})"
    elif (
        values["modality"] == MULTIMODAL
        and model_path is not None
        and (wrong := _no_vision(layers, model_path))
    ):
        layers.fail("modality", f"{MULTIMODAL}, but {wrong}")


def _require_vision(layers: Layers, model_path: Path | None) -> None:
    values, sources = layers.values, layers.sources
    if values["modality"] == MULTIMODAL:
        return  # a model without a vision part was refused by name
    if sources["modality"].startswith("default") and model_path is not None:
        if wrong := _no_vision(layers, model_path):
            layers.fail("num_encode_workers", f"encode workers need a vision tower, but {wrong}")
    else:
        layers.fail(
            "num_encode_workers",
            f"encode workers have nothing to do with modality {TEXT} ({sources['modality']}); "
            "take one of the two back",
        )


def _no_vision(layers: Layers, model_path: Path) -> str:
    """Return why the model takes no images, and what to do; "" when it takes them, or cannot be read."""
    path = model_path / "config.json"
    if takes_images(model_path) or not path.is_file():
        return ""
    whose = "the demo model" if "demo" in layers.sources["model_path"] else "the model"
    return (
        f"{whose} takes text only: {path} has no {_VISION_KEY}; give --model-path the folder of a "
        "LLaVA, Qwen2-VL or Qwen2.5-VL checkpoint, or of a tiny one to try: "
        "python -m trtllm_workers.demo.vision --family qwen2_vl --out DIR"
    )


def _point_out(layers: Layers) -> None:
    """Warn of what was given and changes nothing in this run."""
    values = layers.values
    if values["modality"] == TEXT and not values["num_encode_workers"]:
        source = layers.sources["modality"]
        given = source.startswith(("environment", "--"))
        why = f"modality is {TEXT} ({source})" if given else "the model takes text only"
        names: tuple[str, ...] = _OF_IMAGES
    elif not values["num_encode_workers"]:
        why, names = "no encode worker is started (--num-encode-workers)", _OF_ENCODE_WORKERS
    else:
        return
    for name in names:
        if layers.given(name):
            layers.warnings.append(f"{layers.sources[name]} has no effect: {why}")
    if names is _OF_IMAGES and not values["disaggregated"] and layers.given("kv_transport"):
        # Only embeddings would move.
        source = layers.sources["kv_transport"]
        layers.warnings.append(f"{source} has no effect without --disaggregated: {why}")
