"""The few one-sided and tagged calls of libucp that ucxx's Python API lacks. Knows no peer and no pool.

ucxx owns contexts, workers and endpoints; their handles go into the C calls below, through the very
library that ucxx loaded. Structures follow ``ucp.h`` of UCX 1.x, whose field masks keep old callers valid.

Calls that only queue something hold the GIL (``PyDLL``): 2,048 of them take about 2 ms, and giving the
GIL away after each one could cost a thread switch of 5 ms each in a busy process.
"""

from __future__ import annotations

import contextlib
import ctypes as c
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Final

from trtllm_workers.errors import TransportUnavailable
from trtllm_workers.transfer.ucx_pieces import Pieces

OK: Final = 0
IN_PROGRESS: Final = 1

_STATUS = c.c_int8  # ucs_status_t is packed into one byte
_FIRST_ERROR: Final = 2**64 - 100  # UCS_PTR_IS_ERR: the last 100 addresses are status codes

_MASK_FLAGS: Final = 1 << 4  # UCP_OP_ATTR_FIELD_FLAGS
_CLOSE_BY_FORCE: Final = 1  # UCP_EP_CLOSE_FLAG_FORCE
_EP_ADDRESS_AND_ERRORS: Final = (
    0b111  # UCP_EP_PARAM_FIELD_REMOTE_ADDRESS, _ERR_HANDLING_MODE, _ERR_HANDLER
)
_ERRORS_PER_PEER: Final = 1  # UCP_ERR_HANDLING_MODE_PEER
_MASK_MEMORY: Final = 1 << 8  # UCP_OP_ATTR_FIELD_MEMH
_EP_TRANSPORTS: Final = 1 << 3  # UCP_EP_ATTR_FIELD_TRANSPORTS
_MAX_TRANSPORTS: Final = 32


class _RequestParam(c.Structure):
    _fields_ = (
        ("mask", c.c_uint32),
        ("flags", c.c_uint32),
        ("request", c.c_void_p),
        ("callback", c.c_void_p),
        ("datatype", c.c_uint64),
        ("user_data", c.c_void_p),
        ("reply_buffer", c.c_void_p),
        ("memory_type", c.c_int),
        ("recv_info", c.c_void_p),
        ("memh", c.c_void_p),
    )


class _MapParams(c.Structure):
    _fields_ = (
        ("mask", c.c_uint64),
        ("address", c.c_void_p),
        ("length", c.c_size_t),
        ("flags", c.c_uint),
        ("prot", c.c_uint),
        ("memory_type", c.c_int),
        ("exported", c.c_void_p),
    )


class _EpParams(c.Structure):
    _fields_ = (
        ("mask", c.c_uint64),
        ("address", c.c_char_p),
        ("err_mode", c.c_int),
        ("err_callback", c.c_void_p),
        ("err_argument", c.c_void_p),
        ("user_data", c.c_void_p),
        ("flags", c.c_uint),
        ("sockaddr", c.c_void_p),
        ("sockaddr_length", c.c_uint32),
        ("conn_request", c.c_void_p),
        ("name", c.c_char_p),
        ("local_sockaddr", c.c_void_p),
        ("local_sockaddr_length", c.c_uint32),
    )


class _TransportEntry(c.Structure):
    _fields_ = (("transport", c.c_char_p), ("device", c.c_char_p))


class _EpAttr(c.Structure):
    _fields_ = (
        ("mask", c.c_uint64),
        ("name", c.c_char * 32),
        ("local_sockaddr", c.c_byte * 128),
        ("remote_sockaddr", c.c_byte * 128),
        ("entries", c.c_void_p),
        ("num_entries", c.c_uint),
        ("entry_size", c.c_size_t),
        ("user_data", c.c_void_p),
    )


class _TagInfo(c.Structure):
    _fields_ = (("tag", c.c_uint64), ("length", c.c_size_t))


_ENDPOINT_FAILED = c.CFUNCTYPE(None, c.c_void_p, c.c_void_p, _STATUS)


class FailureNote:
    """What UCX told about the end of an endpoint: ``status`` is OK until there is something.

    Must live as long as the endpoint. ``act`` is called from within the worker's progress.
    """

    def __init__(self, act: Callable[[], None] | None = None) -> None:
        self.status = OK
        self._act = act
        self.callback = _ENDPOINT_FAILED(self._failed)

    def _failed(self, _argument: object, _endpoint: object, status: int) -> None:
        self.status = status
        if self._act is not None:
            self._act()


# For endpoints whose requests report the failure. UCX only wants somebody to be told.
_NOBODY: Final = FailureNote()
_SILENCE: Final = threading.Lock()  # the level is the whole process's


class UcxError(Exception):
    """A call of libucp failed; the text is UCX's own."""


@dataclass(frozen=True, slots=True)
class MappedMemory:
    """Registered memory: its handle here, and the key with which peers reach it."""

    address: int
    length: int
    handle: int
    remote_key: bytes


def load() -> Native:
    """Import ucxx and bind libucp. Raises TransportUnavailable, naming what is missing."""
    try:
        ucxx = importlib.import_module("ucxx._lib.libucxx")
        libraries = importlib.import_module("libucx").load_library()
    except (ImportError, OSError) as error:
        raise TransportUnavailable(
            f"the ucx transport needs ucxx and its UCX library, which cannot be loaded ({error}); "
            "run: pip install 'trtllm-launch[ucx]'. If mpi4py is used in this process, "
            "import ucxx before it"
        ) from error
    if libraries[-1] is None:
        raise TransportUnavailable(
            "the ucx transport found no libucp beside ucxx; run: pip install 'trtllm-launch[ucx]'"
        )
    return Native(ucxx, libraries[0], libraries[-1]._name)


class Native:
    """ucxx's classes and libucp's functions, bound to one loaded library."""

    def __init__(self, ucxx: Any, libucs: Any, path: str) -> None:
        self.ucxx = ucxx
        quick, slow = c.PyDLL(path), c.CDLL(path)
        pointer, size = c.c_void_p, c.c_size_t

        def bind(library: c.CDLL, name: str, result: Any, *arguments: Any) -> Any:
            try:
                function = library[name]
            except AttributeError as error:
                raise TransportUnavailable(
                    f"{path} has no {name}; the ucx transport needs libucx-cu12 1.21"
                ) from error
            function.restype, function.argtypes = result, arguments
            return function

        rma = (pointer, pointer, size, c.c_uint64, pointer, pointer)
        self._get = bind(quick, "ucp_get_nbx", pointer, *rma)
        self._put = bind(quick, "ucp_put_nbx", pointer, *rma)
        self._flush = bind(quick, "ucp_ep_flush_nbx", pointer, pointer, pointer)
        self.status = bind(quick, "ucp_request_check_status", _STATUS, pointer)
        self.free = bind(quick, "ucp_request_free", None, pointer)
        self._map = bind(slow, "ucp_mem_map", _STATUS, pointer, pointer, pointer)
        self._unmap = bind(slow, "ucp_mem_unmap", _STATUS, pointer, pointer)
        self._pack = bind(slow, "ucp_rkey_pack", _STATUS, pointer, pointer, pointer, pointer)
        self._release = bind(slow, "ucp_rkey_buffer_release", None, pointer)
        self._unpack = bind(slow, "ucp_ep_rkey_unpack", _STATUS, pointer, c.c_char_p, pointer)
        self.destroy_key = bind(slow, "ucp_rkey_destroy", None, pointer)
        self._create = bind(slow, "ucp_ep_create", _STATUS, pointer, pointer, pointer)
        self._close = bind(slow, "ucp_ep_close_nbx", pointer, pointer, pointer)
        self._query = bind(slow, "ucp_ep_query", _STATUS, pointer, pointer)
        self._tag_send = bind(
            quick, "ucp_tag_send_nbx", pointer, pointer, pointer, size, c.c_uint64, pointer
        )
        self._tag_post = bind(
            quick, "ucp_tag_recv_nbx", pointer, pointer, pointer, size, *(c.c_uint64,) * 2, pointer
        )
        self._cancel = bind(quick, "ucp_request_cancel", None, pointer, pointer)
        self._tag_probe = bind(
            quick, "ucp_tag_probe_nb", pointer, pointer, c.c_uint64, c.c_uint64, c.c_int, pointer
        )
        self._tag_receive = bind(
            quick, "ucp_tag_msg_recv_nbx", pointer, pointer, pointer, size, pointer, pointer
        )
        self._describe = bind(quick, "ucs_status_string", c.c_char_p, _STATUS)
        self._plain = _RequestParam()
        self._forced = _RequestParam(mask=_MASK_FLAGS, flags=_CLOSE_BY_FORCE)
        self._libucs = libucs
        # ucxx sets a variable that its own build of UCX does not know, and every request that ends with
        # its worker is a warning: kept off stdout, unless the operator asked for another level.
        if self._log_level() == b"warn":
            self._set_log_level(b"error")

    def _log_level(self) -> bytes:
        level = c.create_string_buffer(64)
        self._libucs.ucs_global_opts_get_value(b"LOG_LEVEL", level, c.c_size_t(len(level)))
        return level.value.lower()

    def _set_log_level(self, level: bytes) -> None:
        self._libucs.ucs_global_opts_set_value(b"LOG_LEVEL", level)

    @contextlib.contextmanager
    def silence(self) -> Iterator[None]:
        """Keep UCX from printing what it finds wrong: for a try that may well fail."""
        with _SILENCE:
            level = self._log_level()
            if level == b"error":  # all else was asked for by the operator
                self._set_log_level(b"fatal")
            try:
                yield
            finally:
                self._set_log_level(level)

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """What ucxx and these bindings raise when UCX refuses something."""
        return (UcxError, self.ucxx.UCXError, RuntimeError, OSError)

    def option(self, name: str) -> str:
        """Return a UCX option as the process's environment has it."""
        return str(self.ucxx.get_current_options().get(name, ""))

    def describe(self, status: int) -> str:
        """Return UCX's words for a status."""
        return bytes(self._describe(status)).decode()

    def check(self, status: int, what: str) -> None:
        """Raise UcxError unless ``status`` is OK."""
        if status != OK:
            raise UcxError(f"{what}: {self.describe(status)}")

    def map_memory(self, context: Any, address: int, length: int) -> MappedMemory:
        """Register memory for one-sided access. Raises UcxError."""
        handle, packed, packed_size = c.c_void_p(), c.c_void_p(), c.c_size_t()
        params = _MapParams(mask=0b11, address=address, length=length)
        self.check(
            self._map(context.handle, c.byref(params), c.byref(handle)),
            f"registering {length} bytes",
        )
        try:
            self.check(
                self._pack(context.handle, handle, c.byref(packed), c.byref(packed_size)),
                "packing a remote key",
            )
            key = c.string_at(packed, packed_size.value)
            self._release(packed)
        except UcxError:
            self._unmap(context.handle, handle)
            raise
        return MappedMemory(address, length, handle.value or 0, key)

    def unmap(self, context: Any, memory: MappedMemory) -> None:
        """Undo ``map_memory``."""
        self._unmap(context.handle, memory.handle)

    def create_endpoint(self, worker: int, address: bytes, failure: FailureNote = _NOBODY) -> int:
        """Return an endpoint that reports a dead peer, to ``failure`` as well. Raises UcxError.

        Not ucxx's own: that one waits without limit in its destructor for a peer that stands still.
        Whoever calls this ends it with ``start_close``, or by destroying the worker.
        """
        endpoint = c.c_void_p()
        params = _EpParams(
            mask=_EP_ADDRESS_AND_ERRORS,
            address=address,
            err_mode=_ERRORS_PER_PEER,
            err_callback=c.cast(failure.callback, c.c_void_p),
        )
        self.check(self._create(worker, c.byref(params), c.byref(endpoint)), "connecting")
        return endpoint.value or 0

    def start_close(self, endpoint: int) -> int | None:
        """Begin to close an endpoint by force, which ends its requests; it must not be used again."""
        request: int | None = self._close(endpoint, c.addressof(self._forced))
        return request

    def unpack_key(self, endpoint: int, packed: bytes) -> int:
        """Return a handle of a peer's key, for ``destroy_key`` later. Raises UcxError."""
        key = c.c_void_p()
        self.check(self._unpack(endpoint, packed, c.byref(key)), "unpacking the peer's key")
        return key.value or 0

    def transports(self, endpoint: int) -> tuple[str, ...]:
        """Return the names of what carries this endpoint's bytes; empty where UCX does not tell."""
        entries = (_TransportEntry * _MAX_TRANSPORTS)()
        attr = _EpAttr(
            mask=_EP_TRANSPORTS,
            entries=c.addressof(entries),
            num_entries=_MAX_TRANSPORTS,
            entry_size=c.sizeof(_TransportEntry),
        )
        if self._query(endpoint, c.byref(attr)) != OK:
            return ()
        return tuple(sorted({entries[i].transport.decode() for i in range(attr.num_entries)}))

    def start_gets(
        self, endpoint: int, pieces: Pieces, key: int, memory: MappedMemory | None
    ) -> list[int]:
        """Queue one get per piece; return the requests that are not complete. Raises nothing."""
        return self._start(self._get, endpoint, pieces, key, memory)

    def start_puts(
        self, endpoint: int, pieces: Pieces, key: int, memory: MappedMemory | None
    ) -> list[int]:
        """Queue one put per piece; return the requests that are not complete. Raises nothing."""
        return self._start(self._put, endpoint, pieces, key, memory)

    def _start(
        self, call: Any, endpoint: int, pieces: Pieces, key: int, memory: MappedMemory | None
    ) -> list[int]:
        param = _RequestParam()
        if memory is not None:
            param.mask, param.memh = _MASK_MEMORY, memory.handle
        calls = map(
            call,
            repeat(endpoint),
            pieces.local,
            pieces.lengths,
            pieces.remote,
            repeat(key),
            repeat(c.addressof(param)),
        )
        return [request for request in calls if request is not None]

    def start_flush(self, endpoint: int) -> int | None:
        """Queue a flush of everything before it; None: all is complete already."""
        request: int | None = self._flush(endpoint, c.addressof(self._plain))
        return request

    def start_send(self, endpoint: int, message: bytes, tag: int) -> int | None:
        """Queue a tagged message, whose bytes must live until the request ends."""
        request: int | None = self._tag_send(
            endpoint, message, len(message), tag, c.addressof(self._plain)
        )
        return request

    def start_sends(self, endpoint: int, pieces: Pieces, tag: int) -> list[int]:
        """Queue one tagged message per piece; return the requests that are not complete."""
        calls = map(
            self._tag_send,
            repeat(endpoint),
            pieces.local,
            pieces.lengths,
            repeat(tag),
            repeat(c.addressof(self._plain)),
        )
        return [request for request in calls if request is not None]

    def start_receives(self, worker: int, pieces: Pieces, tag: int) -> list[int]:
        """Post one receipt per piece; messages of that tag fill them in the order they were sent."""
        calls = map(
            self._tag_post,
            repeat(worker),
            pieces.local,
            pieces.lengths,
            repeat(tag),
            repeat(2**64 - 1),
            repeat(c.addressof(self._plain)),
        )
        return [request for request in calls if request is not None]

    def cancel(self, worker: int, request: int) -> None:
        """End the receipt of a message none of which has arrived; it still must be given back."""
        if request < _FIRST_ERROR:
            self._cancel(worker, request)

    def take_messages(
        self, worker: int, tag: int, mask: int = 2**64 - 1
    ) -> Iterator[tuple[int, int]]:
        """Yield (message handle, length) of each message that no receipt was posted for.

        Each must be received. ``mask`` 0: whatever their tag is.
        """
        info = _TagInfo()
        while message := self._tag_probe(worker, tag, mask, 1, c.byref(info)):
            yield message, info.length

    def start_receive(self, worker: int, message: int, into: c.Array[c.c_char]) -> int | None:
        """Queue the receipt of one message taken by ``take_messages``."""
        request: int | None = self._tag_receive(
            worker, c.addressof(into), len(into), message, c.addressof(self._plain)
        )
        return request

    def state(self, request: int | None) -> int:
        """Return the status of what a ``start_`` call returned."""
        if request is None:
            return OK
        if request >= _FIRST_ERROR:
            return request - 2**64
        return int(self.status(request))

    def finish_if_all_ok(self, requests: Sequence[int]) -> bool:
        """Give requests back if every one has ended well; return whether that is so."""
        if max(requests) >= _FIRST_ERROR or any(map(self.status, requests)):
            return False
        for _ in map(self.free, requests):
            pass
        return True

    def finish(self, request: int | None) -> None:
        """Give a request back; it must not be used again."""
        if request is not None and request < _FIRST_ERROR:
            self.free(request)
