"""The cluster secret where etcd is discovery: one key that all processes share."""

from __future__ import annotations

import secrets

from trtllm_workers.config.outside import EtcdLogin, EtcdUrl
from trtllm_workers.errors import ConfigError
from trtllm_workers.planes.etcd_client import EtcdClient
from trtllm_workers.planes.record_keys import secret_key

_SECRET_BYTES = 32


async def secret_on_etcd(url: EtcdUrl, namespace: str, login: EtcdLogin, timeout_s: float) -> bytes:
    """Return the secret that etcd keeps for a namespace; make it in one transaction if there is none.

    Raises ConfigError when etcd cannot be used within ``timeout_s``, or the key holds no secret.
    """
    key = secret_key(namespace)
    own = secrets.token_hex(_SECRET_BYTES).encode()
    client = EtcdClient(url, login, call_timeout_s=timeout_s / 4)
    try:
        kept = await client.insist(lambda: client.put_if_absent(key, own), timeout_s)
    finally:
        await client.close()
    secret = kept.strip()
    if len(secret) < _SECRET_BYTES:
        raise ConfigError(
            f"key {key} of etcd holds no cluster secret; delete it and one is made: "
            f"etcdctl del '{key}'"
        )
    return secret
