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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Final

from trtllm_workers.errors import TransportUnavailable

SEGMENT_BYTES: Final = 32 * 1024  # what one message of an emulated get or put carries at most
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


def _endpoint_failed(_argument: object, _endpoint: object, _status: object) -> None:
    """Do nothing: requests report the failure. UCX only wants somebody to be told."""


_ENDPOINT_FAILED = c.CFUNCTYPE(None, c.c_void_p, c.c_void_p, _STATUS)(_endpoint_failed)


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


def _quieten(libucs: Any) -> None:
    """Keep UCX's warnings off stdout, unless the operator asked for another level.

    ucxx sets a variable that its own build of UCX does not know, and every request that ends with its
    worker is a warning.
    """
    level = c.create_string_buffer(64)
    libucs.ucs_global_opts_get_value(b"LOG_LEVEL", level, c.c_size_t(len(level)))
    if level.value.lower() == b"warn":
        libucs.ucs_global_opts_set_value(b"LOG_LEVEL", b"error")


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
            quick, "ucp_tag_send_nbx", pointer, pointer, c.c_char_p, size, c.c_uint64, pointer
        )
        self._tag_probe = bind(
            quick, "ucp_tag_probe_nb", pointer, pointer, c.c_uint64, c.c_uint64, c.c_int, pointer
        )
        self._tag_receive = bind(
            quick, "ucp_tag_msg_recv_nbx", pointer, pointer, pointer, size, pointer, pointer
        )
        self._describe = bind(quick, "ucs_status_string", c.c_char_p, _STATUS)
        self._plain = _RequestParam()
        self._forced = _RequestParam(mask=_MASK_FLAGS, flags=_CLOSE_BY_FORCE)
        _quieten(libucs)

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

    def create_endpoint(self, worker: int, address: bytes) -> int:
        """Return an endpoint that reports a dead peer. Raises UcxError.

        Not ucxx's own: that one waits without limit in its destructor for a peer that stands still.
        Whoever calls this ends it with ``start_close``, or by destroying the worker.
        """
        endpoint = c.c_void_p()
        params = _EpParams(
            mask=_EP_ADDRESS_AND_ERRORS,
            address=address,
            err_mode=_ERRORS_PER_PEER,
            err_callback=c.cast(_ENDPOINT_FAILED, c.c_void_p),
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

    def take_messages(self, worker: int, tag: int) -> Iterator[tuple[int, int]]:
        """Yield (message handle, length) of each message that has arrived; each must be received."""
        info = _TagInfo()
        while message := self._tag_probe(worker, tag, 2**64 - 1, 1, c.byref(info)):
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


@dataclass(frozen=True, slots=True)
class Pieces:
    """What one call each must move: addresses here and there, and lengths in bytes."""

    local: list[int]
    remote: list[int]
    lengths: list[int]

    def slices(self, size: int) -> Iterator[Pieces]:
        """Yield the pieces, at most ``size`` at a time."""
        for i in range(0, len(self.local), size):
            end = i + size
            yield Pieces(self.local[i:end], self.remote[i:end], self.lengths[i:end])

    def windows(self, segments: int) -> Iterator[Pieces]:
        """Yield the pieces, cut where needed, at most ``segments`` segments at a time."""
        if max(self.lengths, default=0) <= SEGMENT_BYTES:
            yield from self.slices(segments)
            return
        window = Pieces([], [], [])
        room = segments
        for here, there, length in zip(self.local, self.remote, self.lengths, strict=True):
            done = 0
            while done < length:
                if room == 0:
                    yield window
                    window, room = Pieces([], [], []), segments
                part = min(length - done, room * SEGMENT_BYTES)
                window.local.append(here + done)
                window.remote.append(there + done)
                window.lengths.append(part)
                room -= -(-part // SEGMENT_BYTES)
                done += part
        yield window


def block_pieces(
    local: Sequence[int], remote: Sequence[int], block_bytes: int, local_base: int, remote_base: int
) -> Pieces:
    """Return one piece per run of blocks that lie side by side on both ends."""
    here: list[int] = []
    there: list[int] = []
    lengths: list[int] = []
    next_local = next_remote = -1
    for mine, theirs in zip(local, remote, strict=True):
        if mine == next_local and theirs == next_remote:
            lengths[-1] += block_bytes
        else:
            here.append(local_base + mine * block_bytes)
            there.append(remote_base + theirs * block_bytes)
            lengths.append(block_bytes)
        next_local, next_remote = mine + 1, theirs + 1
    return Pieces(here, there, lengths)


class PinnedBytes:
    """The address of a writable flat view, which cannot go away until ``release``."""

    def __init__(self, memory: memoryview) -> None:
        self.length = memory.nbytes
        self._array: Any = (c.c_char * self.length).from_buffer(memory)
        self.address = c.addressof(self._array)

    def release(self) -> None:
        """Let the memory go; safe twice."""
        with contextlib.suppress(AttributeError):
            del self._array
