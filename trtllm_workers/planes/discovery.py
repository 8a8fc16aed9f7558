"""Opens discovery by its URL, and the cluster secret that lies beside it. Knows no worker."""

from __future__ import annotations

import asyncio
import os
import secrets
import stat
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from trtllm_workers.config.outside import ETCD, ETCD_TLS, EtcdLogin, EtcdUrl, parse_etcd
from trtllm_workers.errors import ConfigError
from trtllm_workers.planes.base import Discovery
from trtllm_workers.planes.discovery_file import FileDiscovery

SECRET_FILE: Final = "secret"
NAMESPACES_FOLDER: Final = "namespaces"
DEFAULT_NAMESPACE: Final = "default"
SECRET_BYTES: Final = 32
_SUPPORTED = "file:///path/to/folder (or just the path) or etcd://host:2379"


def open_discovery(
    url: str,
    namespace: str = DEFAULT_NAMESPACE,
    login: EtcdLogin = EtcdLogin(),  # noqa: B008 - frozen
) -> Discovery:
    """Return the discovery a URL names; nothing is touched until it is used.

    Each namespace sees only itself. In a folder the one called default is the folder itself, the
    others lie in it under ``namespaces/``. Raises ConfigError for a scheme that is not supported,
    naming those that are, and where packages for it are missing.
    """
    etcd = etcd_url(url)
    if etcd is None:
        return FileDiscovery(_folder(url, namespace))
    from trtllm_workers.planes.discovery_etcd import EtcdDiscovery

    return EtcdDiscovery(etcd, namespace, login)


def etcd_url(url: str) -> EtcdUrl | None:
    """Return what an ``etcd:`` or ``etcds:`` URL names; None for any other."""
    return parse_etcd(url) if url.startswith((f"{ETCD}://", f"{ETCD_TLS}://")) else None


def discovery_root(url: str) -> Path:
    """Return the folder that a ``file:`` URL or plain path names, absolute.

    Raises ConfigError for any other URL, and for one that names a host.
    """
    if not url.strip():
        raise ConfigError(f"discovery is empty; write {_SUPPORTED}", param="discovery")
    parts = urlsplit(url)
    if not parts.scheme and not url.startswith("//"):
        return Path(url).expanduser().absolute()
    if parts.scheme != "file":
        raise ConfigError(
            f"discovery '{url}' is not supported; write {_SUPPORTED}", param="discovery"
        )
    if parts.netloc not in ("", "localhost"):
        raise ConfigError(
            f"discovery '{url}' names the host '{parts.netloc}'; a file URL has three slashes: "
            f"file:///{parts.netloc}{parts.path}",
            param="discovery",
        )
    if not parts.path.startswith("/"):
        raise ConfigError(
            f"discovery '{url}' names no folder; write {_SUPPORTED}", param="discovery"
        )
    return Path(unquote(parts.path))


def _folder(url: str, namespace: str) -> Path:
    root = discovery_root(url)
    return root if namespace == DEFAULT_NAMESPACE else root / NAMESPACES_FOLDER / namespace


def cluster_secret(
    url: str,
    given: str | None,
    namespace: str = DEFAULT_NAMESPACE,
    login: EtcdLogin = EtcdLogin(),  # noqa: B008 - frozen
    timeout_s: float = 10.0,
) -> bytes:
    """Return the given secret, or the one kept beside discovery, which is made when missing.

    Processes that start at the same time end with the same secret. In a folder it is the file
    ``secret``, for its owner alone; ConfigError when others can read it, when it holds nothing useful
    or cannot be written. On etcd it is the key ``/trtllm-launch/<namespace>/secret``: whoever may
    read that key can join the deployment. That is everybody who reaches etcd, unless etcd asks for
    a user, and everybody on the network between, unless it is reached by TLS. ConfigError when etcd
    cannot be used within ``timeout_s``.

    Blocks; call it outside an event loop.
    """
    if given is not None:
        if not given.strip():
            raise ConfigError("the cluster secret is empty; leave it out to have one made")
        return given.encode()
    etcd = etcd_url(url)
    if etcd is None:
        return _secret_in_folder(_folder(url, namespace))
    from trtllm_workers.planes.etcd_secret import secret_on_etcd

    return asyncio.run(secret_on_etcd(etcd, namespace, login, timeout_s))


def _secret_in_folder(root: Path) -> bytes:
    path = root / SECRET_FILE
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            return _read_secret(path)
        except FileNotFoundError:
            _make_secret(path)
        return _read_secret(path)
    except OSError as error:
        raise ConfigError(
            f"cannot keep the cluster secret in {path}: {error.strerror or error}; choose a folder "
            "that can be written, or give the secret"
        ) from error


def _read_secret(path: Path) -> bytes:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(
                f"{path} holds the cluster secret and is open to others (mode "
                f"{stat.S_IMODE(status.st_mode):o}); make a new one: rm '{path}'"
            )
        secret = file.read().strip()
    if len(secret) < SECRET_BYTES:
        raise ConfigError(f"{path} holds no cluster secret; delete it and one is made: rm '{path}'")
    return secret


def _make_secret(path: Path) -> None:
    """Write a whole secret under a name of our own, then link it: the first one to link wins."""
    own = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(SECRET_BYTES) + "\n")
        try:
            os.link(own, path)
        except FileExistsError:
            return  # another process was first; its secret is the one
    finally:
        own.unlink(missing_ok=True)
