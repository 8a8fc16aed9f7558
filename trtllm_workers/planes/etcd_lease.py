"""One registration on etcd: a key under a lease, kept alive and written again when it is lost."""

from __future__ import annotations

import asyncio
import math
import random
import socket

import structlog

from trtllm_workers.errors import ConfigError
from trtllm_workers.planes import record_codec
from trtllm_workers.planes.etcd_client import EtcdClient
from trtllm_workers.planes.etcd_errors import EtcdError, LeaseGone
from trtllm_workers.planes.etcd_view import CLOSED
from trtllm_workers.planes.record_codec import Unreadable
from trtllm_workers.planes.record_files import this_process
from trtllm_workers.planes.record_keys import lives_prefix, record_key, secret_key, workers_prefix
from trtllm_workers.types import WorkerRecord

_CLOSE_TIMEOUT_S = 2.0
BEATS_PER_TTL = 4  # the third lost beat in a row still leaves time to register again
_TRIES_PER_BEAT = 4

log = structlog.get_logger(__name__)


class Trouble:
    """Says once that etcd cannot be used, and once that it can again, whoever of us notices."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._failing: set[object] = set()

    def begins(self, part: object, why: EtcdError) -> None:
        if not self._failing:
            log.warning(
                "etcd cannot be used, trying again; what was known stays",
                etcd=self._where,
                reason=str(why),
            )
        self._failing.add(part)

    def is_over(self, part: object) -> None:
        if part in self._failing:
            self._failing.remove(part)
            if not self._failing:
                log.info("etcd works again", etcd=self._where)

    def forget(self, part: object) -> None:
        """Take out a part that has ended."""
        self._failing.discard(part)


def retry_pause_s(ttl_s: float) -> float:
    """Return how long to wait before another attempt: many processes, not all in one moment."""
    return ttl_s / BEATS_PER_TTL / _TRIES_PER_BEAT * random.uniform(0.5, 1.5)


class EtcdLease:
    """Implements Lease: a key, an etcd lease it vanishes with, and a task that keeps both.

    * Trouble with etcd never ends it: it registers again under a new lease as soon as etcd answers.
      With the record it writes the cluster secret again, if etcd kept it: whoever starts after etcd
      has lost its data would make another one and could not join.
    * ``update`` while etcd is away returns; the record is written when etcd is back.
    """

    def __init__(
        self,
        client: EtcdClient,
        namespace: str,
        ttl_s: float,
        record: WorkerRecord,
        trouble: Trouble,
    ) -> None:
        self._client = client
        self._prefix = prefix = workers_prefix(namespace)
        self._secret_key = secret_key(namespace)
        self._secret: bytes | None = None
        self._ttl_s = ttl_s
        self._record = record
        self._key = record_key(prefix, record.worker_id, record.address.incarnation)
        self._owner = this_process(socket.gethostname())
        self._trouble = trouble
        self._lease = 0
        self._is_written = False
        # One call of this lease at a time: a heartbeat must not write over an update.
        self._turn = asyncio.Lock()
        self._closed = False
        self._task: asyncio.Task[None] | None = None

    async def start(self, timeout_s: float) -> None:
        """Register. Raises ConfigError when that was not possible within ``timeout_s``."""
        try:
            await self._client.insist(self._begin, timeout_s)
        except BaseException:
            self._closed = True
            raise
        self._task = asyncio.create_task(self._beat_on(), name=f"lease {self._record.worker_id}")

    async def update(self, record: WorkerRecord) -> None:
        """Replace the record. Raises ConfigError: a younger life took over, or the lease is closed."""
        mine, other = self._record, record
        if (mine.worker_id, mine.address.incarnation) != (
            other.worker_id,
            other.address.incarnation,
        ):
            raise ConfigError(
                f"the lease of {mine.worker_id} ({mine.address.incarnation}) cannot take the record of "
                f"{other.worker_id} ({other.address.incarnation}); register that one"
            )
        async with self._turn:
            if self._closed:
                raise ConfigError(f"the lease of {record.worker_id} is closed")
            try:
                await self._refuse_if_older()
                self._record, self._is_written = record, False
                await self._write()
            except EtcdError as error:
                self._record, self._is_written = record, False
                self._trouble.begins(self, error)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=_CLOSE_TIMEOUT_S)
        self._trouble.forget(self)
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S), self._turn:
                await self._remove()
        except (EtcdError, TimeoutError) as error:
            log.warning(
                "worker record not removed; it vanishes with its lease",
                key=self._key,
                within_s=self._ttl_s,
                reason=str(error) or "etcd does not answer",
            )

    async def _beat_on(self) -> None:
        failing = False
        while True:
            pause_s = retry_pause_s(self._ttl_s) if failing else self._ttl_s / BEATS_PER_TTL
            await asyncio.sleep(pause_s)
            try:
                async with self._turn:
                    await self._beat()
            except EtcdError as error:
                self._trouble.begins(self, error)
                failing = True
            else:
                self._trouble.is_over(self)
                failing = False

    async def _beat(self) -> None:
        if self._lease and not await self._client.keep_alive(self._lease):
            self._lease = 0
        # The key can be gone alone: somebody deleted it.
        if self._lease and self._is_written and await self._client.has(self._key):
            return
        await self._write()
        if self._secret is not None:
            await self._client.put_if_absent(self._secret_key, self._secret)
        log.info("registered again", worker_id=self._record.worker_id)

    async def _begin(self) -> None:
        await self._write()
        self._secret = await self._client.get(self._secret_key)

    async def _write(self) -> None:
        if not self._lease:
            self._is_written = False
            self._lease = await self._client.grant(math.ceil(self._ttl_s))
        try:
            await self._client.put(
                self._key, record_codec.encode(self._record, self._owner), self._lease
            )
        except LeaseGone:
            self._lease = 0
            raise
        self._is_written = True

    async def _refuse_if_older(self) -> None:
        mine = self._record.address.incarnation
        keys, _ = await self._client.read_all(lives_prefix(self._prefix, self._record.worker_id))
        for kept in keys:
            try:
                record = record_codec.decode(kept.value).record
            except Unreadable:
                continue
            if record.address.incarnation > mine:
                raise ConfigError(
                    f"worker {record.worker_id} lives on as incarnation {record.address.incarnation} "
                    f"at {record.address}; this older one ({mine}) must end"
                )

    async def _remove(self) -> None:
        if self._lease:
            try:
                # Watchers believe this at once; a key that only vanishes may be etcd's own trouble.
                await self._client.put(self._key, CLOSED, self._lease)
                await self._client.revoke(self._lease)
            except LeaseGone:
                return  # and the key with it
