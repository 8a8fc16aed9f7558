"""What a connection to etcd needs before it is made: packages, user, certificates.

The packages are imported when a client is made, and only here.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from trtllm_workers.config.env import calm_grpc
from trtllm_workers.config.outside import EtcdLogin, TlsFiles
from trtllm_workers.errors import ConfigError


def packages() -> tuple[Any, Any]:
    """Return grpc and aetcd's stubs. Raises ConfigError where they are missing."""
    calm_grpc()
    try:
        return importlib.import_module("grpc"), importlib.import_module("aetcd.rpc")
    except (ImportError, TypeError, AttributeError) as error:  # a protobuf that does not fit
        raise ConfigError(
            f"discovery on etcd needs packages that cannot be imported ({error}): "
            "pip install 'trtllm-launch[etcd]'",
            param="discovery",
        ) from error


def user_of(login: EtcdLogin) -> tuple[str | None, str]:
    """Return user, or None, and password. Raises ConfigError for a user without one."""
    if login.username is None:
        return None, ""
    if login.password is None:
        raise ConfigError(
            f"user '{login.username}' of etcd has no password; set ETCD_PASSWORD",
            param="etcd_password",
        )
    return login.username, login.password


def credentials(grpc: Any, files: TlsFiles) -> Any:
    """Return what gRPC checks etcd's certificate by; without a file, the authorities it brings."""

    def read(path: Path | None) -> bytes | None:
        try:
            return None if path is None else path.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error

    return grpc.ssl_channel_credentials(read(files.ca), read(files.key), read(files.cert))
