"""One etcd cluster as one process sees it: calls with deadlines, at one member, then at the next.

The wire comes from aetcd's generated stubs on a gRPC channel of our own: aetcd's client class has
neither TLS nor a deadline for its streams.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import structlog

from trtllm_workers.config.outside import EtcdLogin, EtcdUrl
from trtllm_workers.planes import etcd_errors
from trtllm_workers.planes.etcd_errors import (
    Compacted,
    EtcdAway,
    EtcdError,
    EtcdRefused,
    TokenExpired,
)
from trtllm_workers.planes.etcd_login import credentials, packages, user_of

_CHANNEL_OPTIONS: Final = (
    # Every channel begins anew: gRPC would make a new one wait for what an old one met.
    ("grpc.use_local_subchannel_pool", 1),
    # etcd stands in the cluster; a proxy for the internet is of no use.
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),
)

log = structlog.get_logger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Kept:
    """A key and its value."""

    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Event:
    """One change of a key; ``value`` is None when it was deleted."""

    key: str
    value: bytes | None
    revision: int


@dataclass(slots=True)
class _Session:
    """A channel to one member, and the login on it."""

    endpoint: str
    channel: Any
    token: tuple[tuple[str, str], ...] | None = None
    answered: bool = False
    logged_in: asyncio.Lock = field(default_factory=asyncio.Lock)


class EtcdClient:
    """Talks to one etcd cluster.

    * Every call ends within ``call_timeout_s``, or twice that when it has to log in first. It
      raises EtcdAway (the next call asks the next member), EtcdRefused, LeaseGone or Compacted.
    * A call that finds its token expired logs in again by itself.
    * When a member is given up, every other call and watch at it ends with EtcdAway.
    * ``close`` ends all of them; afterwards no task, thread or channel is left. Safe twice.
    """

    def __init__(self, url: EtcdUrl, login: EtcdLogin, call_timeout_s: float = 2.5) -> None:
        self._grpc, self._rpc = packages()
        self._user, self._password = user_of(login)
        self._credentials = credentials(self._grpc, login.tls) if url.tls else None
        if login.tls and not url.tls:
            log.warning("TLS files have no effect: etcd is asked without TLS", url=str(url))
        self._endpoints = [
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in url.endpoints
        ]
        self.where = ", ".join(self._endpoints)
        self.call_timeout_s = call_timeout_s
        self._turn = 0
        self._session: _Session | None = None
        self._closed = False

    async def insist(self, attempt: Callable[[], Awaitable[T]], timeout_s: float) -> T:
        """Make the first contact: repeat an attempt until it succeeds.

        Raises ConfigError after ``timeout_s``, with every member's cause; at once when etcd says no.
        """
        causes: dict[str, str] = {}
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        return await attempt()
                    except EtcdRefused as error:
                        raise etcd_errors.turned_away(self.where, error) from error
                    except EtcdAway as error:
                        causes[error.endpoint] = error.why
                    except EtcdError as error:
                        causes["etcd"] = str(error)
                    await asyncio.sleep(min(0.1, timeout_s / 20))
        except TimeoutError:
            raise etcd_errors.unreachable(self.where, loop.time() - began_s, causes) from None

    # Keys

    async def read_all(self, prefix: str) -> tuple[list[Kept], int]:
        """Return all keys with a prefix, and the revision at which that was so."""
        request = self._rpc.RangeRequest(key=prefix.encode(), range_end=_after(prefix))
        answer = await self._call("KV", "Range", request)
        kept = [Kept(kv.key.decode(errors="replace"), kv.value) for kv in answer.kvs]
        return kept, answer.header.revision

    async def get(self, key: str) -> bytes | None:
        """Return a key's value; None when there is no such key."""
        answer = await self._call("KV", "Range", self._rpc.RangeRequest(key=key.encode()))
        return answer.kvs[0].value if answer.kvs else None

    async def has(self, key: str) -> bool:
        """Return whether a key is there. A majority of members has to agree, so it is a probe too."""
        request = self._rpc.RangeRequest(key=key.encode(), count_only=True)
        return bool((await self._call("KV", "Range", request)).count)

    async def put(self, key: str, value: bytes, lease: int) -> None:
        """Write a key that vanishes with a lease."""
        request = self._rpc.PutRequest(key=key.encode(), value=value, lease=lease)
        await self._call("KV", "Put", request)

    async def put_if_absent(self, key: str, value: bytes) -> bytes:
        """Write a key unless it is there; return what it holds then. One transaction."""
        rpc, name = self._rpc, key.encode()
        absent = rpc.Compare(
            result=rpc.Compare.EQUAL,
            target=rpc.Compare.CREATE,
            key=name,
            create_revision=0,
        )
        put = rpc.RequestOp(request_put=rpc.PutRequest(key=name, value=value))
        read = rpc.RequestOp(request_range=rpc.RangeRequest(key=name))
        request = rpc.TxnRequest(compare=[absent], success=[put], failure=[read])
        answer = await self._call("KV", "Txn", request)
        if answer.succeeded:
            return value
        return bytes(answer.responses[0].response_range.kvs[0].value)

    # Leases

    async def grant(self, ttl_s: int) -> int:
        """Return the id of a new lease."""
        answer = await self._call("Lease", "LeaseGrant", self._rpc.LeaseGrantRequest(TTL=ttl_s))
        return int(answer.ID)

    async def keep_alive(self, lease: int) -> bool:
        """Give a lease its whole time again; False when it is gone."""
        request = self._rpc.LeaseKeepAliveRequest(ID=lease)

        async def send(session: _Session) -> Any:
            # One beat, one stream: each has its own deadline, and none outlives its member.
            stream = self._rpc.LeaseStub(session.channel).LeaseKeepAlive(
                timeout=self.call_timeout_s, metadata=session.token
            )
            try:
                await stream.write(request)
                answer = await stream.read()
            finally:
                stream.cancel()
            if answer is self._grpc.aio.EOF:
                raise EtcdAway(session.endpoint, "it ended the stream of heartbeats")
            return answer

        return bool((await self._attempt(send)).TTL > 0)

    async def revoke(self, lease: int) -> None:
        """End a lease, and with it its keys."""
        await self._call("Lease", "LeaseRevoke", self._rpc.LeaseRevokeRequest(ID=lease))

    # Watches

    @contextlib.asynccontextmanager
    async def watch(self, prefix: str, revision: int) -> AsyncIterator[AsyncIterator[list[Event]]]:
        """Follow the keys with a prefix, from a revision on; that is confirmed on entry.

        Reading has no deadline: nothing may change for days. Raises Compacted when the events from
        that revision on are no longer kept.
        """
        session = await self._open()
        create = self._rpc.WatchCreateRequest(
            key=prefix.encode(), range_end=_after(prefix), start_revision=revision
        )
        stream = self._rpc.WatchStub(session.channel).Watch(metadata=session.token)
        try:
            async with self._mapped(session):
                try:
                    async with asyncio.timeout(self.call_timeout_s):
                        await stream.write(self._rpc.WatchRequest(create_request=create))
                        self._check_watch(session, await stream.read())
                except TimeoutError:
                    why = f"no answer within {self.call_timeout_s:g} s"
                    raise EtcdAway(session.endpoint, why) from None
            yield self._events(session, stream)
        finally:
            stream.cancel()

    async def _events(self, session: _Session, stream: Any) -> AsyncIterator[list[Event]]:
        while True:
            async with self._mapped(session):
                answer = self._check_watch(session, await stream.read())
            yield [
                Event(
                    one.kv.key.decode(errors="replace"),
                    None if one.type == self._rpc.Event.DELETE else one.kv.value,
                    one.kv.mod_revision,
                )
                for one in answer.events
            ]

    def _check_watch(self, session: _Session, answer: Any) -> Any:
        if answer is self._grpc.aio.EOF:
            raise EtcdAway(session.endpoint, "it ended the watch")
        if answer.compact_revision:
            raise Compacted(f"events before revision {answer.compact_revision} are gone")
        if answer.canceled:
            if "permission denied" in answer.cancel_reason:
                raise etcd_errors.refused_permission(self._user)
            raise EtcdAway(session.endpoint, f"it ended the watch: {answer.cancel_reason}")
        return answer

    # Members

    async def close(self) -> None:
        self._closed = True
        if self._session is not None:
            await self._leave(self._session)

    async def _call(self, service: str, method: str, request: Any) -> Any:
        async def send(session: _Session) -> Any:
            stub = getattr(self._rpc, f"{service}Stub")(session.channel)
            call = getattr(stub, method)
            return await call(request, timeout=self.call_timeout_s, metadata=session.token)

        return await self._attempt(send)

    async def _attempt(self, send: Callable[[_Session], Awaitable[Any]]) -> Any:
        session = await self._open()
        try:
            async with self._mapped(session):
                return await send(session)
        except TokenExpired:
            session.token = None
            await self._log_in(session)
            async with self._mapped(session):
                return await send(session)

    async def _open(self) -> _Session:
        """Return the session in use, or one with the member whose turn it is."""
        if self._closed:
            raise EtcdAway(self.where, "this process has closed its connection")
        session = self._session
        if session is None:
            endpoint = self._endpoints[self._turn % len(self._endpoints)]
            aio = self._grpc.aio
            channel = (
                aio.insecure_channel(endpoint, options=_CHANNEL_OPTIONS)
                if self._credentials is None
                else aio.secure_channel(endpoint, self._credentials, options=_CHANNEL_OPTIONS)
            )
            session = self._session = _Session(endpoint, channel)
        await self._log_in(session)
        return session

    async def _log_in(self, session: _Session) -> None:
        if self._user is None or session.token is not None:
            return
        async with session.logged_in:
            if session.token is not None:  # another call was first
                return
            request = self._rpc.AuthenticateRequest(name=self._user, password=self._password)
            stub = self._rpc.AuthStub(session.channel)
            async with self._mapped(session):
                try:
                    answer = await stub.Authenticate(request, timeout=self.call_timeout_s)
                except self._grpc.aio.AioRpcError as error:
                    if etcd_errors.NOT_ENABLED not in str(error.details()):
                        raise
                    session.token = ()  # etcd asks nobody who they are
                else:
                    session.token = (("token", answer.token),)

    @contextlib.asynccontextmanager
    async def _mapped(self, session: _Session) -> AsyncIterator[None]:
        """Turn what gRPC raises into our errors; leave a member that does not answer."""
        aio = self._grpc.aio
        try:
            yield
            session.answered = True
        except aio.AioRpcError as error:
            problem = etcd_errors.explain(
                session.endpoint,
                error,
                user=self._user,
                timeout_s=self.call_timeout_s,
                answered=session.answered,
            )
            if isinstance(problem, EtcdAway):
                await self._leave(session)
            raise problem from error
        except EtcdAway:
            await self._leave(session)
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled this task: another call has closed the channel, and its calls with it.
            raise EtcdAway(session.endpoint, "the connection was given up") from None
        except (aio.UsageError, aio.InternalError, asyncio.InvalidStateError) as error:
            await self._leave(session)
            raise EtcdAway(session.endpoint, "the connection was given up") from error

    async def _leave(self, session: _Session) -> None:
        """Close a member's channel; the next call goes to the next member."""
        if self._session is session:
            self._session = None
            self._turn += 1
        await session.channel.close()


def _after(prefix: str) -> bytes:
    """Return the key that follows all keys with a prefix; ours end in '/', never in 0xff."""
    raw = prefix.encode()
    return raw[:-1] + bytes([raw[-1] + 1])
