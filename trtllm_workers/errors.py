"""The error tree: what went wrong, and who must act. Knows no module of the project.

::

    LaunchError                    exit  HTTP  who acts
    ├── ConfigError                   2   500  the operator: a flag, a variable, a YAML key
    ├── StartError                    3   503  the operator: a process did not come up
    ├── RequestError                  2   400  the caller: this request is wrong
    │   ├── ModelNotFound             2   404
    │   ├── ContextTooLong            2   400
    │   ├── NotSupported              2   400  a field that no worker honours
    │   ├── TooLarge                  2   413
    │   └── MediaRejected             2   400  an image or file of embeddings cannot be taken
    ├── Overloaded                    4   429  the caller may try again later
    ├── Unavailable                   4   503  the caller may try again later; nothing is ready
    ├── EngineError                   4   500  this request failed inside the engine
    ├── EngineDead                    4   503  the worker: it drains and ends
    ├── TransferError                 4   503  KV blocks could not be moved
    │   ├── TransportUnavailable      2   503  the operator: a transport cannot start here
    │   ├── LayoutMismatch            2   503  the operator: two pools do not fit each other
    │   ├── TransferFailed            4   503  a read or write broke
    │   ├── MediaGone                 4   503  an image's embeddings are not where they were
    │   ├── HandoffRefused            4   503  prefill cannot do it now
    │   └── HandoffExpired            4   503  blocks were not fetched before the deadline
    └── PlaneError                    4   503  a message could not be moved
        ├── FrameError                4   503  bytes that are no frame of ours
        ├── AuthenticationFailed      4   503  a peer without the cluster secret
        ├── StaleIncarnation          4   503  a peer that was restarted meanwhile
        ├── PeerLost                  4   503  the connection to a peer ended
        ├── QueueAway                 4   503  the work queue's server does not answer
        └── QueueFull                 4   503  the work queue takes no more

Only ``EngineDead`` ends a process. Exit codes: 0, 2 configuration, 3 launch, 4 engine died,
130 interrupted.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_INTERRUPTED = 130


class LaunchError(Exception):
    """Base of every error this project raises on purpose.

    ``param`` names the request field, flag or YAML key at fault where there is one.
    """

    exit_code: ClassVar[int] = 4
    http_status: ClassVar[int] = 500
    error_type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ConfigError(LaunchError):
    """A flag, variable or YAML key is wrong; the message says where and what to write."""

    exit_code = 2
    code = "configuration"


class StartError(LaunchError):
    """A process did not come up; the message names it and the step that failed."""

    exit_code = 3
    http_status = 503
    code = "start_failed"


class RequestError(LaunchError):
    """The caller's request is wrong; ``param`` names the field."""

    exit_code = 2
    http_status = 400
    error_type = "invalid_request_error"
    code = "invalid_value"


class ModelNotFound(RequestError):
    """No model of that name is served here."""

    http_status = 404
    code = "model_not_found"


class ContextTooLong(RequestError):
    """Prompt and max_tokens together exceed what the model or the pool can hold."""

    code = "context_length_exceeded"


class NotSupported(RequestError):
    """A field is known, but nothing here honours it; it is refused rather than ignored."""

    code = "unsupported_parameter"


class TooLarge(RequestError):
    """The request body is larger than the ingress accepts."""

    http_status = 413
    code = "request_too_large"


class MediaRejected(RequestError):
    """An image, or a file of embeddings, cannot be taken; says what is wrong with the request alone.

    Never what is or is not on this side: no path, address or reason of the operating system.
    """

    code = "invalid_image"


class Overloaded(LaunchError):
    """The waiting line is full; the caller may try again."""

    http_status = 429
    error_type = "rate_limit_error"
    code = "overloaded"


class Unavailable(LaunchError):
    """Nothing is ready to take the request."""

    http_status = 503
    code = "unavailable"


class EngineError(LaunchError):
    """This one request failed inside the engine; others go on."""

    code = "engine_error"


class EngineDead(LaunchError):
    """The engine cannot go on; its worker drains and ends."""

    http_status = 503
    code = "engine_dead"


class PlaneError(LaunchError):
    """A message could not be moved between two processes."""

    http_status = 503
    code = "plane_error"


class FrameError(PlaneError):
    """Bytes arrived that are no frame of this protocol version."""

    code = "bad_frame"


class AuthenticationFailed(PlaneError):
    """A peer does not hold the cluster secret."""

    code = "authentication_failed"


class StaleIncarnation(PlaneError):
    """The peer at this address is not the one the record spoke of; it was restarted."""

    code = "stale_incarnation"


class PeerLost(PlaneError):
    """The connection to a peer ended while streams depended on it.

    ``ended_there``: the other side ended it, so its process is gone or knows as much as we do. Without
    it the peer may live and believe that all is well, for as long as a silent peer is waited for.
    """

    code = "worker_lost"

    def __init__(
        self, message: str, *, param: str | None = None, ended_there: bool = False
    ) -> None:
        super().__init__(message, param=param)
        self.ended_there = ended_there


class QueueAway(PlaneError):
    """The work queue's server does not answer now; what it holds is not lost by that."""

    code = "queue_away"


class QueueFull(PlaneError):
    """The work queue holds as many items as it may."""

    code = "queue_full"


class TransferError(LaunchError):
    """KV blocks could not be moved; decode recomputes them."""

    http_status = 503
    code = "transfer_error"


class TransportUnavailable(TransferError):
    """A transport cannot start here; the message says why and what to install."""

    exit_code = 2
    code = "transport_unavailable"


class LayoutMismatch(TransferError):
    """Two pools whose blocks do not fit each other; the message shows both layouts."""

    exit_code = 2
    code = "layout_mismatch"


class TransferFailed(TransferError):
    """A read or write broke; the bytes have stopped moving."""

    code = "transfer_failed"


class MediaGone(TransferError):
    """The embeddings of an image are not (any more) where they were said to be; they can be made again."""

    code = "media_gone"


class HandoffRefused(TransferError):
    """A prefill worker cannot take this prompt now."""

    code = "handoff_refused"


class HandoffExpired(TransferError):
    """The blocks were not fetched before the deadline and were released."""

    code = "handoff_expired"


def error_for_code(code: str, message: str, *, param: str | None = None) -> LaunchError:
    """Rebuild an error from its wire form (``code`` and message); unknown codes are EngineError."""
    return _BY_CODE.get(code, EngineError)(message, param=param)


def _tree(root: type[LaunchError]) -> list[type[LaunchError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


_BY_CODE: dict[str, type[LaunchError]] = {cls.code: cls for cls in _tree(LaunchError) if cls.code}
