"""Which options of the settings table each process takes. Knows no value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_workers.types import Role

if TYPE_CHECKING:
    from trtllm_workers.config.settings import Settings

# How a process finds the others and proves that it belongs to them.
_MEETING = (
    "discovery",
    "etcd_endpoints",
    "namespace",
    "etcd_username",
    "etcd_password",
    "etcd_cacert",
    "etcd_cert",
    "etcd_key",
    "plane_cacert",
    "plane_cert",
    "plane_key",
    "cluster_secret",
)
_ROUTER = (
    "router_mode",
    "router_events",
    "router_overlap_weight",
    "router_load_weight",
    "router_free_weight",
    "router_temperature",
    "router_affinity_cap",
    "router_ttl_s",
)
_QUEUE = (
    "prefill_dispatch",
    "max_prefill_queue_size",
    "nats_server",
    "nats_user",
    "nats_password",
    "nats_token",
    "nats_cacert",
    "nats_cert",
    "nats_key",
)
# The role of the NATS server that a run starts for itself, and its name.
NATS = "nats"
# The role of the etcd server that a job on several hosts starts for itself, and its name.
ETCD = "etcd"
# What a worker may load for images, and how much of it.
_IMAGES = (
    "modality",
    "allowed_local_media_path",
    "media_url_host",
    "allow_pickle_embeddings",
    "max_file_size_mb",
    "max_image_pixels",
    "max_images",
    "media_timeout_s",
    "media_cache_mb",
)
# What serves the others rather than requests for tokens.
SERVICES = frozenset({"ingress", NATS, ETCD})
# Of the NATS server that a run starts for itself.
NATS_OPTIONS = (*_MEETING, "log_level", "log_format")
# Of the etcd that a job starts for itself: it is what the others meet in.
ETCD_OPTIONS = ("cluster_secret", "log_level", "log_format")
INGRESS_OPTIONS = (
    "http_host",
    "http_port",
    "strategy",
    *_ROUTER,
    "encode_timeout_s",
    "drain_timeout_s",
    "plane_host",
    *_MEETING,
    "log_level",
    "log_format",
)
# What it takes to find a deployment and to be believed by it.
STOP_OPTIONS = ("drain_timeout_s", *_MEETING)
_EVERY_WORKER = (
    "model_path",
    "served_model_name",
    "lora",
    "engine",
    "engine_config",
    "overrides",
    "lint",
    "sim_cost_model",
    *_IMAGES,
    "kv_transport",  # KV blocks where prefill and decode are apart, embeddings of images everywhere
    "stall_timeout_s",
    "drain_timeout_s",
    "plane_host",
    *_MEETING,
    "log_level",
    "log_format",
)
_PAIRED_WORKER = (
    "max_local_prefill_length",
    "prefill_timeout_s",
    "handoff_min_timeout_s",
    "handoff_max_timeout_s",
    "canary_interval_s",
    *_QUEUE,
)
# The flags of the worker command, whatever its role.
WORKER_OPTIONS = (*_EVERY_WORKER, *_PAIRED_WORKER)

# The option that names a role's engine config.
ENGINE_CONFIG_OF = {
    Role.AGGREGATED: "engine_config",
    Role.PREFILL: "prefill_engine_config",
    Role.DECODE: "decode_engine_config",
    Role.ENCODE: "encode_engine_config",
}


def roles_of(settings: Settings) -> tuple[Role, ...]:
    """Return the roles of the workers that a run starts."""
    roles = (Role.PREFILL, Role.DECODE) if settings.disaggregated else (Role.AGGREGATED,)
    return (*roles, Role.ENCODE) if settings.num_encode_workers else roles


def worker_options(role: Role) -> tuple[str, ...]:
    """Return the options that mean something to a worker of that role."""
    return WORKER_OPTIONS if role in (Role.PREFILL, Role.DECODE) else _EVERY_WORKER
