"""Where discovery on etcd keeps what it keeps: ``/trtllm-launch/<namespace>/…``. Pure."""

from __future__ import annotations

from urllib.parse import quote

_ROOT = "/trtllm-launch"


def workers_prefix(namespace: str) -> str:
    """Return what the keys of all records of a namespace begin with."""
    return f"{_ROOT}/{namespace}/workers/"


def secret_key(namespace: str) -> str:
    """Return the key of a namespace's cluster secret."""
    return f"{_ROOT}/{namespace}/secret"


def lives_prefix(prefix: str, worker_id: str) -> str:
    """Return what the keys of all lives of one worker begin with; ids of any characters are safe."""
    return f"{prefix}{quote(worker_id, safe='')}/"


def record_key(prefix: str, worker_id: str, incarnation: str) -> str:
    """Return the key of one life of a worker."""
    return f"{lives_prefix(prefix, worker_id)}{quote(incarnation, safe='')}"
