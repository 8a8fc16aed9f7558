"""The request plane over TCP: every process listens, and connects to whom it needs. No broker.

It authenticates every connection with the cluster secret (``handshake.py``). It encrypts where it
is given certificates (``tls.py``); without them, on a network that others can listen to, prompts and
answers are readable and connections can be tampered with: listen on loopback or on a network of your
own. It knows no message's meaning but Ping and Pong, which it answers itself.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from typing import Final

import structlog

from trtllm_workers.config.outside import TlsFiles
from trtllm_workers.errors import ConfigError, FrameError, PeerLost, PlaneError, StartError
from trtllm_workers.planes.base import OnLost, OnMessage
from trtllm_workers.planes.connection import Connection
from trtllm_workers.planes.tls import PlaneTls
from trtllm_workers.types import Address

# Accepted connections that have not proven the secret. Beyond that many, one that is older than the
# grace makes room for each newcomer; a thousand workers that start at once are all younger.
MAX_HALF_OPEN: Final = 256
HALF_OPEN_GRACE_S: Final = 1.0
MAX_BUFFERED_BYTES: Final = 64 * 1024 * 1024  # waiting for one peer that does not read
_MAX_KNOWN_PEERS: Final = 4096
_CLOSE_TIMEOUT_S: Final = 1.0
# A host's clock may be set back; its next life then seems older than the one that is gone. No frame of that
# one is still on its way after so long, so it no longer keeps the next one out.
FORGET_LIFE_S: Final = 60.0

log = structlog.get_logger(__name__)


def new_incarnation() -> str:
    """Return a name for this life of a process; that of a younger life compares greater as text.

    The order is that of this host's wall clock. 24 hexadecimal digits.
    """
    return f"{time.time_ns():016x}{secrets.token_hex(4)}"


class _Dial:
    """One connection attempt and how many wait for it; the last to leave gives it up."""

    def __init__(self, task: asyncio.Task[Connection]) -> None:
        self.task = task
        self.waiters = 0


class TcpMesh:
    """Implements RequestPlane (base.py holds its guarantees) over authenticated TCP connections.

    * ``secret`` is the cluster secret, shared by all processes. ``incarnation`` is this life's name
      (``new_incarnation``). Port 0 takes any free port.
    * ``advertise_host`` is what others are told to connect to; it must be given when ``host`` is a
      wildcard such as 0.0.0.0.
    * Of a peer without a connection the youngest life is remembered for ``FORGET_LIFE_S``; older ones are
      refused until then.
    * A peer of which nothing is heard for ``ping_deadline_s`` is lost; a silent one is asked every
      ``ping_interval_s``. A process whose own loop stood still does not hold that against others.
    * When both ends dial at once, two connections live; ``peer`` keeps naming the same one while it
      lasts.
    * ``tls``: mutual TLS on every connection, with certificates of the one authority given. Host
      names are not checked: the authority and the cluster secret authenticate. Without files: plain.
      A plain process and an encrypted one refuse each other with AuthenticationFailed on both sides.
    """

    def __init__(
        self,
        *,
        peer_id: str,
        incarnation: str,
        secret: bytes,
        on_message: OnMessage,
        on_lost: OnLost,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise_host: str | None = None,
        ping_interval_s: float = 2.0,
        ping_deadline_s: float = 10.0,
        max_buffered_bytes: int = MAX_BUFFERED_BYTES,
        tls: TlsFiles | None = None,
    ) -> None:
        if not secret:
            raise ConfigError("the cluster secret is empty; every connection needs one")
        if not 0 < ping_interval_s < ping_deadline_s:
            raise ConfigError(
                f"ping interval ({ping_interval_s:g} s) must be above 0 and below the ping deadline "
                f"({ping_deadline_s:g} s)"
            )
        if advertise_host is None and host in ("", "0.0.0.0", "::"):
            raise ConfigError(
                f"listening on '{host}' says nothing about where others reach this process; "
                "say which address to advertise"
            )
        self.secret = secret
        self.tls = PlaneTls(tls) if tls else None
        self.on_message = on_message
        self.max_buffered_bytes = max_buffered_bytes
        self.youngest: dict[str, str] = {}
        self._gone_since_s: dict[str, float] = {}  # peers whose last connection has ended
        self._on_lost = on_lost
        self._host, self._port = host, port
        self._advertised = Address(advertise_host or host, port, peer_id, incarnation)
        self._ping_interval_s, self._ping_deadline_s = ping_interval_s, ping_deadline_s
        self._server: asyncio.Server | None = None
        self._tick: asyncio.TimerHandle | None = None
        self._closed = False
        self._connections: set[Connection] = set()
        self._half_open: dict[Connection, float] = {}
        self._peers: dict[tuple[str, str], list[Connection]] = {}
        self._dials: dict[Address, _Dial] = {}
        self._dial_tasks: set[asyncio.Task[Connection]] = set()
        self._all_ended = asyncio.Event()

    # RequestPlane

    @property
    def address(self) -> Address:
        if self._server is None:
            raise RuntimeError("the mesh has an address after start()")
        return self._advertised

    async def start(self) -> None:
        """Listen. Raises StartError when the address is taken or is not of this host."""
        loop = asyncio.get_running_loop()
        try:
            # One socket: "localhost" is two addresses, and port 0 would become two ports.
            found = await loop.getaddrinfo(
                self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            numeric_host = str(found[0][4][0])
            self._server = await loop.create_server(
                lambda: Connection(self), numeric_host, self._port, backlog=1024
            )
        except (OSError, OverflowError, UnicodeError) as error:
            raise StartError(
                f"cannot listen on {self._host}:{self._port}: {error}; choose another host or port "
                "(port 0 takes any free one)"
            ) from error
        old = self._advertised
        port = self._server.sockets[0].getsockname()[1]
        self._advertised = Address(old.host, port, old.peer_id, old.incarnation)
        self._schedule_tick(loop)

    async def connect(self, address: Address, timeout_s: float = 5.0) -> Connection:
        if self._server is None:
            raise RuntimeError("connect() needs start() before it")
        if self._closed:
            raise PeerLost(f"cannot connect to {address}: this process's request plane is closed")
        live = self.peer(address)
        if live is not None:
            return live
        dial = self._dials.get(address)
        if dial is None:
            task = asyncio.create_task(self._dial(address), name=f"dial {address}")
            self._dial_tasks.add(task)
            task.add_done_callback(self._dial_ended)
            dial = self._dials[address] = _Dial(task)
        dial.waiters += 1
        try:
            await asyncio.wait({dial.task}, timeout=timeout_s)
        finally:
            dial.waiters -= 1
            if dial.waiters == 0:
                if self._dials.get(address) is dial:
                    del self._dials[address]
                if not dial.task.done():
                    dial.task.cancel()
        if not dial.task.done():
            raise PeerLost(f"{address} did not answer within {timeout_s:g} s; is it overloaded?")
        if dial.task.cancelled():
            raise PeerLost(f"cannot connect to {address}: this process's request plane is closed")
        return dial.task.result()

    def peer(self, address: Address) -> Connection | None:
        for connection in self._peers.get((address.peer_id, address.incarnation), ()):
            if connection.alive:
                return connection
        return None

    def peers(self) -> list[Connection]:
        firsts = (next((c for c in some if c.alive), None) for some in self._peers.values())
        return [connection for connection in firsts if connection is not None]

    async def close(self) -> None:
        self._closed = True
        if self._tick is not None:
            self._tick.cancel()
        if self._server is not None:
            self._server.close()
        for task in self._dial_tasks:
            task.cancel()
        for connection in list(self._connections):
            connection.close(PeerLost(f"the request plane of {self._advertised} was closed"))
        if not await self._wait_ended():
            for connection in list(self._connections):
                connection.lose(PeerLost(f"the request plane of {self._advertised} was closed"))
            await self._wait_ended()
        if self._dial_tasks:
            await asyncio.wait(self._dial_tasks, timeout=_CLOSE_TIMEOUT_S)
        if self._server is not None:
            await self._server.wait_closed()

    # Owner of connections

    def made(self, connection: Connection) -> None:
        self._connections.add(connection)
        if self._closed:
            connection.lose(PeerLost("this process's request plane is closed"))
        elif connection.dialed is None:
            now_s = asyncio.get_running_loop().time()
            if len(self._half_open) >= MAX_HALF_OPEN:
                oldest, since_s = next(iter(self._half_open.items()))
                if now_s - since_s >= HALF_OPEN_GRACE_S:
                    del self._half_open[oldest]
                    oldest.refuse(PeerLost(f"more than {MAX_HALF_OPEN} handshakes are unfinished"))
            self._half_open[connection] = now_s

    def opened(self, connection: Connection) -> None:
        self._half_open.pop(connection, None)
        address = connection.address
        key = (address.peer_id, address.incarnation)
        self._gone_since_s.pop(address.peer_id, None)
        self._remember_youngest(address)
        for (peer_id, incarnation), others in list(self._peers.items()):
            if peer_id == address.peer_id and incarnation < address.incarnation:
                words = f"{address} was restarted as incarnation {address.incarnation}"
                for other in others:
                    other.lose(PeerLost(words))
        self._peers.setdefault(key, []).append(connection)
        log.info("peer connected", peer=str(address), dialed=connection.dialed is not None)

    def ended(self, connection: Connection, error: PlaneError, *, was_open: bool) -> None:
        self._connections.discard(connection)
        self._half_open.pop(connection, None)
        if not self._connections:
            self._all_ended.set()
        if not was_open:
            if connection.dialed is None and not self._closed:
                # A port probe that hangs up is nobody's trouble; a wrong secret is.
                level = logging.DEBUG if isinstance(error, PeerLost) else logging.WARNING
                log.log(level, "connection refused", source=connection.source, reason=str(error))
            return
        address = connection.address
        key = (address.peer_id, address.incarnation)
        self._peers[key].remove(connection)
        if not self._peers[key]:
            del self._peers[key]
            if not any(peer_id == address.peer_id for peer_id, _ in self._peers):
                self._gone_since_s[address.peer_id] = asyncio.get_running_loop().time()
        lost = error if isinstance(error, PeerLost) else PeerLost(str(error))
        log.info("peer lost", peer=str(address), reason=str(lost))
        try:
            self._on_lost(connection, lost)
        except Exception:  # the border: a handler's bug must not stop the clean-up of others
            log.exception("loss handler failed", peer=str(address))

    # Inside

    async def _dial(self, address: Address) -> Connection:
        if not 0 < address.port < 65536:  # uvloop would wrap it round and reach somebody else
            raise PeerLost(f"nobody can answer at {address}: a port is 1 to 65535")
        loop = asyncio.get_running_loop()
        connection = Connection(self, address)
        try:
            await loop.create_connection(lambda: connection, address.host, address.port)
        except (OSError, OverflowError, UnicodeError) as error:
            raise PeerLost(f"nobody answers at {address}: {error}; is it still running?") from error
        try:
            await connection.open
        except FrameError as error:
            raise PeerLost(f"{address} is no process of ours: {error}") from error
        except asyncio.CancelledError:
            connection.lose(PeerLost(f"the attempt to connect to {address} was given up"))
            raise
        return connection

    def _dial_ended(self, task: asyncio.Task[Connection]) -> None:
        self._dial_tasks.discard(task)
        if not task.cancelled():
            task.exception()  # connect() raises it to whoever still waits

    def _remember_youngest(self, address: Address) -> None:
        """Note the youngest life of a peer; of very many peers the first met are forgotten."""
        known = self.youngest.pop(address.peer_id, "")
        self.youngest[address.peer_id] = max(known, address.incarnation)
        if len(self.youngest) > _MAX_KNOWN_PEERS:
            del self.youngest[next(iter(self.youngest))]

    def _forget_lives(self, now_s: float) -> None:
        for peer_id, since_s in list(self._gone_since_s.items()):
            if now_s - since_s > FORGET_LIFE_S:
                del self._gone_since_s[peer_id]
                self.youngest.pop(peer_id, None)

    def _schedule_tick(self, loop: asyncio.AbstractEventLoop) -> None:
        due_s = loop.time() + self._ping_interval_s
        self._tick = loop.call_at(due_s, self._look_around, loop, due_s)

    def _look_around(self, loop: asyncio.AbstractEventLoop, due_s: float) -> None:
        """Ask silent peers to answer, and lose those that were silent for too long."""
        now_s = loop.time()
        # Late: this loop stood still, so what peers sent meanwhile has not been read yet.
        late = now_s - due_s > self._ping_interval_s
        self._forget_lives(now_s)
        for connections in list(self._peers.values()):
            for connection in list(connections):
                if late:
                    connection.last_heard_s = now_s
                silent_s = now_s - connection.last_heard_s
                if silent_s > self._ping_deadline_s:
                    connection.lose(
                        PeerLost(
                            f"{connection.address} was silent for {silent_s:.1f} s; is it hung?"
                        )
                    )
                elif late or silent_s >= self._ping_interval_s / 2:
                    connection.ping()
        self._schedule_tick(loop)

    async def _wait_ended(self) -> bool:
        """Wait until every connection has ended; False when some have not in time."""
        while self._connections:
            self._all_ended.clear()
            try:
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._all_ended.wait()
            except TimeoutError:
                return False
        return True
