"""A work queue on NATS JetStream: one stream per queue, one durable consumer for all takers.

Knows no prefill. What NATS guarantees and we rely on: a message of a WORK_QUEUE stream is kept until
it is acknowledged or too old, delivered to one taker at a time, and again after the ack wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

import structlog

from trtllm_workers.config.outside import NatsLogin
from trtllm_workers.errors import ConfigError, QueueAway, QueueFull
from trtllm_workers.planes.queue import ACK_WAIT_S, Item

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js.client import JetStreamContext

log = structlog.get_logger(__name__)

CONNECT_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 2  # nats-py asks for whole seconds in places
# A server that is gone is tried again so often; a silent one is noticed after two pings.
_RECONNECT_S = 0.5
_PING_INTERVAL_S = 5
_CONSUMER = "takers"
_SUBJECT = "work"
_LONGEST_NAME = 200  # it becomes a folder's name
_TOO_MANY_MESSAGES = 10077
_MAX_ACK_PENDING = 100_000
# What nats-py says of an identity that the server does not take.
_NOT_LET_IN = ("authorization", "authentication", "permissions violation")


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """What a queue is like. ``max_items`` 0: no limit.

    ``file``: items outlive a restart of the server. Whoever puts decides; takers leave a queue as it is.
    """

    name: str
    max_items: int = 0
    max_age_s: float = 3600.0
    ack_wait_s: float = ACK_WAIT_S
    storage: Literal["file", "memory"] = "file"


def queue_name(*parts: str) -> str:
    """Return a stream's name for a queue known by these words; different words give different names.

    NATS forbids some characters in names, so all but letters and digits are written as numbers.
    """
    words = [
        "".join(c if c.isascii() and c.isalnum() else f"_{ord(c):x}_" for c in p) for p in parts
    ]
    name = "-".join(words)
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{blake2b(name.encode(), digest_size=16).hexdigest()}"
    return name


class NatsQueue:
    """Implements WorkQueue. Made by ``open_nats_queue``."""

    def __init__(self, client: Client, spec: QueueSpec) -> None:
        self._client = client
        self._js: JetStreamContext = client.jetstream(timeout=_ANSWER_TIMEOUT_S)
        self._spec = spec
        self._subject = f"{spec.name}.{_SUBJECT}"
        self._taking: JetStreamContext.PullSubscription | None = None
        self._stopped = False
        self._closed = False

    @property
    def connected(self) -> bool:
        return not self._closed and self._client.is_connected

    async def put(self, body: bytes) -> int:
        from nats.errors import Error
        from nats.js.errors import APIError, NoStreamResponseError

        self._require_connection("put work into")
        try:
            try:
                kept = await self._js.publish(self._subject, body, timeout=_ANSWER_TIMEOUT_S)
            except NoStreamResponseError:  # the server came back without what it had
                await self.set_up(decides=True)
                kept = await self._js.publish(self._subject, body, timeout=_ANSWER_TIMEOUT_S)
        except APIError as error:
            if error.err_code == _TOO_MANY_MESSAGES:
                text = f"work queue {self._spec.name} holds {self._spec.max_items} items already"
                raise QueueFull(text) from error
            raise self._away("put work into", error) from error
        except (Error, OSError, TimeoutError) as error:
            raise self._away("put work into", error) from error
        return kept.seq

    async def remove(self, handle: int) -> None:
        from nats.errors import Error

        if self.connected:
            with contextlib.suppress(Error, OSError, TimeoutError):
                await self._js.delete_msg(self._spec.name, handle)

    async def depth(self) -> int:
        from nats.errors import Error

        self._require_connection("look at")
        try:
            info = await self._js.stream_info(self._spec.name)
        except (Error, OSError, TimeoutError) as error:
            raise self._away("look at", error) from error
        return info.state.messages

    async def take(self, timeout_s: float) -> Item | None:
        from nats.errors import Error

        if self._stopped or not self.connected:
            await self._pause(timeout_s)
            return None
        try:
            if self._taking is None:
                self._taking = await self._js.pull_subscribe_bind(
                    stream=self._spec.name, consumer=_CONSUMER
                )
            found = await self._taking.fetch(1, timeout=timeout_s)
        except TimeoutError:
            return None
        except (Error, OSError) as error:
            if not self._stopped and self.connected:
                log.warning("cannot take work now", queue=self._spec.name, reason=_words(error))
                await self._renew()
                await self._pause(timeout_s)
            return None
        return _NatsItem(found[0])

    async def stop_taking(self) -> None:
        from nats.errors import Error

        self._stopped = True
        taking, self._taking = self._taking, None
        if taking is None or not self.connected:
            return
        subscription = taking._sub
        with contextlib.suppress(Error, OSError, TimeoutError):
            # The server forgets what we asked for. What it has sent by then arrives before its answer, and
            # still finds our end: nats-py's own unsubscribe would drop it.
            await self._client._send_unsubscribe(subscription._id)
            await self._client.flush(timeout=_ANSWER_TIMEOUT_S)
        # nats-py has no way to get what fetch did not wait for
        pending = subscription._pending_queue
        while not pending.empty():
            message = pending.get_nowait()
            if message.reply:
                await _NatsItem(message).nak()
        with contextlib.suppress(Error, OSError):
            await taking.unsubscribe()

    async def close(self) -> None:
        if self._closed:
            return
        await self.stop_taking()
        self._closed = True
        from nats.errors import Error

        with contextlib.suppress(Error, OSError, TimeoutError):
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                if self._client.is_connected:
                    await self._client.flush(timeout=_ANSWER_TIMEOUT_S)
        with contextlib.suppress(Error, OSError, TimeoutError):
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                await self._client.close()

    async def set_up(self, *, decides: bool) -> None:
        """Make stream and consumer, or take those that are there. Raises ConfigError."""
        from nats.js import api
        from nats.js.errors import BadRequestError

        spec = self._spec
        wanted = api.StreamConfig(
            name=spec.name,
            subjects=[self._subject],
            retention=api.RetentionPolicy.WORK_QUEUE,
            storage=api.StorageType(spec.storage),
            discard=api.DiscardPolicy.NEW,
            max_msgs=spec.max_items or -1,
            max_age=spec.max_age_s,
        )
        try:
            info = await self._js.add_stream(wanted)
        except BadRequestError:  # it is there, and differs
            info = await self._js.stream_info(spec.name)
            if decides:
                # How it is kept cannot be changed, and what it holds is worth more than that.
                wanted.storage = info.config.storage
                info = await self._js.update_stream(wanted)
        if info.config.retention != api.RetentionPolicy.WORK_QUEUE:
            raise ConfigError(
                f"NATS has a stream '{spec.name}' that is no work queue; another program made it; "
                "choose another --namespace",
                param="namespace",
            )
        consumer = api.ConsumerConfig(
            durable_name=_CONSUMER,
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=spec.ack_wait_s,
            max_deliver=-1,
            max_ack_pending=_MAX_ACK_PENDING,
        )
        with contextlib.suppress(BadRequestError):  # it is there, and differs: nothing that matters
            await self._js.add_consumer(spec.name, consumer)

    async def _renew(self) -> None:
        """Begin to take anew, with stream and consumer made again if a server lost them."""
        from nats.errors import Error

        taking, self._taking = self._taking, None
        with contextlib.suppress(Error, OSError, TimeoutError, ConfigError):
            if taking is not None:
                await taking.unsubscribe()
            await self.set_up(decides=False)

    async def _pause(self, timeout_s: float) -> None:
        """Let a server that is away come back; there is no event for it."""
        await asyncio.sleep(min(timeout_s, _RECONNECT_S))

    def _require_connection(self, what: str) -> None:
        if not self.connected:
            raise QueueAway(f"cannot {what} queue {self._spec.name}: NATS is not connected")

    def _away(self, what: str, error: Exception) -> QueueAway:
        return QueueAway(f"cannot {what} queue {self._spec.name}: {_words(error)}")


class _NatsItem:
    """Implements Item."""

    def __init__(self, message: Msg) -> None:
        self._message = message

    @property
    def body(self) -> bytes:
        return self._message.data

    @property
    def num_deliveries(self) -> int:
        return self._message.metadata.num_delivered or 1

    async def ack(self) -> None:
        await self._say(b"+ACK")

    async def nak(self, delay_s: float = 0.0) -> None:
        await self._say(b'-NAK {"delay": %d}' % int(delay_s * 1e9) if delay_s > 0 else b"-NAK")

    async def working(self) -> None:
        await self._say(b"+WPI")

    async def _say(self, word: bytes) -> None:
        from nats.errors import Error

        # Not through Msg.ack: that allows one word per message object, and a nak may follow an ack
        # that was lost together with the server.
        client = self._message._client
        if client.is_connected:
            with contextlib.suppress(Error, OSError):
                await client.publish(self._message.reply, word)


async def open_nats_queue(
    servers: Sequence[str],
    login: NatsLogin,
    spec: QueueSpec,
    *,
    name: str,
    decides: bool,
    timeout_s: float = CONNECT_TIMEOUT_S,
) -> NatsQueue:
    """Connect, and make the queue where it is not there yet.

    ``name`` shows in NATS's own monitoring. ``decides``: see ``QueueSpec``. Raises ConfigError: package
    missing, nobody there within ``timeout_s``, not let in, or a server without JetStream.
    """
    try:
        from nats.aio.client import Client
    except ImportError as error:
        raise ConfigError(
            "the prefill queue needs the Python package 'nats-py'; run: pip install "
            "'trtllm-launch[nats]'",
            param="prefill_dispatch",
        ) from error
    where = ", ".join(_without_login(one) for one in servers)
    client = Client()
    connecting = asyncio.ensure_future(_connect(client, servers, login, name))
    try:
        async with asyncio.timeout(timeout_s):
            await connecting
    except TimeoutError as error:
        last = _words(client.last_error) if client.last_error else "no answer"
        raise ConfigError(
            f"no NATS server at {where} after {timeout_s:g} s: {last}; start one, or correct "
            "--nats-server (NATS_SERVER)",
            param="nats_server",
        ) from error
    except _NotLetIn as error:
        await _end(client)
        raise ConfigError(
            f"NATS at {where} does not let us in: {error}; give --nats-user and NATS_PASSWORD, or "
            "NATS_TOKEN, or --nats-cert and --nats-key",
            param="nats_user",
        ) from error
    except (OSError, ssl.SSLError, ValueError) as error:
        await _end(client)
        raise ConfigError(f"NATS at {where}: {_words(error)}", param="nats_server") from error
    queue = NatsQueue(client, spec)
    try:
        await _set_up(queue, where, decides=decides)
    except BaseException:
        await queue.close()
        raise
    return queue


class _NotLetIn(Exception):
    """The server has told that it does not take our identity."""


async def _connect(client: Client, servers: Sequence[str], login: NatsLogin, name: str) -> None:
    refused: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    opened = False

    async def on_error(error: Exception) -> None:
        words = _words(error)
        if not opened and not refused.done() and any(one in words.lower() for one in _NOT_LET_IN):
            refused.set_exception(_NotLetIn(words))
        elif opened:
            log.info("NATS", trouble=words)

    async def on_lost() -> None:
        if opened and not client.is_closed:
            log.warning("NATS is away; it is tried again", every_s=_RECONNECT_S)

    async def on_back() -> None:
        log.info("NATS is back", host=client.connected_url.hostname if client.connected_url else "")

    options: dict[str, Any] = {}
    if login.tls or any(one.startswith("tls://") for one in servers):
        options["tls"] = _tls(login)
    if login.token is not None:
        options["token"] = login.token
    if login.user is not None:
        options |= {"user": login.user, "password": login.password or ""}
    trying = asyncio.ensure_future(
        client.connect(
            servers=list(servers),
            name=name,
            error_cb=on_error,
            disconnected_cb=on_lost,
            reconnected_cb=on_back,
            connect_timeout=2,
            reconnect_time_wait=_RECONNECT_S,  # type: ignore[arg-type]  # any number will do
            max_reconnect_attempts=-1,
            ping_interval=_PING_INTERVAL_S,
            **options,
        )
    )
    try:
        await asyncio.wait({trying, refused}, return_when=asyncio.FIRST_COMPLETED)
        if refused.done():
            refused.result()
        await trying
        opened = True
    finally:
        refused.cancel()
        if not trying.done():
            trying.cancel()
            await asyncio.gather(trying, return_exceptions=True)
            await _end(client)


def _tls(login: NatsLogin) -> ssl.SSLContext:
    files = login.tls
    context = ssl.create_default_context(cafile=str(files.ca) if files.ca else None)
    if files.cert is not None:
        context.load_cert_chain(str(files.cert), str(files.key) if files.key else None)
    return context


async def _set_up(queue: NatsQueue, where: str, *, decides: bool) -> None:
    from nats.errors import Error
    from nats.js.errors import ServiceUnavailableError

    try:
        await queue.set_up(decides=decides)
    except (ServiceUnavailableError, TimeoutError) as error:
        raise ConfigError(
            f"NATS at {where} has no JetStream, or none for this account; start it with -js",
            param="nats_server",
        ) from error
    except (Error, OSError) as error:
        raise ConfigError(
            f"NATS at {where} does not make a work queue: {_words(error)}", param="nats_server"
        ) from error


async def _end(client: Client) -> None:
    with contextlib.suppress(Exception):  # half-open; whatever it says now is of no use
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            await client.close()


def _words(error: BaseException) -> str:
    return str(error).removeprefix("nats: ").strip("'\" ") or type(error).__name__


def _without_login(url: str) -> str:
    scheme, slashes, place = url.rpartition("://")
    return f"{scheme}{slashes}{place.rpartition('@')[2]}"
