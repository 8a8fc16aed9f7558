"""Merging the keys of a YAML file into the arguments of ``LLM``."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

_DECODING = ("MTP", "Medusa", "Eagle", "Lookahead", "NGram", "DraftTarget", "SaveState", "AUTO")


def update_llm_args_with_extra_dict(
    llm_args: dict[str, Any],
    llm_args_dict: dict[str, Any],
    extra_llm_api_options: str | None = None,
) -> dict[str, Any]:
    """Return ``llm_args`` with the given ones over them.

    Two sections become objects by their selector. Only kv_cache_config is merged key by key; every other
    section replaces the earlier one.
    """
    given = dict(llm_args_dict)
    speculative = given.get("speculative_config")
    if isinstance(speculative, dict):
        keys = dict(speculative)
        kind = keys.pop("decoding_type", None)
        if kind not in _DECODING:
            raise ValueError(f"Invalid decoding type: {kind}")
        given["speculative_config"] = SimpleNamespace(decoding_type=kind, **keys)
    sparse = given.get("sparse_attention_config")
    if isinstance(sparse, dict):
        keys = dict(sparse)
        given["sparse_attention_config"] = SimpleNamespace(
            algorithm=str(keys.pop("algorithm")).lower(), **keys
        )
    merged = {**llm_args, **given}
    if isinstance(llm_args.get("kv_cache_config"), dict) and "kv_cache_config" in given:
        merged["kv_cache_config"] = {**llm_args["kv_cache_config"], **given["kv_cache_config"]}
    return merged


def update_llm_args_with_extra_options(llm_args: dict[str, Any], path: str) -> dict[str, Any]:
    """Return ``llm_args`` with the keys of a YAML file over them."""
    return update_llm_args_with_extra_dict(
        llm_args, yaml.safe_load(Path(path).read_text()) or {}, path
    )
