"""Names of transports and where they live. Imports one only when asked for it."""

from __future__ import annotations

import importlib
from typing import Final, cast

import structlog

from trtllm_workers.errors import ConfigError, TransportUnavailable
from trtllm_workers.transfer.base import KvPool, KvTransport, OnNotify

log = structlog.get_logger(__name__)

AUTO: Final = "auto"
_ALWAYS_THERE: Final = "tcp"
TRANSPORTS: Final = ("ucx", "nixl", "tcp")  # in the order that "auto" tries them

_CLASSES = {
    "ucx": ("trtllm_workers.transfer.ucx", "UcxTransport"),
    "nixl": ("trtllm_workers.transfer.nixl", "NixlTransport"),
    "tcp": ("trtllm_workers.transfer.tcp", "TcpTransport"),
}


def open_transport(name: str, *, peer_id: str, host: str, on_notify: OnNotify) -> KvTransport:
    """Return a transport, not started. Raises ConfigError for a name that is none.

    Raises TransportUnavailable, naming what to install, when a package it needs is missing.
    """
    if name not in TRANSPORTS:
        raise ConfigError(
            f"unknown KV transport '{name}'; choose one of: {AUTO}, {', '.join(TRANSPORTS)}",
            param="kv_transport",
        )
    module, attribute = _CLASSES[name]
    try:
        build = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise TransportUnavailable(
            f"transport {name} needs the Python package '{error.name}', which cannot be imported "
            f"({error}); run: pip install 'trtllm-launch[{name}]'"
        ) from error
    return cast("KvTransport", build(peer_id=peer_id, host=host, on_notify=on_notify))


async def start_transport(
    wanted: str, pool: KvPool, *, peer_id: str, host: str, on_notify: OnNotify
) -> KvTransport:
    """Return the wanted transport, started on ``pool``; ``auto`` takes the first that starts.

    Raises TransportUnavailable, saying why and what to do, when none does.
    """
    names = TRANSPORTS if wanted == AUTO else (wanted,)
    reasons: list[str] = []
    for name in names:
        try:
            return await _started(name, pool, peer_id=peer_id, host=host, on_notify=on_notify)
        except TransportUnavailable as error:
            if wanted != AUTO:
                raise
            log.info(
                "KV transport cannot start; trying the next", transport=name, reason=str(error)
            )
            reasons.append(f"{name}: {error}")
    raise TransportUnavailable(f"no KV transport starts here: {'; '.join(reasons)}")


async def start_transports(
    wanted: str, pool: KvPool, *, peer_id: str, host: str, on_notify: OnNotify
) -> tuple[KvTransport, ...]:
    """Return the transports that peers may be reached by, started, the best first.

    One, unless ``auto`` is wanted: then the first that starts, and behind it tcp for peers to which
    that has no wire. Raises TransportUnavailable when none starts.
    """
    first = await start_transport(wanted, pool, peer_id=peer_id, host=host, on_notify=on_notify)
    if wanted != AUTO or first.name == _ALWAYS_THERE:
        return (first,)
    try:
        second = await _started(
            _ALWAYS_THERE, pool, peer_id=peer_id, host=host, on_notify=on_notify
        )
    except BaseException:
        await first.close()
        raise
    return first, second


async def _started(
    name: str, pool: KvPool, *, peer_id: str, host: str, on_notify: OnNotify
) -> KvTransport:
    transport = open_transport(name, peer_id=peer_id, host=host, on_notify=on_notify)
    try:
        await transport.start(pool)
    except BaseException:
        await transport.close()
        raise
    return transport
