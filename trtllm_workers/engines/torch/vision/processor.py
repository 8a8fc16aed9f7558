"""transformers' image processors, those that need PIL alone, from a model folder. Knows no model.

``AutoImageProcessor`` would take others where torchvision is installed, whose pixels differ a little; the
same image should become the same embeddings on every worker.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from trtllm_workers.errors import ConfigError

# ``image_processor_type`` without what tells its implementation → transformers' module.
_MODULES = {
    "CLIPImageProcessor": "clip",
    "LlavaImageProcessor": "llava",
    "SiglipImageProcessor": "siglip",
    "Qwen2VLImageProcessor": "qwen2_vl",
}
_NESTED = "processor_config.json"
_OWN = "preprocessor_config.json"


def read_processor(folder: Path, kinds: tuple[str, ...]) -> Any:
    """Return the processor of a folder, one of ``kinds``, the first where it does not tell.

    Raises ConfigError naming the file.
    """
    path, settings = _settings(folder)
    kind = str(settings.pop("image_processor_type", kinds[0]))
    kind = kind.removesuffix("Fast").removesuffix("Pil")
    if kind not in kinds:
        raise _error(
            f"{path}: image_processor_type '{kind}' is not supported; {', '.join(kinds)} are"
        )
    # Who processes text beside images is nobody's business here.
    settings.pop("processor_class", None)
    try:
        return _class_of(kind)(**settings)
    except (TypeError, ValueError) as error:
        raise _error(f"{path}: no settings of an image processor: {error}") from error


def pixel_values(processor: Any, pixels: memoryview, height: int, width: int) -> Any:
    """Return what the processor makes of one image, RGB bytes [height, width, 3], as torch tensors."""
    image = np.frombuffer(pixels, dtype=np.uint8).reshape(height, width, 3)
    # Said, not guessed: an image of three rows looks like three channels.
    return processor(images=[image], input_data_format="channels_last", return_tensors="pt")


def settings_bytes(folder: Path) -> bytes:
    """Return the file that says how images are prepared, b"" where there is none."""
    for name in (_OWN, _NESTED):
        path = folder / name
        if path.is_file():
            return path.read_bytes()
    return b""


def _settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    for name in (_OWN, _NESTED):
        path = folder / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise _error(f"{path} cannot be read: {error}") from error
        settings = content.get("image_processor") if name == _NESTED else content
        if isinstance(settings, dict):
            return path, dict(settings)
    raise _error(
        f"{folder} holds no {_OWN}, which says how images are prepared; fetch it with the checkpoint"
    )


def _class_of(kind: str) -> type[Any]:
    family = _MODULES[kind]
    # transformers before 5 has one implementation on PIL, without a name of its own.
    for module, name in (
        (f"image_processing_pil_{family}", f"{kind}Pil"),
        (f"image_processing_{family}", kind),
    ):
        try:
            found = importlib.import_module(f"transformers.models.{family}.{module}")
        except ModuleNotFoundError:
            continue
        made: type[Any] = getattr(found, name)
        return made
    raise _error(f"this transformers has no {kind} on PIL; install 'trtllm-launch[vision]'")


def _error(message: str) -> ConfigError:
    return ConfigError(message, param="model_path")
