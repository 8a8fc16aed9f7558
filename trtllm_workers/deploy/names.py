"""Which options of the settings table each process takes. Knows no value."""

from __future__ import annotations

from trtllm_workers.types import Role

INGRESS_OPTIONS = (
    "http_host",
    "http_port",
    "strategy",
    "drain_timeout_s",
    "discovery",
    "cluster_secret",
    "log_level",
    "log_format",
)
_EVERY_WORKER = (
    "model_path",
    "served_model_name",
    "lora",
    "engine",
    "engine_config",
    "overrides",
    "lint",
    "sim_cost_model",
    "stall_timeout_s",
    "drain_timeout_s",
    "discovery",
    "cluster_secret",
    "log_level",
    "log_format",
)
_PAIRED_WORKER = (
    "kv_transport",
    "max_local_prefill_length",
    "prefill_timeout_s",
    "handoff_min_timeout_s",
    "handoff_max_timeout_s",
    "canary_interval_s",
)
# The flags of the worker command, whatever its role.
WORKER_OPTIONS = (*_EVERY_WORKER, *_PAIRED_WORKER)

# The option that names a role's engine config.
ENGINE_CONFIG_OF = {
    Role.AGGREGATED: "engine_config",
    Role.PREFILL: "prefill_engine_config",
    Role.DECODE: "decode_engine_config",
}


def worker_options(role: Role) -> tuple[str, ...]:
    """Return the options that mean something to a worker of that role."""
    if role is Role.AGGREGATED:
        return _EVERY_WORKER
    return WORKER_OPTIONS
