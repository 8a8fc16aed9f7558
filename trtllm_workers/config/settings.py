"""Launcher settings: flag over environment over default, each value with its source. No YAML here.

A caller does::

    settings = resolve(flags, environment(), demo=(demo_model_path(), DEMO_MODEL_NAME))
    for warning in settings.warnings: ...
    keys = engine_keys(settings.engine)
    config = load_engine_config(
        settings.engine, keys, settings.engine_config, settings.overrides
    )
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtllm_workers.config.disaggregation import settle_disaggregation
from trtllm_workers.config.engine_config import Override, parse_override
from trtllm_workers.config.env import hub_cache_dir, state_dir, suspicious_variables
from trtllm_workers.config.images import settle_images
from trtllm_workers.config.layers import Layers, file_problem
from trtllm_workers.config.model_folder import model_folder_problem, served_name
from trtllm_workers.config.options import GROUPS, LAUNCH_OPTIONS, Option
from trtllm_workers.config.outside import settle_planes
from trtllm_workers.config.shipped import shipped_engine_config
from trtllm_workers.config.tables import table
from trtllm_workers.config.values import shown
from trtllm_workers.errors import ConfigError

__all__ = ["GROUPS", "LAUNCH_OPTIONS", "Option", "Settings", "resolve", "show_settings"]

_SHORTEST_SECRET = 16
_SHIPPED_CONFIG = "agg.yaml"

# What ``auto`` stands for on this host: the engine, and why ("": nobody looked).
AutoEngine = Callable[[], tuple[str, str]]


def _torch_unseen() -> tuple[str, str]:
    return "torch", ""


@dataclass(frozen=True, slots=True)
class Settings:
    """All launcher settings; field names are those of ``LAUNCH_OPTIONS``.

    ``engine`` and ``modality`` are never ``auto``; the engine configs of the roles that are started are files that
    exist. None means: ``…_cuda_visible_devices`` the planner's share, ``discovery`` a directory of
    the run, ``cluster_secret`` a random one for the run, ``log_dir`` in the run's own folder,
    ``sim_cost_model`` the engine's own. ``sources`` tells where each value came from; ``warnings``
    are for the operator's eyes.
    """

    model_path: Path
    served_model_name: str
    lora: tuple[tuple[str, Path], ...]
    engine: str
    engine_config: Path | None
    overrides: tuple[Override, ...]
    lint: str
    sim_cost_model: Path | None
    http_host: str
    http_port: int
    num_workers: int
    gpus_per_node: int | None
    mpi_launch: str
    mpi_cmd: str | None
    max_restarts: int
    stall_timeout_s: float
    disaggregated: bool
    strategy: str
    num_prefill_workers: int
    num_decode_workers: int
    prefill_engine_config: Path | None
    decode_engine_config: Path | None
    prefill_cuda_visible_devices: str | None
    decode_cuda_visible_devices: str | None
    kv_transport: str
    max_local_prefill_length: int
    prefill_dispatch: str
    max_prefill_queue_size: int
    prefill_timeout_s: float
    handoff_min_timeout_s: float
    handoff_max_timeout_s: float
    canary_interval_s: float
    modality: str
    num_encode_workers: int
    encode_engine_config: Path | None
    encode_cuda_visible_devices: str | None
    allowed_local_media_path: Path | None
    media_url_host: tuple[str, ...]
    allow_pickle_embeddings: bool
    max_file_size_mb: int
    max_image_pixels: int
    max_images: int
    media_timeout_s: float
    media_cache_mb: int
    encode_timeout_s: float
    start_timeout_s: float
    drain_timeout_s: float
    router_mode: str
    router_events: str
    router_overlap_weight: float
    router_load_weight: float
    router_free_weight: float
    router_temperature: float
    router_affinity_cap: float
    router_ttl_s: float
    discovery: str | None
    etcd_endpoints: str | None
    plane_host: str
    namespace: str
    etcd_username: str | None
    etcd_password: str | None = field(repr=False)
    etcd_cacert: Path | None
    etcd_cert: Path | None
    etcd_key: Path | None
    nats_server: str | None
    nats_user: str | None
    nats_password: str | None = field(repr=False)
    nats_token: str | None = field(repr=False)
    nats_cacert: Path | None
    nats_cert: Path | None
    nats_key: Path | None
    plane_cacert: Path | None
    plane_cert: Path | None
    plane_key: Path | None
    cluster_secret: str | None = field(repr=False)
    run_dir: Path
    log_dir: Path | None
    log_level: str
    log_format: str
    sources: Mapping[str, str] = field(repr=False)
    warnings: tuple[str, ...] = ()


def resolve(
    explicit: Mapping[str, Any],
    environ: Mapping[str, str],
    *,
    demo: tuple[Path, str] | None = None,
    with_model: bool = True,
    of_one_part: bool = False,
    auto_engine: AutoEngine = _torch_unseen,
) -> Settings:
    """Return the settings of this run: ``explicit`` over ``environ`` over the defaults.

    ``explicit`` holds what was given on the command line by option name, as text or typed; None or
    () means not given. ``demo`` is (folder, served name) of the model to take when none is given.
    ``with_model`` False is for a process without one: ``model_path`` is then not looked at.
    ``of_one_part`` is for one process of a deployment: it does not know which others there are, so
    nothing is said of settings without effect on them. ``auto_engine`` is asked when the engine is
    ``auto``.
    Raises ConfigError naming every wrong flag and variable at once; ``param`` is the first's name.
    """
    unknown = set(explicit) - {option.name for option in LAUNCH_OPTIONS}
    if unknown:
        raise TypeError(f"not in LAUNCH_OPTIONS: {', '.join(sorted(unknown))}")
    layers = Layers(explicit, environ)
    _settle_engine(layers, auto_engine)
    settle_disaggregation(layers, of_one_part=of_one_part)
    if with_model:
        _settle_model(layers, environ, demo)
    else:
        layers.default("model_path", Path())
        layers.default("served_model_name", "")
    settle_images(
        layers, layers.values["model_path"] if with_model else None, of_one_part=of_one_part
    )
    _settle_planes(layers)
    layers.default("run_dir", state_dir(environ))
    if layers.problems:
        raise ConfigError(
            "\n".join(text for _, text in layers.problems), param=layers.problems[0][0]
        )
    ours = {variable for option in LAUNCH_OPTIONS for variable in option.env}
    warnings = (*layers.warnings, *suspicious_variables(ours, environ))
    return Settings(**layers.values, sources=layers.sources, warnings=warnings)


def _settle_engine(layers: Layers, auto_engine: AutoEngine) -> None:
    values = layers.values
    if values["engine"] == "auto":
        values["engine"], why = auto_engine()
        because = f": {why}" if why else ""
        layers.sources["engine"] += f" (auto takes {values['engine']}{because})"
    if values["engine_config"] is None:
        layers.default("engine_config", shipped_engine_config(_SHIPPED_CONFIG))
    if wrong := file_problem(values["sim_cost_model"]):
        layers.fail("sim_cost_model", wrong)
    # In a disaggregated run it has no effect, so it cannot be wrong either.
    if not values["disaggregated"] and (wrong := file_problem(values["engine_config"])):
        layers.fail("engine_config", wrong)
    if values["sim_cost_model"] is not None and values["engine"] != "sim":
        source = layers.sources["sim_cost_model"]
        layers.warnings.append(f"{source} has no effect: the engine is {values['engine']}, not sim")
    overrides = []
    for text in values["overrides"]:
        try:
            overrides.append(parse_override(text, "--set"))
        except ConfigError as error:
            layers.problems.append(("overrides", str(error)))
    values["overrides"] = tuple(overrides)
    _settle_lora(layers)


def _settle_lora(layers: Layers) -> None:
    adapters: dict[str, Path] = {}
    for text in layers.values["lora"]:
        name, equals, folder = text.partition("=")
        path = Path(folder).expanduser()
        if not equals or not name.strip() or not folder.strip():
            layers.fail("lora", f"must be NAME=DIR, not {shown(text)}")
        elif name in adapters:
            layers.fail("lora", f"names the adapter {shown(name)} twice")
        elif not path.is_dir():
            layers.fail("lora", f"there is no folder {shown(path)}")
        adapters[name] = path
    layers.values["lora"] = tuple(adapters.items())


def _settle_model(
    layers: Layers, environ: Mapping[str, str], demo: tuple[Path, str] | None
) -> None:
    values = layers.values
    if values["model_path"] is None and demo is not None:
        values["model_path"], layers.sources["model_path"] = demo[0], "default (demo model)"
        layers.default("served_model_name", demo[1], "default (demo model)")
    path = values["model_path"]
    if path is None:
        layers.fail("model_path", "no model: give --model-path DIR or set MODEL_PATH")
        return
    wrong = model_folder_problem(path, hub_cache_dir(environ))
    if wrong:
        layers.fail("model_path", wrong)
    layers.default("served_model_name", served_name(path), "last folder of the model path")


def _settle_planes(layers: Layers) -> None:
    values = layers.values
    host = values["http_host"]
    if "/" in host or host.startswith("[") or host.count(":") == 1:
        layers.fail("http_host", f"must be a host name or an address alone, not {shown(host)}")
    settle_planes(layers)
    secret = values["cluster_secret"]
    if secret is not None and len(secret) < _SHORTEST_SECRET:
        layers.fail(
            "cluster_secret",
            f"must have {_SHORTEST_SECRET} characters or more; one comes from: openssl rand -hex 32",
        )


def show_settings(settings: Settings, only: Collection[str] | None = None) -> str:
    """Return the settings as a table: option, value, source. A secret is shown as ``set``."""
    rows = []
    for option in LAUNCH_OPTIONS:
        if only is not None and option.name not in only:
            continue
        value = getattr(settings, option.name)
        if option.secret and value is not None:
            text = "set (not shown)"
        elif option.multiple:
            words = (
                "=".join(map(str, one)) if isinstance(one, tuple) else str(one) for one in value
            )
            text = " ".join(words) or option.default_text or "none"
        elif value is None:
            text = option.default_text
        elif isinstance(value, bool):
            text = shown(value)
        else:
            text = str(value)
        rows.append((option.name, text, settings.sources[option.name]))
    return table(("option", "value", "source"), rows)
