"""What an ingress process is told at start. Knows no flag, no variable and no YAML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from trtllm_workers.config.outside import EtcdLogin, TlsFiles
from trtllm_workers.router.policies import RouterMode
from trtllm_workers.router.router import Router
from trtllm_workers.router.weights import Weights
from trtllm_workers.types import Strategy

MIB = 1 << 20


def _ignore_listening(_host: str, _port: int) -> None:
    """Tell nobody where the ingress listens."""


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """How workers are chosen, and whether the router follows their KV events."""

    mode: RouterMode = RouterMode.LEAST_LOADED
    weights: Weights = field(default_factory=Weights)
    uses_events: bool = True

    def open(self) -> Router:
        """Return a router that is set so."""
        return Router(self.mode, self.weights, uses_events=self.uses_events)


@dataclass(frozen=True, slots=True)
class IngressSettings:
    """Everything ``serve_ingress`` needs; every duration in seconds, every size in bytes.

    * ``http_port`` and ``plane_port`` 0: the system chooses; ``on_listening(host, port)`` is told
      the real HTTP address once it accepts connections.
    * ``discovery``: a discovery URL such as ``file:///tmp/x``, with ``namespace`` the deployment under
      it and ``etcd`` the login where it is etcd; ``secret`` is the cluster secret.
    * ``plane_tls``: encrypt the request plane.
    * ``plane_host`` is where workers' token streams arrive, ``plane_advertise_host`` the name they
      use for it (default: the same).
    * ``model_path``: read tokenizer and chat template here instead of where the worker's record
      says the model is.
    * ``status_file``: where the launcher reads how far this process has come.
    * ``max_body_bytes``: larger request bodies are refused with 413 and never held.
    * ``max_concurrency``: requests in work; one more is refused with 429. ``max_connections``:
      open HTTP connections; one more is answered with 503 and closed. 0 = no limit.
    * ``request_timeout_s``: a request that is not finished by then fails.
    * ``client_stall_timeout_s`` and ``max_unread_bytes``: a client that leaves its stream unread
      for so long, or lets so much pile up, is dropped and its request aborted.
    * ``drain_timeout_s``: on SIGTERM running streams get this long, then they are aborted.
    * ``strategy``: who gets a request first where prefill and decode are apart.
    * ``router``: how workers are chosen.
    * ``tells_launcher_to_stop``: called when the deployment is closed from elsewhere; True: the launcher
      that started this process was told, and will end it in its turn.
    * ``encode_timeout_s``: how long a request waits for its images to be encoded.
    * ``migration_limit``: how often one stream may move to another worker when its own dies.
    """

    discovery: str
    secret: bytes
    http_host: str = "127.0.0.1"
    http_port: int = 8000
    plane_host: str = "127.0.0.1"
    plane_port: int = 0
    plane_advertise_host: str | None = None
    model_path: Path | None = None
    status_file: Path | None = None
    process_name: str = "ingress"
    max_body_bytes: int = 16 * MIB
    max_concurrency: int = 4096
    max_connections: int = 8192
    request_timeout_s: float = 3600.0
    encode_timeout_s: float = 60.0
    connect_timeout_s: float = 5.0
    client_stall_timeout_s: float = 30.0
    max_unread_bytes: int = MIB
    keep_alive_timeout_s: float = 75.0
    drain_timeout_s: float = 30.0
    strategy: Strategy = Strategy.DECODE_FIRST
    router: RouterSettings = field(default_factory=RouterSettings)
    migration_limit: int = 3
    namespace: str = "default"
    etcd: EtcdLogin = field(default_factory=EtcdLogin)
    plane_tls: TlsFiles = field(default_factory=TlsFiles)
    access_log: bool = False
    tells_launcher_to_stop: Callable[[], bool] | None = None
    on_listening: Callable[[str, int], None] = _ignore_listening
