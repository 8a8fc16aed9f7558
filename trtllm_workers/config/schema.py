"""TensorRT-LLM's own key names, from data. Knows no engine of ours and checks no value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

TRTLLM_VERSION = "1.2.1"


@dataclass(frozen=True, slots=True)
class Schema:
    """The engine-YAML keys of one TensorRT-LLM version.

    ``keys``: dotted key → type as TensorRT-LLM writes it; sections are keys too. ``free``: keys
    under which any key may stand. ``renamed``: keys of older releases and what became of them.
    """

    version: str
    keys: Mapping[str, str]
    free: frozenset[str]
    renamed: Mapping[str, str]

    def knows(self, dotted: str) -> bool:
        """Return whether ``dotted`` is a key, or stands under a key that takes any."""
        if dotted in self.keys:
            return True
        parents = dotted.split(".")[:-1]
        return any(".".join(parents[:end]) in self.free for end in range(1, len(parents) + 1))


@cache
def trtllm_schema(version: str = TRTLLM_VERSION) -> Schema:
    """Return the schema of a TensorRT-LLM version. Raises LookupError for one not described here."""
    name = f"trtllm_{version.replace('.', '_')}.json"
    file = resources.files("trtllm_workers.config").joinpath("schemas", name)
    if not file.is_file():
        raise LookupError(f"no key list for TensorRT-LLM {version}")
    described = json.loads(file.read_text(encoding="utf-8"))
    return Schema(
        version=described["tensorrt_llm"],
        keys=described["keys"],
        free=frozenset(described["free"]),
        renamed=described["renamed"],
    )


def trtllm_keys(version: str = TRTLLM_VERSION) -> frozenset[str]:
    """Return every dotted key of a TensorRT-LLM version's engine YAML, sections included."""
    return frozenset(trtllm_schema(version).keys)
