"""The table of launcher options: name, flag, variable, default, bounds, help. Resolves nothing.

``cli/`` makes its flags from this table, ``settings.py`` resolves it, and both use the same words.
Keys of engine configs are not here: each engine states its own (``keys.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Option:
    """One launcher option.

    * ``flag`` None: there is none (a secret on a command line would show in ``ps``).
    * ``env``: the variables that set it, first wins. An empty variable counts as unset.
    * ``default`` None with ``default_text``: computed when settings are resolved; the text says how.
    * ``kind`` is str, int, float, bool or Path. ``minimum`` and ``maximum`` are inclusive.
    * ``multiple``: the flag may be repeated; the value is a tuple.
    * ``metavar`` stands for the value in help and messages; empty: derived from ``kind``.
    """

    name: str
    flag: str | None
    env: tuple[str, ...]
    default: Any
    kind: type
    help: str
    group: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    secret: bool = False
    multiple: bool = False
    default_text: str = ""
    metavar: str = ""


# The order of groups in --help.
GROUPS = ("model", "engine", "ingress", "workers", "planes", "logs")

LAUNCH_OPTIONS: tuple[Option, ...] = (
    Option(
        name="model_path",
        flag="--model-path",
        env=("MODEL_PATH",),
        default=None,
        default_text="the demo model",
        kind=Path,
        metavar="DIR",
        help="Folder of a Hugging Face checkpoint (config.json, tokenizer, safetensors).",
        group="model",
    ),
    Option(
        name="served_model_name",
        flag="--served-model-name",
        env=("SERVED_MODEL_NAME",),
        default=None,
        default_text="last folder of the model path",
        kind=str,
        metavar="NAME",
        help="Name of the model in /v1/models and in requests.",
        group="model",
    ),
    Option(
        name="engine",
        flag="--engine",
        env=("ENGINE",),
        default="auto",
        kind=str,
        # Spelled out because this floor may not import engines; a test compares with the registry.
        choices=("auto", "sim", "torch"),
        help="What generates tokens; auto takes torch in this version.",
        group="engine",
    ),
    Option(
        name="engine_config",
        flag="--engine-config",
        env=("AGG_ENGINE_ARGS",),
        default=None,
        default_text="engine_configs/agg.yaml",
        kind=Path,
        metavar="FILE",
        help="YAML with TensorRT-LLM's own keys for the engine.",
        group="engine",
    ),
    Option(
        name="overrides",
        flag="--set",
        env=(),
        default=(),
        kind=str,
        metavar="KEY=VALUE",
        help="Override one engine-config key, e.g. kv_cache_config.max_tokens=4096; repeatable.",
        group="engine",
        multiple=True,
    ),
    Option(
        name="sim_cost_model",
        flag="--sim-cost-model",
        env=("SIM_COST_MODEL",),
        default=None,
        default_text="the engine's own",
        kind=Path,
        metavar="FILE",
        help="YAML with the sim engine's costs of prefill and decode.",
        group="engine",
    ),
    Option(
        name="http_host",
        flag="--http-host",
        env=("HTTP_HOST", "DYN_HTTP_HOST"),
        default="127.0.0.1",
        kind=str,
        metavar="HOST",
        help="Address the ingress listens on; 0.0.0.0 opens it to the network.",
        group="ingress",
    ),
    Option(
        name="http_port",
        flag="--http-port",
        env=("HTTP_PORT", "DYN_HTTP_PORT"),
        default=8000,
        kind=int,
        minimum=0,
        maximum=65535,
        metavar="PORT",
        help="Port of the ingress; 0 takes a free one and prints it.",
        group="ingress",
    ),
    Option(
        name="num_workers",
        flag="--num-workers",
        env=("NUM_WORKERS",),
        default=1,
        kind=int,
        minimum=1,
        maximum=256,
        metavar="N",
        help="How many workers to start.",
        group="workers",
    ),
    Option(
        name="start_timeout_s",
        flag="--start-timeout-s",
        env=("START_TIMEOUT_S",),
        default=300.0,
        kind=float,
        minimum=1.0,
        maximum=86400.0,
        metavar="SECONDS",
        help="How long every part together may take to become ready.",
        group="workers",
    ),
    Option(
        name="drain_timeout_s",
        flag="--drain-timeout-s",
        env=("DRAIN_TIMEOUT_S",),
        default=30.0,
        kind=float,
        minimum=0.0,
        maximum=86400.0,
        metavar="SECONDS",
        help="How long running requests may go on after a stop; 0 ends them at once.",
        group="workers",
    ),
    Option(
        name="discovery",
        flag="--discovery",
        env=("DISCOVERY",),
        default=None,
        default_text="a directory of this run",
        kind=str,
        metavar="URL",
        help="Where workers register: file:///absolute/directory.",
        group="planes",
    ),
    Option(
        name="cluster_secret",
        flag=None,
        env=("CLUSTER_SECRET",),
        default=None,
        default_text="a fresh random one for each run",
        kind=str,
        help="Secret that authenticates the processes to each other, 16 characters or more.",
        group="planes",
        secret=True,
    ),
    Option(
        name="run_dir",
        flag="--run-dir",
        env=("RUN_DIR",),
        default=None,
        default_text="~/.local/state/trtllm-launch",
        kind=Path,
        metavar="DIR",
        help="Where runs keep their records; ps and stop look there.",
        group="logs",
    ),
    Option(
        name="log_dir",
        flag="--log-dir",
        env=("LOG_DIR",),
        default=None,
        default_text="logs in the run's own folder",
        kind=Path,
        metavar="DIR",
        help="Where each process writes its log file.",
        group="logs",
    ),
    Option(
        name="log_level",
        flag="--log-level",
        env=("LOG_LEVEL",),
        default="info",
        kind=str,
        choices=("debug", "info", "warning", "error"),
        help="Least severe log line to write.",
        group="logs",
    ),
    Option(
        name="log_format",
        flag="--log-format",
        env=("LOG_FORMAT",),
        default="console",
        kind=str,
        choices=("console", "json"),
        help="One JSON object per line for machines, or text for people.",
        group="logs",
    ),
)
