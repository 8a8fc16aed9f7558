"""What ``ingress`` and ``worker`` share: options of a single process, its secret, its event loop."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trtllm_workers.config.options import Option
from trtllm_workers.config.settings import Settings
from trtllm_workers.config.values import coerce, form, parse, problem, shown
from trtllm_workers.deploy.parent import PARENT_PID
from trtllm_workers.deploy.proc import is_ancestor
from trtllm_workers.errors import ConfigError

if TYPE_CHECKING:
    from trtllm_workers.observe.facts import FactsFile

STATUS_FILE = Option(
    name="status_file",
    flag="--status-file",
    env=(),
    default=None,
    default_text="none",
    kind=Path,
    metavar="FILE",
    help="Where to report how far it has come; 'up' reads it.",
    group="",
)
ADVERTISE_HOST = Option(
    name="advertise_host",
    flag="--advertise-host",
    env=(),
    default=None,
    default_text="what it listens on, or this host's way to etcd",
    kind=str,
    metavar="HOST",
    help="Name, address or network interface by which other hosts reach this process.",
    group="planes",
)


DRY_RUN_HELP = "Check and show every setting, and start nothing."


def own_value(entry: Option, given: Any) -> Any:
    """Return a value of an option that is not in the settings table, checked the same way."""
    if given is None:
        return entry.default
    try:
        value = parse(given, entry.kind) if isinstance(given, str) else coerce(given, entry.kind)
    except ValueError:
        text = f"{entry.flag}: must be {form(entry.kind)}, not {shown(given)}"
        raise ConfigError(text, param=entry.name) from None
    wrong = problem(value, minimum=entry.minimum, maximum=entry.maximum, choices=entry.choices)
    if wrong:
        raise ConfigError(f"{entry.flag}: {wrong}", param=entry.name)
    return value


def discovery_of(settings: Settings) -> str:
    """Return the discovery URL; a process alone has no run to take one from."""
    if settings.discovery is None:
        raise ConfigError(
            "say where workers register: --discovery file:///some/directory, the same for the "
            "ingress and every worker ('trtllm-launch up' does this by itself)",
            param="discovery",
        )
    return settings.discovery


def secret_of(settings: Settings) -> bytes:
    """Return the cluster secret that settings give, or that lies beside discovery. Blocks."""
    from trtllm_workers.config.outside import etcd_login
    from trtllm_workers.planes.discovery import cluster_secret

    return cluster_secret(
        discovery_of(settings), settings.cluster_secret, settings.namespace, etcd_login(settings)
    )


def meeting_points(settings: Settings) -> list[tuple[str, int]]:
    """Return the servers that every process of a deployment must reach: etcd's and NATS's."""
    from urllib.parse import urlsplit

    from trtllm_workers.config.outside import parse_nats
    from trtllm_workers.planes.discovery import etcd_url

    etcd = etcd_url(discovery_of(settings))
    points = [] if etcd is None else list(etcd.endpoints)
    for url in parse_nats(settings.nats_server) if settings.nats_server else ():
        parts = urlsplit(url)
        points.append((parts.hostname or "", parts.port or 0))
    return points


def facts_file(
    status_file: Path | None, environ: Mapping[str, str], role: str, rank: int | None = None
) -> FactsFile:
    """Return what writes down beside the status file what this process sees of its surroundings."""
    from trtllm_workers.config.interfaces import addresses_of_interfaces
    from trtllm_workers.observe.facts import FactsFile

    addresses = []
    if status_file is not None:
        addresses = [(one.interface, one.address) for one in addresses_of_interfaces()]
    return FactsFile(status_file, environ, role=role, rank=rank, addresses=addresses)


def launcher_teller(environ: Mapping[str, str]) -> Callable[[], bool] | None:
    """Return what asks the launcher of this process to end its run; None when it was started alone.

    It returns False when there is no such launcher on this host (any more).
    """
    told = environ.get(PARENT_PID, "")
    if not told.isdigit():
        return None

    def tell() -> bool:
        if not is_ancestor(int(told)):
            return False
        try:
            os.kill(int(told), signal.SIGTERM)
        except OSError:
            return False
        return True

    return tell


def begin_logs(process: str, settings: Settings) -> None:
    """Send this process's log lines to standard error; whoever started it keeps them."""
    from trtllm_workers.observe.logs import setup_logs

    fmt: Literal["console", "json"] = "json" if settings.log_format == "json" else "console"
    setup_logs(process, fmt=fmt, level=settings.log_level, path=None)


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run to the end on uvloop where it is installed, else on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)
