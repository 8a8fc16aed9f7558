"""The names beside the LLM API that images need, imported once and only for models with eyes.

torch, PIL and transformers are where TensorRT-LLM is: it requires them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_workers.engines.trtllm.api import INSTALL
from trtllm_workers.errors import ConfigError


@dataclass(frozen=True, slots=True)
class MediaApi:
    """Tensors, pictures, tokenizers and encoders.

    ``open_handle`` returns the tensor behind a handle of the encoder's, as often as once: opening it
    takes the memory over. It works on the encoder's own host only.
    """

    torch: Any
    picture: Callable[[tuple[int, int], memoryview | bytearray], Any]
    tokenizer: Callable[[str], Any]
    encoder: Callable[..., Any] | None
    open_handle: Callable[[dict[str, Any]], Any] | None


def load_media_api(*, encoder: bool) -> MediaApi:
    """Import what images need; with ``encoder`` that of TensorRT-LLM too. Raises ConfigError."""
    try:
        torch = importlib.import_module("torch")
        image = importlib.import_module("PIL.Image")
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(f"images need what TensorRT-LLM requires: {error}; {INSTALL}") from error
    tower, open_handle = _tower() if encoder else (None, None)

    def picture(size: tuple[int, int], pixels: memoryview | bytearray) -> Any:
        height, width = size
        return image.frombytes("RGB", (width, height), bytes(pixels))

    return MediaApi(
        torch=torch,
        picture=picture,
        tokenizer=transformers.AutoTokenizer.from_pretrained,
        encoder=tower,
        open_handle=open_handle,
    )


def _tower() -> tuple[Callable[..., Any], Callable[[dict[str, Any]], Any]]:
    try:
        llmapi = importlib.import_module("tensorrt_llm.llmapi")
        encoder = getattr(llmapi, "MultimodalEncoder", None)
        if encoder is None:  # not every release shows it there
            encoder = importlib.import_module("tensorrt_llm.llmapi.mm_encoder").MultimodalEncoder
        shared = importlib.import_module("tensorrt_llm._torch.shared_tensor")
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"this TensorRT-LLM has no MultimodalEncoder ({error}), so it cannot have the role encode; "
            f"{INSTALL}, or serve without encode workers",
            param="role",
        ) from error

    def open_handle(handle: dict[str, Any]) -> Any:
        return shared.SharedTensorContainer.from_dict(handle).get_local_view()

    return encoder, open_handle


def first_text(api: MediaApi, model: Path) -> str:
    """Return the text of the tokens that the model's tokenizer puts before every prompt by itself."""
    tokenizer = api.tokenizer(str(model))
    alone = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    return str(tokenizer.decode(whole[: whole.index(alone[0])]))
