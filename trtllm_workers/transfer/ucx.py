"""The ucx transport: KV blocks over UCX, through ucxx.

    ucx.py             transport: start, card, connect, close
    ucx_wires.py       what may carry bytes, from UCX_TLS, UCX_NET_DEVICES and our address
    ucx_link.py        one peer: deadlines, failures, when bytes have stopped
    ucx_worker.py      one-sided: the UCX worker that moves bytes, driven by ucxx's C++ thread
    ucx_notify.py      one-sided: the UCX worker that carries messages, driven by the event loop
    ucx_net_channel.py messages: the end that reads and writes
    ucx_net_server.py  messages: the end that owns the pool, and its thread
    ucx_talk.py        messages: what the two say
    ucx_card.py        what stands in a card; whether a peer's process lives
    ucx_pieces.py      which bytes go where
    ucx_native.py      the calls of libucp that ucxx's Python API lacks

Peers meet one-sided over shared memory or RDMA where UCX finds either. Elsewhere the owner is asked for the
blocks and sends them as messages over UCX's tcp: emulated gets would be less to write, but UCX 1.21 ends
the owner's whole process when a reader's connection breaks while one is being answered. On a loopback
``host`` no network device is used at all; elsewhere ``UCX_TLS`` and ``UCX_NET_DEVICES`` overrule us.

In one process with mpi4py, import ucxx before it: the mpich and Open MPI wheels bring a libucp of the
same name, and the second one to be loaded finds the first one's symbols.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections import deque
from collections.abc import Mapping
from typing import Final

import msgspec
import structlog

from trtllm_workers.config.interfaces import addresses_of_interfaces
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
from trtllm_workers.transfer.ucx_net_server import NetServer
from trtllm_workers.transfer.ucx_notify import Notifier
from trtllm_workers.transfer.ucx_pieces import PinnedBytes
from trtllm_workers.transfer.ucx_wires import EVERYTHING, Wires, choose_wires
from trtllm_workers.transfer.ucx_worker import QUEUE, Channel, Server
from trtllm_workers.types import TransportCard

log = structlog.get_logger(__name__)

_TOKEN_BYTES: Final = 32
_LOOKUP_S: Final = 2.0  # for our own name
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
        self._net: NetServer | None = None
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
        wires = await self._wires(native)
        options = {**wires.one_sided, **_DATA_OPTIONS}
        with contextlib.ExitStack() as undo:
            try:
                server = await asyncio.to_thread(Server, native, options, pool, token)
                undo.callback(server.close)
                notifier = Notifier(
                    native,
                    wires.one_sided,
                    peer_id=self._peer_id,
                    token=token,
                    on_notify=self._on_notify,
                )
                undo.callback(notifier.close)
            except native.failures as error:
                raise TransportUnavailable(
                    f"UCX cannot start on this host ({error}); is kernel.shmmax above 32 MiB? "
                    "Or choose another transport"
                ) from error
            self._net = await self._serve_network(native, wires.messages, server.pinned, token)
            undo.pop_all()
        self._setting = LinkSetting(
            our_id=self._peer_id,
            native=native,
            options=options,
            net_options=wires.messages if self._net is not None else None,
            pool=pool,
            server=server,
            notifier=notifier,
            forget=self._links.discard,
            park=self._park,
        )
        self._card = TransportCard(
            transport=self.name,
            peer_id=self._peer_id,
            layout=pool.layout,
            num_blocks=pool.num_blocks,
            address=msgspec.msgpack.encode(_address(server, notifier, self._net, token)),
        )

    async def _wires(self, native: ucx_native.Native) -> Wires:
        wires = choose_wires(
            native.option("TLS"),
            native.option("NET_DEVICES"),
            self._host,
            await _addresses_of(self._host),
            addresses_of_interfaces(),
        )
        if wires.messages is not None:
            given = native.option("NET_DEVICES")
            log.info(
                "ucx over TCP is for peers that shared memory and RDMA do not reach",
                devices=wires.messages.get("NET_DEVICES", given),
                chosen_by="UCX_NET_DEVICES" if given != EVERYTHING else f"our address {self._host}",
            )
        return wires

    async def _serve_network(
        self,
        native: ucx_native.Native,
        options: Mapping[str, str] | None,
        pool: PinnedBytes,
        token: bytes,
    ) -> NetServer | None:
        if options is None:
            return None
        loop = asyncio.get_running_loop()
        try:
            return await asyncio.to_thread(
                NetServer, native, options, pool, token, self._on_notify, loop
            )
        except native.failures as error:
            log.warning(
                "ucx reaches no peer over TCP; UCX_NET_DEVICES names the network interfaces it may use",
                reason=str(error),
            )
            return None

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
        if self._net is not None:
            await asyncio.to_thread(self._net.close)
        while self._parked:
            await asyncio.to_thread(self._parked.popleft().destroy)
        await asyncio.to_thread(setting.server.close)

    def _park(self, channel: Channel) -> None:
        """Keep the memory of a connection to a peer that stood still, which it may yet write to."""
        if channel not in self._parked:
            self._parked.append(channel)
        if len(self._parked) > _MAX_PARKED:
            self._parked.popleft().destroy()


def _address(server: Server, notifier: Notifier, net: NetServer | None, token: bytes) -> UcxAddress:
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
        net_worker=net.address if net is not None else b"",
    )


async def _addresses_of(host: str) -> list[str]:
    """Return what a host's name or address means here; nothing when that takes too long to say."""
    with contextlib.suppress(OSError, UnicodeError, TimeoutError):
        async with asyncio.timeout(_LOOKUP_S):
            found = await asyncio.get_running_loop().getaddrinfo(
                host, None, type=socket.SOCK_STREAM
            )
            return [str(address[0]) for *_, address in found]
    return []
