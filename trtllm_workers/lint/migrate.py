"""What became of old keys: on plain mappings, as the truth that a mended file must mean. Edits no text."""

from __future__ import annotations

import copy
from typing import Any

FLATTENED = "pytorch_backend_config"
OVERLAP = "enable_overlap_scheduler"
OVERLAP_NOW = "disable_overlap_scheduler"
USE_GRAPHS = "use_cuda_graph"
GRAPHS = "cuda_graph_config"
# The old switch, written into the new section.
USE_GRAPHS_INSIDE = f"{GRAPHS}.{USE_GRAPHS}"

# Old dotted key → where its value belongs now.
MOVED = {
    "cuda_graph_padding_enabled": f"{GRAPHS}.enable_padding",
    "cuda_graph_batch_sizes": f"{GRAPHS}.batch_sizes",
    "cuda_graph_max_batch_size": f"{GRAPHS}.max_batch_size",
    f"{GRAPHS}.enable_graph_padding": f"{GRAPHS}.enable_padding",
    f"{GRAPHS}.padding_enabled": f"{GRAPHS}.enable_padding",
    f"{GRAPHS}.cuda_graph_padding_enabled": f"{GRAPHS}.enable_padding",
    f"{GRAPHS}.cuda_graph_batch_sizes": f"{GRAPHS}.batch_sizes",
    f"{GRAPHS}.cuda_graph_max_batch_size": f"{GRAPHS}.max_batch_size",
    "kv_cache_dtype": "kv_cache_config.dtype",
    "moe_backend": "moe_config.backend",
    "moe_load_balancer": "moe_config.load_balancer",
    "moe_max_num_tokens": "moe_config.max_num_tokens",
    "speculative_config.pytorch_weights_path": "speculative_config.speculative_model",
}


def old_keys(config: dict[str, Any]) -> list[str]:
    """Return the old keys that stand in a config, dotted, the ones that hold others first."""
    found = [key for key in (FLATTENED, OVERLAP, USE_GRAPHS) if key in config]
    if isinstance(config.get(GRAPHS), dict) and USE_GRAPHS in config[GRAPHS]:
        found.append(USE_GRAPHS_INSIDE)
    for old in MOVED:
        section, _, key = old.rpartition(".")
        inner = config.get(section) if section else config
        if isinstance(inner, dict) and key in inner:
            found.append(old)
    return found


def migrated(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with every old key where it belongs now; what stands there already stays."""
    new = copy.deepcopy(config)
    if isinstance(new.get(FLATTENED), dict):
        for key, value in new.pop(FLATTENED).items():
            new.setdefault(key, value)
    if OVERLAP in new:
        new.setdefault(OVERLAP_NOW, not new.pop(OVERLAP))
    graphs_off = USE_GRAPHS in new and not new.pop(USE_GRAPHS)
    if isinstance(new.get(GRAPHS), dict) and USE_GRAPHS in new[GRAPHS]:
        graphs_off |= not new[GRAPHS].pop(USE_GRAPHS)
    for old, now in MOVED.items():
        section, _, key = old.rpartition(".")
        inner = new.get(section) if section else new
        if not isinstance(inner, dict) or key not in inner:
            continue
        value = inner.pop(key)
        home, _, name = now.rpartition(".")
        target = new.get(home)
        if not isinstance(target, dict):
            target = new[home] = {}
        target.setdefault(name, value)
    if graphs_off:
        new[GRAPHS] = None
    return new
