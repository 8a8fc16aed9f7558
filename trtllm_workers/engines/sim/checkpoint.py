"""What the simulator needs to know of a model folder: config.json. Reads no weights, no tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_workers.config.hf_model import read_hf_model
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
    model = read_hf_model(folder)
    words = _word_ids(model.vocab_size, model.special_ids)
    if not words:
        raise ConfigError(
            f"{folder / 'config.json'}: vocab_size {model.vocab_size} leaves no token beside the "
            "special ones",
            param="model_path",
        )
    return Checkpoint(
        model_id=model.config_id,
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
        eos_token_ids=model.eos_token_ids,
        word_ids=words,
        kv_shape=_kv_shape(model.text),
    )


def _kv_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
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


def _word_ids(vocab_size: int, special: Collection[int]) -> tuple[int, ...]:
    middle = vocab_size // 2
    first = max([_USUAL_SPECIALS - 1, *(i for i in special if i < middle)]) + 1
    # Special ids at the end (Llama 3, Qwen) are followed by nothing but other special ids.
    last = min([vocab_size, *(i for i in special if i >= middle)])
    if last - first >= _NUM_BYTES + _FEWEST_WORDS:
        first += _NUM_BYTES
    return tuple(range(first, last)) or tuple(i for i in range(vocab_size) if i not in special)
