"""How to reach the servers that a deployment may share: etcd, NATS; and TLS files. Connects to nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtllm_workers.config.layers import Layers
from trtllm_workers.config.values import shown
from trtllm_workers.errors import ConfigError

ETCD_PORT = 2379
ETCD, ETCD_TLS = "etcd", "etcds"
_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_NATS_SCHEMES = ("nats", "tls")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the authorities to trust, and our certificate with its key. None: not given."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __bool__(self) -> bool:
        return any((self.ca, self.cert, self.key))


@dataclass(frozen=True, slots=True)
class EtcdLogin:
    """What etcd asks of a client besides its address."""

    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: TlsFiles = TlsFiles()


@dataclass(frozen=True, slots=True)
class NatsLogin:
    """What NATS asks of a client besides its address."""

    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    tls: TlsFiles = TlsFiles()


@dataclass(frozen=True, slots=True)
class EtcdUrl:
    """``etcd://host:port,host:port`` taken apart; ``etcds`` is with TLS."""

    endpoints: tuple[tuple[str, int], ...]
    tls: bool

    def __str__(self) -> str:
        hosts = (f"[{host}]" if ":" in host else host for host, _ in self.endpoints)
        where = ",".join(f"{h}:{port}" for h, (_, port) in zip(hosts, self.endpoints, strict=True))
        return f"{ETCD_TLS if self.tls else ETCD}://{where}"


def parse_etcd(text: str) -> EtcdUrl:
    """Return what ``etcd://…``, or a list as in ETCD_ENDPOINTS, names. Raises ConfigError."""
    schemes: set[bool] = set()
    endpoints: list[tuple[str, int]] = []
    whole, _, rest = text.strip().partition("://")
    is_url = whole in (ETCD, ETCD_TLS) and bool(rest)
    for one in (rest if is_url else text).split(","):
        scheme, slashes, place = one.strip().rpartition("://")
        if slashes and (is_url or scheme not in ("http", "https")):
            raise ConfigError(f"etcd's address {shown(one)} must begin with http:// or https://")
        schemes.add(whole == ETCD_TLS if is_url else scheme == "https")
        endpoints.append(_host_and_port(place.rstrip("/"), ETCD_PORT))
    if len(schemes) > 1:
        raise ConfigError("etcd's members must be all http:// or all https://")
    return EtcdUrl(tuple(endpoints), schemes.pop())


def _host_and_port(place: str, default: int) -> tuple[str, int]:
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\s:/\[\]@]+))(?::(\d{1,5}))?", place)
    if found is None or int(found[3] or default) > 65535:
        raise ConfigError(f"{shown(place)} is no address; write HOST:PORT, e.g. 10.0.0.1:{default}")
    return found[1] or found[2], int(found[3] or default)


def parse_nats(text: str) -> tuple[str, ...]:
    """Return the URLs of a list as in NATS_SERVER, each with its port. Raises ConfigError."""
    urls = []
    for one in text.split(","):
        scheme, slashes, place = one.strip().rpartition("://")
        if slashes and scheme not in _NATS_SCHEMES:
            raise ConfigError(f"NATS's address {shown(one)} must begin with nats:// or tls://")
        login, at, place = place.rpartition("@")
        host, port = _host_and_port(place.rstrip("/"), 4222)
        host = f"[{host}]" if ":" in host else host
        urls.append(f"{scheme or 'nats'}://{login}{at}{host}:{port}")
    return tuple(urls)


def settle_planes(layers: Layers) -> None:
    """Check where processes meet; ``discovery`` becomes one URL, whichever option named it."""
    values = layers.values
    if values["etcd_endpoints"] is not None:
        _settle_etcd(layers)
    discovery = values["discovery"]
    if discovery is not None and not _is_file_url(discovery):
        try:
            if not discovery.startswith((f"{ETCD}://", f"{ETCD_TLS}://")):
                raise ConfigError(
                    "must be file:///absolute/directory or etcd://host:2379, not "
                    + shown(discovery)
                )
            values["discovery"] = str(parse_etcd(discovery))
        except ConfigError as error:
            layers.fail("discovery", str(error))
    if not _NAMESPACE.fullmatch(values["namespace"]):
        layers.fail(
            "namespace",
            "must be letters, digits, '.', '_' and '-', at most 63, not "
            + shown(values["namespace"]),
        )
    if values["nats_server"] is not None:
        try:
            parse_nats(values["nats_server"])
        except ConfigError as error:
            layers.fail("nats_server", str(error))
    for prefix in ("etcd", "nats", "plane"):
        _settle_tls(layers, prefix)


def _settle_etcd(layers: Layers) -> None:
    values = layers.values
    try:
        url = parse_etcd(values["etcd_endpoints"])
    except ConfigError as error:
        layers.fail("etcd_endpoints", str(error))
        return
    if values["discovery"] is None:
        values["discovery"] = str(url)
        layers.sources["discovery"] = layers.sources["etcd_endpoints"]
    elif values["discovery"] != str(url):
        layers.warnings.append(
            f"{layers.sources['etcd_endpoints']} has no effect: "
            f"{layers.sources['discovery']} names discovery"
        )


def _settle_tls(layers: Layers, prefix: str) -> None:
    files = {end: layers.values[f"{prefix}_{end}"] for end in ("cacert", "cert", "key")}
    for end, path in files.items():
        if path is not None and not path.is_file():
            layers.fail(f"{prefix}_{end}", f"there is no file {shown(path)}")
    if (files["cert"] is None) != (files["key"] is None):
        has, lacks = ("cert", "key") if files["key"] is None else ("key", "cert")
        layers.fail(f"{prefix}_{has}", f"needs --{prefix}-{lacks} beside it")
    if prefix == "plane" and any(files.values()) and not all(files.values()):
        lacking = next(end for end, path in files.items() if path is None)
        layers.fail(
            "plane_cacert", f"encryption needs all three files; --plane-{lacking} is missing"
        )


def _is_file_url(url: str) -> bool:
    path = url.removeprefix("file://")
    return url.startswith("file://") and path.startswith("/") and path.strip("/") != ""


def tls_files(values: Any, prefix: str) -> TlsFiles:
    """Return the TLS files that settings name for ``etcd``, ``nats`` or ``plane``."""
    return TlsFiles(*(getattr(values, f"{prefix}_{end}") for end in ("cacert", "cert", "key")))


def etcd_login(settings: Any) -> EtcdLogin:
    """Return how settings log in to etcd."""
    return EtcdLogin(settings.etcd_username, settings.etcd_password, tls_files(settings, "etcd"))


def nats_login(settings: Any) -> NatsLogin:
    """Return how settings log in to NATS."""
    return NatsLogin(
        settings.nats_user,
        settings.nats_password,
        settings.nats_token,
        tls_files(settings, "nats"),
    )
