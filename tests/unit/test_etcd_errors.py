"""What etcd's and gRPC's words mean, and what the operator is told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from trtllm_workers.planes import etcd_errors
from trtllm_workers.planes.etcd_errors import (
    EtcdAway,
    EtcdError,
    EtcdRefused,
    LeaseGone,
    TokenExpired,
    explain,
)


class Failed:
    """A call that failed, as gRPC tells it."""

    def __init__(self, code: str, details: str) -> None:
        self._code, self._details = code, details

    def code(self) -> SimpleNamespace:
        return SimpleNamespace(name=self._code)

    def details(self) -> str:
        return self._details


# As etcd 3.4.23 and grpc 1.85 say them.
TOLD = [
    ("UNAUTHENTICATED", "etcdserver: invalid auth token", TokenExpired, ""),
    ("INVALID_ARGUMENT", "etcdserver: revision of auth store is old", TokenExpired, ""),
    (
        "INVALID_ARGUMENT",
        "etcdserver: authentication failed, invalid user ID or password",
        EtcdRefused,
        "user 'ann' or its password is wrong",
    ),
    ("INVALID_ARGUMENT", "etcdserver: user name is empty", EtcdRefused, "--etcd-username"),
    ("PERMISSION_DENIED", "etcdserver: permission denied", EtcdRefused, "grant-permission"),
    ("NOT_FOUND", "etcdserver: requested lease not found", LeaseGone, ""),
    ("DEADLINE_EXCEEDED", "Deadline Exceeded", EtcdAway, "no answer within 2.5 s"),
    ("UNAVAILABLE", "etcdserver: no leader", EtcdAway, "no leader"),
    ("RESOURCE_EXHAUSTED", "etcdserver: mvcc: database space exceeded", EtcdAway, "space exceeded"),
    (
        "UNAVAILABLE",
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Failed to "
        "connect to remote host: Connection refused",
        EtcdAway,
        "connection refused: nobody listens there",
    ),
    (
        "UNAVAILABLE",
        "errors resolving h:1: [field:hostname lookup error:address lookup failed for h:1: Domain "
        "name not found]",
        EtcdAway,
        "unknown host",
    ),
    (
        "UNAVAILABLE",
        "ipv4:127.0.0.1:1: Unwrap failed (TSI_DATA_CORRUPTED)",
        EtcdAway,
        "TLS failed: check --etcd-cacert",
    ),
    (
        "UNAVAILABLE",
        "ipv4:127.0.0.1:1: Handshake read failed (Socket closed)",
        EtcdAway,
        "it answers without TLS",
    ),
    ("UNAVAILABLE", "Socket closed", EtcdAway, "if it wants TLS, write etcds://"),
]


@pytest.mark.parametrize(("code", "details", "kind", "words"), TOLD)
def test_failure_of_a_first_call_is_told_by_its_cause(
    code: str, details: str, kind: type[EtcdError], words: str
) -> None:
    error = explain("h:1", Failed(code, details), user="ann", timeout_s=2.5, answered=False)
    assert type(error) is kind
    assert words in str(error)


def test_cause_is_not_guessed_for_a_member_that_has_answered() -> None:
    failed = Failed("UNAVAILABLE", "Socket closed")
    error = explain("h:1", failed, user=None, timeout_s=2.5, answered=True)
    assert str(error) == "h:1: Socket closed"


def test_operator_is_told_members_time_and_causes() -> None:
    error = etcd_errors.unreachable("h:1, h:2", 10.04, {"h:1": "refused", "h:2": "unknown host"})
    assert str(error).startswith(
        "cannot use etcd at h:1, h:2, tried for 10.0 s: h:1: refused; h:2: unknown host. "
    )
    assert "--etcd-endpoints" in str(error)
