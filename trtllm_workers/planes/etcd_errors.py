"""What etcd or gRPC says went wrong, as errors that say who must act. Holds no connection."""

from __future__ import annotations

from typing import Any

from trtllm_workers.errors import ConfigError


class EtcdError(Exception):
    """A call to etcd did not succeed. Stays inside this floor."""


class EtcdAway(EtcdError):
    """It did not answer, or cannot do it now: trying again may help. ``endpoint`` is who was asked."""

    def __init__(self, endpoint: str, why: str) -> None:
        super().__init__(f"{endpoint}: {why}")
        self.endpoint = endpoint
        self.why = why


class EtcdRefused(EtcdError):
    """It answered no: wrong user, password or permission. Trying again does not help."""


class TokenExpired(EtcdError):
    """The login has run out, or etcd was restarted: log in again."""


class LeaseGone(EtcdError):
    """The lease ran out, or was of a cluster that lost its data."""


class Compacted(EtcdError):
    """The events from this revision on are no longer kept: list again."""


# What etcd's own words begin with, whatever the status code: that has changed between releases.
_NO_TOKEN = ("invalid auth token", "revision of auth store is old")
_BAD_LOGIN = ("authentication failed", "user name not found")
_NO_LOGIN = ("user name is empty",)
_NOT_ALLOWED = ("permission denied",)
_NO_LEASE = ("requested lease not found",)
NOT_ENABLED = "authentication is not enabled"


def explain(
    endpoint: str, error: Any, *, user: str | None, timeout_s: float, answered: bool
) -> EtcdError:
    """Return the error that a failed call (``grpc.aio.AioRpcError``) stands for.

    ``answered``: that member has answered before, so that its address and TLS are right.
    """
    code = error.code().name
    details = str(error.details() or code).removeprefix("etcdserver: ")
    if details.startswith(_NO_TOKEN) or code == "UNAUTHENTICATED":
        return TokenExpired(details)
    if details.startswith(_BAD_LOGIN):
        return EtcdRefused(
            f"user '{user}' or its password is wrong; check --etcd-username and ETCD_PASSWORD"
        )
    if details.startswith(_NO_LOGIN):
        return EtcdRefused("it asks for a user; give --etcd-username and ETCD_PASSWORD")
    if details.startswith(_NOT_ALLOWED):
        return refused_permission(user)
    if details.startswith(_NO_LEASE):
        return LeaseGone(details)
    if code == "DEADLINE_EXCEEDED":
        return EtcdAway(endpoint, f"no answer within {timeout_s:g} s")
    return EtcdAway(endpoint, details if answered else _cause(details))


def refused_permission(user: str | None) -> EtcdRefused:
    """Return the error of a user who may not do what discovery needs."""
    return EtcdRefused(
        f"user '{user}' has no permission; grant it: etcdctl role grant-permission ROLE readwrite "
        "--prefix=true /trtllm-launch/"
    )


def _cause(details: str) -> str:
    """Return gRPC's words for a connection that did not come about, in ours, cause first."""
    low = details.lower()
    if "connection refused" in low:
        return "connection refused: nobody listens there"
    if "resolving" in low or "resolution failed" in low or "domain name" in low:
        return f"unknown host ({details})"
    if "handshake read failed" in low:
        return f"TLS failed: it answers without TLS; write etcd:// or http:// ({details})"
    if any(word in low for word in ("certificate", "ssl", "tls", "tsi_", "handshak")):
        return (
            "TLS failed: check --etcd-cacert, --etcd-cert and --etcd-key, and that its certificate "
            f"is for the name or address given here ({details})"
        )
    if "socket closed" in low or "connection reset" in low or "recvmsg" in low:
        return f"the connection was closed; if it wants TLS, write etcds:// or https:// ({details})"
    return details


def unreachable(where: str, tried_s: float, causes: dict[str, str]) -> ConfigError:
    """Return what the operator is told when no member was ever reached."""
    told = "; ".join(f"{endpoint}: {why}" for endpoint, why in causes.items())
    return ConfigError(
        f"cannot use etcd at {where}, tried for {tried_s:.1f} s: {told or 'no answer'}. "
        "Is etcd running there, and are --discovery or --etcd-endpoints right?",
        param="discovery",
    )


def turned_away(where: str, error: EtcdRefused) -> ConfigError:
    """Return what the operator is told when etcd answers no."""
    return ConfigError(f"etcd at {where} refuses: {error}", param="etcd_username")
