"""Settings to command lines, and a plan to the shell text that does the same by hand. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_workers.config.images import MULTIMODAL
from trtllm_workers.config.options import LAUNCH_OPTIONS, Option
from trtllm_workers.config.settings import Settings
from trtllm_workers.deploy.names import (
    ENGINE_CONFIG_OF,
    ETCD_OPTIONS,
    INGRESS_OPTIONS,
    NATS,
    NATS_OPTIONS,
    worker_options,
)
from trtllm_workers.deploy.shares import GPU_FRACTION, Crew, Share
from trtllm_workers.types import Role

if TYPE_CHECKING:
    from trtllm_workers.deploy.plan import Plan, PlannedProcess

# -P: a file called types.py or torch.py in the user's folder must not replace a module of ours.
_MODULE = "trtllm_workers.cli.main"
_PYTHON = ("-P", "-m", _MODULE)
# Under mpi4py's own runner an error in one rank ends the whole world instead of leaving it waiting.
_PYTHON_RANK = ("-P", "-m", "mpi4py", "-m", _MODULE)

_EVERY_ADDRESS = "0.0.0.0"

# The plan names one URL for all processes.
_SAID_BY_DISCOVERY = ("discovery", "etcd_endpoints")

# What is said even when it is the default, so that a printed command explains itself.
_ALWAYS = (
    "model_path",
    "served_model_name",
    "engine",
    "engine_config",
    "http_host",
    "http_port",
    "strategy",
    "kv_transport",
)


def ingress_argv(settings: Settings, discovery: str, advertise_host: str = "") -> list[str]:
    """Return the arguments (after the interpreter) of the ingress.

    ``advertise_host`` is the name by which workers on other hosts reach it; "": there are none.
    """
    names = [name for name in INGRESS_OPTIONS if settings.disaggregated or name != "strategy"]
    open_to = ("--plane-host", _EVERY_ADDRESS, "--advertise-host", advertise_host)
    return [
        *(*_PYTHON, "ingress", *_flags(settings, names), "--discovery", discovery),
        *(open_to if advertise_host else ()),
    ]


def nats_argv(settings: Settings, discovery: str, folder: Path) -> list[str]:
    """Return the arguments (after the interpreter) of the run's own NATS server."""
    flags = _flags(settings, NATS_OPTIONS)
    return [*_PYTHON, "nats", "--folder", str(folder), *flags, "--discovery", discovery]


def etcd_argv(settings: Settings, folder: Path, host: str) -> list[str]:
    """Return the arguments (after the interpreter) of a job's own etcd, which listens on ``host``."""
    flags = _flags(settings, ETCD_OPTIONS)
    return [*_PYTHON, "etcd", "--folder", str(folder), "--host", host, *flags]


def worker_argv(
    settings: Settings,
    crew: Crew,
    share: Share,
    worker_id: str,
    discovery: str,
    nats_status: Path | None = None,
) -> list[str]:
    """Return the arguments (after the interpreter) of one worker of ``crew``.

    ``nats_status`` is where the run's own NATS server tells its URL; None: there is none.
    """
    python = _PYTHON_RANK if crew.runs_as_ranks else _PYTHON
    role = [] if crew.role is Role.AGGREGATED else ["--role", str(crew.role)]
    config = getattr(settings, ENGINE_CONFIG_OF[crew.role])
    moves_kv = crew.role in (Role.PREFILL, Role.DECODE)
    names = [
        name
        for name in worker_options(crew.role)
        if name != "kv_transport" or moves_kv or settings.modality == MULTIMODAL
    ]
    # Said to TensorRT-LLM the transport would win over the one that its engine config names; and where
    # no KV moves, embeddings take the best there is.
    says_transport = moves_kv and settings.engine != "trtllm"
    flags = _flags(settings, names, says_transport=says_transport, engine_config=config)
    if settings.num_encode_workers and crew.role in (Role.AGGREGATED, Role.PREFILL):
        flags += ["--encodes", "off"]
    if share.gpu_fraction is not None:
        flags += ["--set", f"{GPU_FRACTION}={share.gpu_fraction:g}"]
    return [
        *(*python, "worker", "--worker-id", worker_id, *role),
        *(*flags, "--discovery", discovery),
        *(("--nats-status-file", str(nats_status)) if nats_status else ()),
        # Its leader may run on another host than the ingress.
        *(("--host", _EVERY_ADDRESS) if crew.method == "srun" else ()),
    ]


def as_shell(plan: Plan) -> str:
    """Return the commands of a plan as shell text: quoted, one process per paragraph, no secret."""
    joint = ", " if " and " in plan.workers_in_words else " and "
    nats = ", 1 NATS server" if any(one.role == NATS for one in plan.processes) else ""
    head = [
        f"# run {plan.run_id}: 1 ingress{nats}{joint}{plan.workers_in_words} "
        f"for model {_one_line(plan.model)}",
        "# By hand: each command in a terminal of its own.",
        *(f"# note: {note}" for note in plan.notes),
        f"mkdir -p -m 700 {shlex.quote(str(plan.folder.path))}",
    ]
    return "\n\n".join(["\n".join(head), *(_paragraph(one) for one in plan.processes)])


def _paragraph(process: PlannedProcess) -> str:
    words = [shlex.quote(word) for word in process.argv]
    # What runs Python, the module and the verb belong on one line; then one option per line.
    start = process.argv.index(_MODULE) + 2
    lines = [" ".join(words[:start])]
    rest = words[start:]
    while rest:
        pair = rest[1:2] if rest[0].startswith("--") and "=" not in rest[0] else []
        lines.append(" ".join([rest[0], *pair]))
        rest = rest[1 + len(pair) :]
    env = "".join(f"{name}={shlex.quote(value)} " for name, value in process.env.items())
    if process.unset:
        env = f"env {' '.join(f'-u {name}' for name in sorted(process.unset))} {env}"
    return f"# {process.name}\n{env}" + " \\\n  ".join(lines)


def _flags(
    settings: Settings, names: Sequence[str], *, says_transport: bool = True, **instead: object
) -> list[str]:
    """Return the flags for everything that is not a default, whatever layer it came from.

    ``instead`` holds values to say in place of the settings' own. Without ``says_transport`` the default
    transport goes unsaid.
    """
    words: list[str] = []
    for option in LAUNCH_OPTIONS:
        if option.name not in names or option.flag is None or option.name in _SAID_BY_DISCOVERY:
            continue
        value: Any = instead.get(option.name, getattr(settings, option.name))
        given = settings.sources[option.name] != "default"
        silent = option.name == "kv_transport" and not says_transport
        if value is None or not (given or (option.name in _ALWAYS and not silent)):
            continue
        for one in value if option.multiple else (value,):
            words += _flag(option, one)
    return words


def _flag(option: Option, value: object) -> list[str]:
    assert option.flag is not None
    if isinstance(value, bool):
        return [option.flag] if value else []
    if isinstance(value, tuple):  # NAME=DIR
        text = "=".join(map(str, value))
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value)
    if option.kind is not str or not text.startswith("-"):
        return [option.flag, text]
    return [f"{option.flag}={text}"]  # a value that begins like a flag must not be read as one


def _one_line(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii")
