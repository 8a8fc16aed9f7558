"""Which options of the settings table each process takes. Imports nothing."""

from __future__ import annotations

INGRESS_OPTIONS = (
    "http_host",
    "http_port",
    "drain_timeout_s",
    "discovery",
    "cluster_secret",
    "log_level",
    "log_format",
)
WORKER_OPTIONS = (
    "model_path",
    "served_model_name",
    "engine",
    "engine_config",
    "overrides",
    "sim_cost_model",
    "drain_timeout_s",
    "discovery",
    "cluster_secret",
    "log_level",
    "log_format",
)
