"""What the simulator needs to know of a model folder: config.json. Reads no weights, no tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from trtllm_workers.errors import ConfigError

# Most vocabularies begin with special ids and the 256 single bytes, which make poor text.
_USUAL_SPECIALS = 3
_NUM_BYTES = 256
_FEWEST_WORDS = 64


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """``word_ids`` are the ids the simulator speaks: no special, no eos, no single bytes if possible.

    ``model_id`` is the folder's name and a hash of its config: equal on every host that serves a
    copy of the same model. ``kv_shape`` is layers, KV heads and head dimension; what the config does
    not tell is 1.
    """

    model_id: str
    vocab_size: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    word_ids: tuple[int, ...]
    kv_shape: tuple[int, int, int]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read config.json and, if present, generation_config.json.

    Raises ConfigError naming the folder, the file or the key that is missing or broken.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"model folder {folder} does not exist; give the folder of a Hugging Face checkpoint",
            param="model_path",
        )
    path = folder / "config.json"
    config = _read_json(path)
    if config is None:
        raise ConfigError(
            f"{folder} holds no config.json; give the folder of a Hugging Face checkpoint",
            param="model_path",
        )
    generation = _read_json(folder / "generation_config.json") or {}
    text = config.get("text_config")  # multimodal checkpoints keep their language model here
    text = {**config, **text} if isinstance(text, dict) else config
    vocab_size = _positive(path, text, "vocab_size")
    eos = _ids(generation.get("eos_token_id")) or _ids(text.get("eos_token_id"))
    special = {*eos}
    for source in (text, generation):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            special.update(_ids(source.get(name)))
    words = _word_ids(vocab_size, special)
    if not words:
        raise ConfigError(
            f"{path}: vocab_size {vocab_size} leaves no token beside the special ones",
            param="model_path",
        )
    digest = blake2b(path.read_bytes(), digest_size=4).hexdigest()
    return Checkpoint(
        model_id=f"{folder.resolve().name}-{digest}",
        vocab_size=vocab_size,
        max_positions=_positive(path, text, "max_position_embeddings"),
        eos_token_ids=eos,
        word_ids=words,
        kv_shape=_kv_shape(text),
    )


def _read_json(path: Path) -> dict[str, Any] | None:
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


def _kv_shape(config: dict[str, Any]) -> tuple[int, int, int]:
    """Return layers, KV heads, head dimension; lenient, for they only tell models apart."""

    def count(*keys: str) -> int:
        found = [config[key] for key in keys if type(config.get(key)) is int]
        return max(found[0], 1) if found else 1

    heads = count("num_attention_heads")
    return (
        count("num_hidden_layers"),
        count("num_key_value_heads", "num_attention_heads"),
        count("head_dim") if "head_dim" in config else max(count("hidden_size") // heads, 1),
    )


def _ids(value: Any) -> tuple[int, ...]:
    """Return a config's token id, list of ids or nothing as a tuple."""
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if type(item) is int and item >= 0)


def _word_ids(vocab_size: int, special: set[int]) -> tuple[int, ...]:
    middle = vocab_size // 2
    first = max([_USUAL_SPECIALS - 1, *(i for i in special if i < middle)]) + 1
    # Special ids at the end (Llama 3, Qwen) are followed by nothing but other special ids.
    last = min([vocab_size, *(i for i in special if i >= middle)])
    if last - first >= _NUM_BYTES + _FEWEST_WORDS:
        first += _NUM_BYTES
    return tuple(range(first, last)) or tuple(i for i in range(vocab_size) if i not in special)
