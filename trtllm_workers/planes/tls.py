"""TLS of the request plane: contexts from files, and one side of one connection. Holds no socket.

Mutual: each side shows a certificate of the same authority. Host names are not checked: processes
find each other by address, and a worker may be anywhere. So the authority must sign for this
cluster alone; who may join is still decided by the cluster secret, inside the encryption.
"""

from __future__ import annotations

import ssl
from typing import Final

from trtllm_workers.config.outside import TlsFiles
from trtllm_workers.errors import AuthenticationFailed, ConfigError
from trtllm_workers.types import Address

_RECORD_BYTES: Final = 16 * 1024  # what one read returns at most
_SNIFFED_BYTES: Final = 3
_ALERT, _HANDSHAKE = 0x15, 0x16
REMEDY: Final = (
    "give all processes of the deployment --plane-cacert, --plane-cert and --plane-key, or none"
)


def looks_like_tls(begin: bytes | bytearray) -> bool:
    """Return whether a connection's first bytes are a TLS record and no frame of ours.

    A record begins with its type and version. As a frame's length that would be over 65,000, more
    than a handshake's frames may have.
    """
    return (
        len(begin) >= _SNIFFED_BYTES
        and begin[0] in (_ALERT, _HANDSHAKE)
        and begin[1] == 3
        and 1 <= begin[2] <= 4
    )


class PlaneTls:
    """Both ends' settings. Raises ConfigError for files that cannot be read or do not fit."""

    def __init__(self, files: TlsFiles) -> None:
        self._connecting = _context(ssl.PROTOCOL_TLS_CLIENT, files)
        self._accepting = _context(ssl.PROTOCOL_TLS_SERVER, files)

    def pipe(self, me: Address, dialed: Address | None) -> TlsPipe:
        """Return the TLS of one new connection: to ``dialed``, or accepted."""
        if dialed is None:
            return TlsPipe(self._accepting, me, "the connecting side", connecting=False)
        return TlsPipe(self._connecting, me, str(dialed), connecting=True)


class TlsPipe:
    """Plain bytes in, encrypted bytes out, and the reverse.

    * What is sent before the handshake is done waits inside; after an error it is dropped.
    * After every ``receive`` there may be something in ``outgoing``, also after an error: it tells
      the other side why.
    """

    def __init__(
        self, context: ssl.SSLContext, me: Address, peer: str, *, connecting: bool
    ) -> None:
        self._me = me
        self._peer = peer  # as errors name it
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=not connecting)
        self._is_ready = self._failed = False
        self._waiting: list[bytes] = []
        self._begin = b""
        self._is_tls = False
        if connecting:
            self._shake_hands()

    def send(self, plain: bytes) -> None:
        """Encrypt; take the result from ``outgoing``."""
        if self._failed:
            return
        if self._is_ready:
            self._tls.write(plain)
        else:
            self._waiting.append(plain)

    def outgoing(self) -> bytes:
        """Return what is to be written to the socket now."""
        return self._out.read()

    def receive(self, received: bytes) -> bytes:
        """Return what the other side sent in it, which may be nothing yet.

        Raises AuthenticationFailed: the other side does not encrypt, or shows no certificate of our
        authority, or does not accept ours.
        """
        if not self._is_tls:
            self._begin += received[:_SNIFFED_BYTES]
            if len(self._begin) >= _SNIFFED_BYTES:
                self._is_tls = looks_like_tls(self._begin)
                if not self._is_tls:
                    raise NotEncrypted(
                        f"the request plane of {self._me} is encrypted, that of {self._peer} is not; "
                        f"{REMEDY}"
                    )
        self._in.write(received)
        try:
            if not self._is_ready and not self._shake_hands():
                return b""
            return self._read()
        except ssl.SSLError as error:
            self._failed = True
            raise AuthenticationFailed(
                f"TLS with {self._peer} failed: {_reason(error)}; all processes need certificates of "
                "the one authority in --plane-cacert"
            ) from error

    def _shake_hands(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        self._is_ready = True
        if self._waiting:
            self._tls.write(b"".join(self._waiting))
            self._waiting.clear()
        return True

    def _read(self) -> bytes:
        read: list[bytes] = []
        try:
            while chunk := self._tls.read(_RECORD_BYTES):
                read.append(chunk)
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass  # all that has come
        return b"".join(read)


class NotEncrypted(AuthenticationFailed):
    """The other side speaks in the clear, so it can be told in the clear why we hang up."""


def _context(protocol: int, files: TlsFiles) -> ssl.SSLContext:
    if files.ca is None or files.cert is None or files.key is None:
        raise ConfigError(f"encryption of the request plane needs three files; {REMEDY}")
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # connections live for long; nobody resumes one
    try:
        context.load_verify_locations(files.ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"--plane-cacert {files.ca} holds no certificate that can be read: {error}",
            param="plane_cacert",
        ) from error
    try:
        context.load_cert_chain(files.cert, files.key, password=_no_password)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"--plane-cert {files.cert} and --plane-key {files.key} cannot be used: {error}",
            param="plane_cert",
        ) from error
    return context


def _no_password() -> str:
    """Let a key that has a password fail instead of asking on the terminal."""
    return ""


def _reason(error: ssl.SSLError) -> str:
    verify = getattr(error, "verify_message", "")
    return verify or str(error.reason or error).replace("_", " ").lower()
