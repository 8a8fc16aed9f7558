"""The ucx transport: one-sided reads and writes of KV blocks over UCX, through ucxx.

    ucx.py         transport: start, card, connect, close
    ucx_link.py    one peer: deadlines, failures, when bytes have stopped
    ucx_worker.py  the UCX worker that moves bytes, driven by ucxx's C++ thread
    ucx_notify.py  the UCX worker that carries messages, driven by the event loop
    ucx_card.py    what stands in a card; whether a peer's process lives
    ucx_native.py  the calls of libucp that ucxx's Python API lacks

What carries the bytes is UCX's choice. On a loopback ``host`` it may use shared memory only: an open UCX
port would let whoever reaches it read this process, because UCX authenticates nobody. On another ``host``
UCX takes what its own variables (``UCX_TLS``, ``UCX_NET_DEVICES``) and the hardware allow, so its ports
belong on a private network.

In one process with mpi4py, import ucxx before it: the mpich and Open MPI wheels bring a libucp of the
same name, and the second one to be loaded finds the first one's symbols.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import secrets
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
from trtllm_workers.transfer.ucx_worker import Server
from trtllm_workers.types import TransportCard

_TOKEN_BYTES: Final = 32
# Shared memory counts as able to report dead peers only with this, and endpoints ask for it.
_OPTIONS: Final = {"MM_ERROR_HANDLING": "y"}
# A block of 32 KiB fits in one message. 512 of them (17 MiB of shared memory per worker) may be under
# way: with fewer, a busy host's scheduler has to change between the two processes more often.
_DATA_OPTIONS: Final = {"MM_SEG_SIZE": "33k", "MM_FIFO_SIZE": "512"}


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
        self._closed = False

    @property
    def name(self) -> str:
        return "ucx"

    async def start(self, pool: KvPool) -> None:
        if self._closed or self._setting is not None:
            raise TransferError("the ucx transport was started or closed before")
        native = await asyncio.to_thread(ucx_native.load)
        token = secrets.token_bytes(_TOKEN_BYTES)
        options = {**_OPTIONS, **_carriers(self._host)}
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
            native, {**options, **_DATA_OPTIONS}, pool, server, notifier, self._links.discard
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
        await asyncio.to_thread(setting.server.close)


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


def _carriers(host: str) -> Mapping[str, str]:
    """Return the UCX options that keep a worker on a loopback host off the network."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    # System V segments vanish with their last user, and containers do not limit them to 64 MiB.
    return {"TLS": "sysv,self"} if loopback else {}
