"""What a Hugging Face folder's config.json tells of its model. Reads no weights and no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from trtllm_workers.errors import ConfigError


@dataclass(frozen=True, slots=True)
class HfModel:
    """``config_id`` is the folder's name and a hash of its config.json: equal on every host that has a
    copy. ``special_ids`` are bos, eos and pad. ``text`` is the language model's part of config.json.
    """

    config_id: str
    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    special_ids: frozenset[int]
    text: Mapping[str, Any] = field(repr=False)


def read_hf_model(folder: Path) -> HfModel:
    """Read config.json and, if present, generation_config.json.

    Raises ConfigError naming the folder, the file or the key that is missing or broken.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"model folder {folder} does not exist; give the folder of a Hugging Face checkpoint",
            param="model_path",
        )
    path = folder / "config.json"
    config = read_json(path)
    if config is None:
        raise ConfigError(
            f"{folder} holds no config.json; give the folder of a Hugging Face checkpoint",
            param="model_path",
        )
    generation = read_json(folder / "generation_config.json") or {}
    text = config.get("text_config")  # multimodal checkpoints keep their language model here
    text = {**config, **text} if isinstance(text, dict) else config
    eos = _ids(generation.get("eos_token_id")) or _ids(text.get("eos_token_id"))
    special = {*eos}
    for source in (text, generation):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            special.update(_ids(source.get(name)))
    digest = blake2b(path.read_bytes(), digest_size=4).hexdigest()
    return HfModel(
        config_id=f"{folder.resolve().name}-{digest}",
        vocab_size=_positive(path, text, "vocab_size"),
        max_positions=_positive(path, text, "max_position_embeddings"),
        eos_token_ids=eos,
        special_ids=frozenset(special),
        text=text,
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a file's JSON object, None where there is no file. Raises ConfigError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}:{error.lineno}: no JSON: {error.msg}; the file may be cut short",
            param="model_path",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ConfigError(f"{path} cannot be read: {reason}", param="model_path") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds no JSON object", param="model_path")
    return content


def _positive(path: Path, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            f"{path}: '{key}' must be a positive whole number, not {value!r}", param="model_path"
        )
    return value


def _ids(value: Any) -> tuple[int, ...]:
    """Return a config's token id, list of ids or nothing as a tuple."""
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if type(item) is int and item >= 0)
