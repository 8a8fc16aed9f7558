"""The part of the options table that concerns where requests go. Resolves nothing."""

from __future__ import annotations

from trtllm_workers.config.option import Option

_GROUP = "router"

ROUTER_OPTIONS: tuple[Option, ...] = (
    Option(
        name="router_mode",
        flag="--router-mode",
        env=("ROUTER_MODE", "DYN_ROUTER_MODE"),
        default="least_loaded",
        kind=str,
        # Spelled out as the engines are; a test compares with the type.
        choices=("random", "round_robin", "least_loaded", "kv"),
        help="How a request's workers are chosen; kv sends it where its prefix is cached.",
        group=_GROUP,
    ),
    Option(
        name="router_events",
        flag="--router-events",
        env=("ROUTER_EVENTS",),
        default="on",
        kind=str,
        choices=("on", "off"),
        help="Mode kv learns from workers' KV events what is cached; off: it guesses from its choices.",
        group=_GROUP,
    ),
    Option(
        name="router_overlap_weight",
        flag="--router-overlap-weight",
        env=("ROUTER_OVERLAP_WEIGHT", "DYN_KV_OVERLAP_SCORE_WEIGHT"),
        default=1.0,
        kind=float,
        minimum=0.0,
        maximum=1000.0,
        help="Mode kv: weight of prompt blocks that a worker still has to compute.",
        group=_GROUP,
    ),
    Option(
        name="router_load_weight",
        flag="--router-load-weight",
        env=("ROUTER_LOAD_WEIGHT",),
        default=1.0,
        kind=float,
        minimum=0.0,
        maximum=1000.0,
        help="Mode kv: weight of what a worker decodes already.",
        group=_GROUP,
    ),
    Option(
        name="router_free_weight",
        flag="--router-free-weight",
        env=("ROUTER_FREE_WEIGHT",),
        default=1.0,
        kind=float,
        minimum=0.0,
        maximum=1000.0,
        help="Mode kv: weight of blocks that a request needs and a worker does not have free.",
        group=_GROUP,
    ),
    Option(
        name="router_temperature",
        flag="--router-temperature",
        env=("ROUTER_TEMPERATURE", "DYN_ROUTER_TEMPERATURE"),
        default=0.0,
        kind=float,
        minimum=0.0,
        maximum=1000.0,
        help="Mode kv: 0 takes the cheapest worker; above, cheaper ones are likelier.",
        group=_GROUP,
    ),
    Option(
        name="router_affinity_cap",
        flag="--router-affinity-cap",
        env=("ROUTER_AFFINITY_CAP",),
        default=2.0,
        kind=float,
        minimum=0.0,
        maximum=1000.0,
        help="Mode kv: above so many times the mean load a worker's cache counts nothing; 0 = no cap.",
        group=_GROUP,
    ),
    Option(
        name="router_ttl_s",
        flag="--router-ttl-s",
        env=("ROUTER_TTL_S",),
        default=120.0,
        kind=float,
        minimum=0.1,
        maximum=86400.0,
        metavar="SECONDS",
        help="Mode kv without events: how long a prompt is taken for cached after its last use.",
        group=_GROUP,
    ),
)
