"""The ucx transport: one-sided reads and writes of KV blocks over UCX, through ucxx.

    ucx.py         transport: start, card, connect, close
    ucx_link.py    one peer: deadlines, failures, when bytes have stopped
    ucx_worker.py  the UCX worker that moves bytes, driven by ucxx's C++ thread
    ucx_notify.py  the UCX worker that carries messages, driven by the event loop
    ucx_card.py    what stands in a card; whether a peer's process lives
    ucx_native.py  the calls of libucp that ucxx's Python API lacks

What carries the bytes is UCX's choice, but not its tcp: UCX 1.21 ends the whole process of an owner
(``ucs_fatal``) when a reader's connection breaks while an emulated get is being answered, its ports
authenticate nobody, and this project's own tcp transport is as fast. So peers meet over shared memory or
RDMA. On a loopback ``host`` no network device is used at all; elsewhere ``UCX_TLS`` overrules this.

In one process with mpi4py, import ucxx before it: the mpich and Open MPI wheels bring a libucp of the
same name, and the second one to be loaded finds the first one's symbols.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import secrets
from collections import deque
from collections.abc import Mapping
from typing import Final

import msgspec

from trtllm_workers.errors import TransferError, TransferFailed, TransportUnavailable
from trtllm_workers.transfer import ucx_native
from trtllm_workers.transfer.base import KvLink, KvPool, OnNotify, check_layouts
from trtllm_workers.transfer.ucx_card import (
    UcxAddress,
    decode_address,
    started_ticks,
    this_host,
)
from trtllm_workers.transfer.ucx_link import LinkSetting, UcxLink
from trtllm_workers.transfer.ucx_notify import Notifier
from trtllm_workers.transfer.ucx_worker import QUEUE, Channel, Server
from trtllm_workers.types import TransportCard

_TOKEN_BYTES: Final = 32
# Shared memory counts as able to report dead peers only with this, and endpoints ask for it.
# Until an owner notices that a reader died in the middle of an answer, its worker has something to send
# and cannot sleep; UCX would look only every 20 s.
_OPTIONS: Final = {"MM_ERROR_HANDLING": "y", "KEEPALIVE_INTERVAL": "1s"}
# A block of 32 KiB fits in one message. 512 of them may be under way: with fewer, a busy host's scheduler
# has to change between the two processes more often. All buffers lie in one segment (21 MiB per worker and
# per peer), which a peer has attached once it has answered the first time: UCX ends the process of an
# owner that cannot attach a second one because the reader has died.
_DATA_OPTIONS: Final = {
    "MM_SEG_SIZE": "33k",
    "MM_FIFO_SIZE": str(QUEUE),
    "MM_FIFO_RELEASE_FACTOR": "0.0625",  # a reader tells of every 32nd message that it has taken
    "MM_RX_BUFS_GROW": "640",
    "MM_RX_MAX_BUFS": "640",
}
_MAX_PARKED: Final = 8  # connections that ended with requests under way; 21 MiB each


def probe() -> None:
    """Raise TransportUnavailable, saying what is missing, when ucxx cannot be used here."""
    ucx_native.load()


class UcxTransport:
    """KV blocks over UCX; see ``KvTransport`` for what it guarantees."""

    def __init__(self, *, peer_id: str, host: str, on_notify: OnNotify) -> None:
        self._peer_id = peer_id
        self._host = host
        self._on_notify = on_notify
        self._card: TransportCard | None = None
        self._setting: LinkSetting | None = None
        self._links: set[UcxLink] = set()
        self._parked: deque[Channel] = deque()
        self._closed = False

    @property
    def name(self) -> str:
        return "ucx"

    async def start(self, pool: KvPool) -> None:
        if self._closed or self._setting is not None:
            raise TransferError("the ucx transport was started or closed before")
        native = await asyncio.to_thread(ucx_native.load)
        token = secrets.token_bytes(_TOKEN_BYTES)
        options = {**_OPTIONS, **_carriers(native, self._host)}
        try:
            server = await asyncio.to_thread(
                Server, native, {**options, **_DATA_OPTIONS}, pool, token
            )
            try:
                notifier = Notifier(
                    native,
                    options,
                    peer_id=self._peer_id,
                    token=token,
                    on_notify=self._on_notify,
                )
            except BaseException:
                server.close()
                raise
        except native.failures as error:
            raise TransportUnavailable(
                f"UCX cannot start on this host ({error}); is kernel.shmmax above 32 MiB? "
                "Or choose another transport"
            ) from error
        self._setting = LinkSetting(
            native,
            {**options, **_DATA_OPTIONS},
            pool,
            server,
            notifier,
            self._links.discard,
            self._park,
        )
        self._card = TransportCard(
            transport=self.name,
            peer_id=self._peer_id,
            layout=pool.layout,
            num_blocks=pool.num_blocks,
            address=msgspec.msgpack.encode(_address(server, notifier, token)),
        )

    def card(self) -> TransportCard:
        if self._card is None:
            raise TransferError("the ucx transport has no card before start")
        return self._card

    async def connect(self, card: TransportCard, timeout_s: float) -> KvLink:
        setting = self._setting
        if setting is None:
            raise TransferFailed(f"ucx connecting to {card.peer_id}: this transport is not running")
        check_layouts(setting.pool.layout, card.layout, card.peer_id)
        if card.transport != self.name:
            raise TransferFailed(
                f"{card.peer_id} moves KV blocks over {card.transport}, this worker over ucx; "
                "give both the same --kv-transport"
            )
        link = UcxLink(setting, card, decode_address(card.address, card.peer_id))
        self._links.add(link)
        try:
            await link.open(timeout_s)
        except BaseException:
            await link.close()
            raise
        return link

    async def close(self) -> None:
        self._closed = True
        setting, self._setting = self._setting, None
        if setting is None:
            return
        await asyncio.gather(*(link.close() for link in tuple(self._links)))
        setting.notifier.close()
        while self._parked:
            await asyncio.to_thread(self._parked.popleft().destroy)
        await asyncio.to_thread(setting.server.close)

    def _park(self, channel: Channel) -> None:
        """Keep the memory of a connection to a peer that stood still, which it may yet write to."""
        if channel not in self._parked:
            self._parked.append(channel)
        if len(self._parked) > _MAX_PARKED:
            self._parked.popleft().destroy()


def _address(server: Server, notifier: Notifier, token: bytes) -> UcxAddress:
    pid = os.getpid()
    return UcxAddress(
        worker=server.address,
        notify_worker=notifier.address,
        pool_address=server.pool_memory.address,
        pool_key=server.pool_memory.remote_key,
        hello_address=server.hello_memory.address,
        hello_key=server.hello_memory.remote_key,
        token=token,
        host=this_host(),
        pid=pid,
        started_ticks=started_ticks(pid) or 0,
    )


def _carriers(native: ucx_native.Native, host: str) -> Mapping[str, str]:
    """Return the UCX options that choose what may carry bytes."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if loopback:
        # System V segments vanish with their last user, and containers do not limit them to 64 MiB.
        return {"TLS": "sysv,self"}
    return {"TLS": "^tcp"} if native.option("TLS") == "all" else {}
