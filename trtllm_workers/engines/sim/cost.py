"""What a step costs, and the YAML that says so. Knows no request and no clock.

A step is one pass over prefill chunks and decoding streams together::

    step = max(base of the parts present)
         + Σ uncached prompt tokens × (per_token + per_token_context × their mean context)
         + decoding streams × per_sequence + tokens they hold in KV × per_kv_token

The base stands for reading the weights, which one pass does once; hence the larger of the two. Images
are encoded beside the steps, one after the other::

    image = per_image + its tokens × per_token
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from trtllm_workers.config.spelling import nearest
from trtllm_workers.config.values import coerce, problem, shown
from trtllm_workers.errors import ConfigError


@dataclass(frozen=True, slots=True)
class CostModel:
    """Costs of the built-in default: engine_configs/sim/gpu_8b_assumed.yaml says where they come from.

    Fields carry the YAML's keys with ``_`` for the dot. ``eos_probability`` is the chance of eos at
    each position; ``die_after_steps`` makes the engine die, to rehearse it (0 = never).
    ``kv_block_bytes`` is the size of a KV block in bytes: what a handoff moves for each block. The
    block size of a real model makes transfers as long as its own.
    """

    prefill_base_ms: float = 5.0
    prefill_per_token_us: float = 25.0
    prefill_per_token_context_ns: float = 1.5
    decode_base_ms: float = 5.0
    decode_per_sequence_us: float = 15.0
    decode_per_kv_token_ns: float = 55.0
    eos_probability: float = 0.0
    die_after_steps: int = 0
    kv_block_bytes: int = 64
    encode_ms_per_image: float = 10.0
    encode_us_per_token: float = 20.0

    def prefill_s(self, start: int, num_tokens: int) -> float:
        """Return the seconds of one prompt chunk, base aside; ``start`` tokens lie before it."""
        context = start + num_tokens / 2
        per_token = (
            self.prefill_per_token_us * 1e-6 + self.prefill_per_token_context_ns * 1e-9 * context
        )
        return num_tokens * per_token

    def decode_s(self, num_streams: int, kv_tokens: int) -> float:
        """Return the seconds of one token for each of ``num_streams``, base aside."""
        return (
            num_streams * self.decode_per_sequence_us * 1e-6
            + kv_tokens * self.decode_per_kv_token_ns * 1e-9
        )

    def encode_s(self, num_tokens: int) -> float:
        """Return the seconds of one image in the vision tower."""
        return self.encode_ms_per_image * 1e-3 + num_tokens * self.encode_us_per_token * 1e-6

    def base_s(self, *, prefill: bool, decode: bool) -> float:
        """Return the seconds every step of these parts takes."""
        return max(self.prefill_base_ms * prefill, self.decode_base_ms * decode) * 1e-3


# A day per step: beyond that a cost is a slip of units, and clocks lose precision.
_MAX_MS = 86_400_000.0
_SECTIONS = ("prefill", "decode", "encode")
# Fewer bytes would not tell blocks from each other; more are no block of any model.
_MIN_BLOCK_BYTES, _MAX_BLOCK_BYTES = 16, 1 << 28
_KEYS: dict[str, tuple[str, type, float, float]] = {
    "prefill.base_ms": ("prefill_base_ms", float, 0, _MAX_MS),
    "prefill.per_token_us": ("prefill_per_token_us", float, 0, _MAX_MS),
    "prefill.per_token_context_ns": ("prefill_per_token_context_ns", float, 0, _MAX_MS),
    "decode.base_ms": ("decode_base_ms", float, 0, _MAX_MS),
    "decode.per_sequence_us": ("decode_per_sequence_us", float, 0, _MAX_MS),
    "decode.per_kv_token_ns": ("decode_per_kv_token_ns", float, 0, _MAX_MS),
    "encode.ms_per_image": ("encode_ms_per_image", float, 0, _MAX_MS),
    "encode.us_per_token": ("encode_us_per_token", float, 0, _MAX_MS),
    "eos_probability": ("eos_probability", float, 0, 1.0),
    "die_after_steps": ("die_after_steps", int, 0, 1e12),
    "kv_block_bytes": ("kv_block_bytes", int, _MIN_BLOCK_BYTES, _MAX_BLOCK_BYTES),
}
_NO_COST = ("kv_block_bytes",)  # left out, they keep their default


def load_cost(path: Path) -> CostModel:
    """Return the costs a YAML states; a cost it leaves out is 0.

    Raises ConfigError with file:line for what cannot be read, unknown keys and impossible values.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ConfigError(
            f"sim cost model {path} cannot be read: {reason}", param="cost_path"
        ) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: no YAML: {error.problem}", param="cost_path") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no YAML: {error}", param="cost_path") from error
    values: dict[str, Any] = {
        field.name: field.default if field.name in _NO_COST else 0 for field in fields(CostModel)
    }
    if root is not None:
        _read_mapping(path, root, "", values, set())
    return CostModel(**values)


def _read_mapping(
    path: Path, node: yaml.Node, prefix: str, values: dict[str, Any], seen: set[str]
) -> None:
    if not isinstance(node, yaml.MappingNode):
        what = f"'{prefix[:-1]}'" if prefix else "the file"
        raise _wrong(path, node, f"{what} must hold 'key: value' lines")
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _wrong(path, key_node, "keys must be plain names")
        key = f"{prefix}{key_node.value}"
        if key in seen:
            raise _wrong(path, key_node, f"'{key}' is given twice")
        seen.add(key)
        if key in _SECTIONS:
            _read_mapping(path, value_node, f"{key}.", values, seen)
        elif key in _KEYS:
            values[_KEYS[key][0]] = _number(path, key, value_node)
        else:
            near = nearest(key, [*_KEYS, *_SECTIONS])
            hint = f"did you mean '{near}'?" if near else f"known keys: {', '.join(_KEYS)}"
            raise _wrong(path, key_node, f"unknown key '{key}'\n  {hint}")


def _number(path: Path, key: str, node: yaml.Node) -> Any:
    _name, kind, minimum, maximum = _KEYS[key]
    loader = yaml.SafeLoader("")
    try:
        raw = loader.construct_object(node, deep=True)
        value = coerce(raw, kind)
    except (ValueError, yaml.YAMLError):
        what = "a whole number" if kind is int else "a number"
        given = shown(node.value) if isinstance(node, yaml.ScalarNode) else "a list or section"
        raise _wrong(path, node, f"'{key}' must be {what}, not {given}") from None
    finally:
        loader.dispose()
    wrong = problem(value, minimum=minimum, maximum=maximum)
    if wrong:
        raise _wrong(path, node, f"'{key}' {wrong}")
    return value


def _wrong(path: Path, node: yaml.Node, what: str) -> ConfigError:
    return ConfigError(f"{path}:{node.start_mark.line + 1}: {what}", param="cost_path")
