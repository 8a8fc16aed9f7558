"""Fetching what a URL names, from hosts that may be fetched from, within limits of time and size.

Resolving, checking and connecting are one act: the address that was checked is the one connected to,
whatever the name resolves to later. Names stay in TLS and in the Host header. No proxies, no cookies,
no credentials.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

import httpcore

from trtllm_workers.config.media import MediaSettings
from trtllm_workers.errors import MediaRejected
from trtllm_workers.media.addresses import host_of, is_listed, may_connect
from trtllm_workers.observe.logs import get_logger

log = get_logger(__name__)

Resolve = Callable[[str, int], Awaitable[list[str]]]
Sink = Callable[[bytes], None]

_MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
_SAFE = "/%:@!$&'()*+,;=~-._?[]"
_AGENT = b"trtllm-launch"


@dataclass(frozen=True, slots=True)
class _Target:
    scheme: str
    host: str
    port: int
    path: str
    listed: bool


class _Forbidden(Exception):
    """A host that may not be fetched from, or that is not there: the two look alike from outside."""


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host, as the system has them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_rest, address in found]


class Fetcher:
    """Fetches URLs. ``resolver`` and ``ssl_context`` can be others than the system's."""

    def __init__(
        self,
        settings: MediaSettings,
        *,
        resolver: Resolve = resolve,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._settings = settings
        self._resolve = resolver
        self._ssl_context = ssl_context

    async def fetch(self, url: str, param: str, sink: Sink) -> int:
        """Give the body of ``url`` to ``sink``, piece by piece; return how many bytes it has.

        Raises MediaRejected. ``sink`` may have been given a part by then.
        """
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                return await self._follow(url, param, sink)
        except TimeoutError as error:
            log.info("a URL took too long", param=param)
            raise MediaRejected(
                f"{param}: this URL was not fetched within {self._settings.timeout_s:g} s",
                param=param,
            ) from error

    async def _follow(self, url: str, param: str, sink: Sink) -> int:
        context = self._ssl_context
        if context is None:
            # Reading all authorities' certificates takes tens of milliseconds.
            context = await asyncio.to_thread(httpcore.default_ssl_context)
            self._ssl_context = context
        for _ in range(_MOST_REDIRECTS + 1):
            target = _target(url, param, self._settings.url_hosts)
            backend = _CheckedConnections(self._resolve, listed=target.listed)
            try:
                async with httpcore.AsyncConnectionPool(
                    ssl_context=context, network_backend=backend, max_keepalive_connections=0
                ) as pool:
                    moved = await self._get(pool, target, param, sink)
            except _Forbidden as error:
                log.warning("a URL was refused", param=param, host=target.host, reason=str(error))
                raise _not_from_here(param) from error
            except (
                httpcore.NetworkError,
                httpcore.ProtocolError,
                httpcore.TimeoutException,
            ) as error:
                log.info("a URL was not fetched", param=param, host=target.host, error=repr(error))
                raise MediaRejected(
                    f"{param}: this URL could not be fetched: no answer, or a broken one",
                    param=param,
                ) from error
            if isinstance(moved, int):
                return moved
            url = urljoin(url, moved)
        raise MediaRejected(
            f"{param}: this URL redirects more than {_MOST_REDIRECTS} times", param=param
        )

    async def _get(
        self, pool: httpcore.AsyncConnectionPool, target: _Target, param: str, sink: Sink
    ) -> int | str:
        """Return the body's length, or where a redirect leads."""
        limit = self._settings.max_file_bytes
        url = httpcore.URL(
            scheme=target.scheme, host=target.host, port=target.port, target=target.path
        )
        headers = [
            (b"Host", _authority(target).encode()),
            (b"User-Agent", _AGENT),
            (b"Accept", b"*/*"),
            (b"Accept-Encoding", b"identity"),
        ]
        async with pool.stream("GET", url, headers=headers) as response:
            found = {name.lower(): value for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in found:
                return found[b"location"].decode("latin-1")
            if response.status != 200:
                raise MediaRejected(
                    f"{param}: this URL answers with status {response.status}", param=param
                )
            if found.get(b"content-encoding", b"identity").strip().lower() not in (
                b"",
                b"identity",
            ):
                raise MediaRejected(
                    f"{param}: this URL answers with a compressed body, which was not asked for",
                    param=param,
                )
            length = found.get(b"content-length", b"")
            if length.isdigit() and int(length) > limit:
                raise _too_large(param, limit)
            num_bytes = 0
            async for piece in response.aiter_stream():
                num_bytes += len(piece)
                if num_bytes > limit:
                    raise _too_large(param, limit)
                sink(piece)
            return num_bytes


class _CheckedConnections(httpcore.AsyncNetworkBackend):
    """Connects to hosts all of whose addresses may be connected to: to one of just those addresses."""

    def __init__(self, resolver: Resolve, *, listed: bool) -> None:
        self._resolve = resolver
        self._listed = listed
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 (the base class's; the whole fetch has a deadline)
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise _Forbidden(f"not resolved: {error}") from error
        if not addresses:
            raise _Forbidden("no address")
        for address in addresses:
            if not may_connect(address, listed=self._listed):
                raise _Forbidden(f"resolves to {address}")
        last: httpcore.ConnectError | httpcore.ConnectTimeout | None = None
        for address in dict.fromkeys(addresses):
            try:
                return await self._network.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                last = error
        assert last is not None
        raise last

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise _Forbidden("a socket of this machine")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _target(url: str, param: str, url_hosts: tuple[str, ...]) -> _Target:
    """Return what to ask whom. Raises MediaRejected for URLs that are not to be fetched."""
    # A backslash, a space or a control character is read differently by different programs.
    if any(char <= " " or char in "\\\x7f" for char in url):
        raise _invalid(param)
    try:
        parts = urlsplit(url)
        port = parts.port
        name = parts.hostname or ""
    except ValueError as error:
        raise _invalid(param) from error
    scheme = parts.scheme.lower()
    if scheme not in _PORTS:
        raise MediaRejected(
            f"{param}: URLs that lead to other than http and https are not taken", param=param
        )
    if "@" in parts.netloc:
        raise MediaRejected(f"{param}: a URL with a user or password is not taken", param=param)
    if port is None:
        port = _PORTS[scheme]
    host = host_of(name)
    if host is None or not 0 < port < 65536:
        raise _invalid(param)
    listed = is_listed(host, port, url_hosts)
    if url_hosts and not listed:
        raise _not_from_here(param)
    path = quote(parts.path or "/", safe=_SAFE)
    if parts.query:
        path += "?" + quote(parts.query, safe=_SAFE)
    return _Target(scheme, host, port, path, listed)


def _authority(target: _Target) -> str:
    host = f"[{target.host}]" if ":" in target.host else target.host
    return host if target.port == _PORTS[target.scheme] else f"{host}:{target.port}"


def _invalid(param: str) -> MediaRejected:
    return MediaRejected(f"{param}: this is not a valid URL", param=param)


def _not_from_here(param: str) -> MediaRejected:
    # One answer for hosts that are forbidden and hosts that are not there: which of a private network's
    # names exist is nobody's business.
    return MediaRejected(
        f"{param}: nothing is fetched from this URL's host: there is none of that name, or it is not "
        "among those that this deployment fetches from",
        param=param,
    )


def _too_large(param: str, limit: int) -> MediaRejected:
    return MediaRejected(
        f"{param}: this URL answers with more than the {limit} bytes that are taken", param=param
    )
