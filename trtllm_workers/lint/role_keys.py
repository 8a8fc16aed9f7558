"""What the launcher itself writes into an engine config for TensorRT-LLM, so that a role works. Pure.

Only where the file is silent, but for a flag: what the operator gave on the command line wins over the
file, as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

from trtllm_workers.config.engine_config import Override
from trtllm_workers.config.keys import Setting
from trtllm_workers.config.settings import Settings
from trtllm_workers.errors import ConfigError
from trtllm_workers.types import Role

BACKEND = "cache_transceiver_config.backend"
TIMEOUT = "cache_transceiver_config.kv_transfer_timeout_ms"
# TensorRT-LLM's DEFAULT is NIXL in 1.2, so the name is always written out.
_BACKENDS = {"ucx": "UCX", "nixl": "NIXL", "auto": "UCX"}
_EVENT_BUFFER = 1024


def role_overrides(role: Role, settings: Settings) -> list[Override]:
    """Return the keys that flags and variables decide, with their source.

    Raises ConfigError for a transport that TensorRT-LLM does not have.
    """
    if role not in (Role.PREFILL, Role.DECODE):
        return []
    source = settings.sources["kv_transport"]
    if source == "default":
        return []
    return [Override(BACKEND, _backend(settings.kv_transport, source), source)]


def role_defaults(role: Role, settings: Settings) -> Mapping[str, Setting]:
    """Return what stands for keys that neither the file nor a flag sets; the source names the role."""
    if role is Role.ENCODE:
        return {}  # no KV, no steps that make tokens
    source = f"role {role}"
    found: dict[str, object] = {
        "enable_iter_perf_stats": True,  # load and cache figures come from there
        "kv_cache_config.event_buffer_max_size": _EVENT_BUFFER,
    }
    if role in (Role.PREFILL, Role.DECODE):
        found[BACKEND] = _backend(settings.kv_transport, settings.sources["kv_transport"])
        # Without one TensorRT-LLM waits for ever for a peer that is gone.
        found[TIMEOUT] = round(settings.handoff_max_timeout_s * 1000)
    if role is Role.PREFILL:
        found["disable_overlap_scheduler"] = True
    return {key: Setting(value, source) for key, value in found.items()}


def _backend(transport: str, source: str) -> str:
    if transport not in _BACKENDS:
        raise ConfigError(
            f"{source}: TensorRT-LLM moves KV by ucx or nixl, not by {transport}",
            param="kv_transport",
        )
    return _BACKENDS[transport]
