"""Discovery on etcd: records are keys under leases, watchers list and follow. Knows no folder.

A key's value is what a file of discovery in a folder holds (``record_codec.py``), so that
``etcdctl get --prefix /trtllm-launch/`` shows who is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from trtllm_workers.config.outside import EtcdLogin, EtcdUrl
from trtllm_workers.errors import ConfigError
from trtllm_workers.planes.etcd_client import EtcdClient, Event
from trtllm_workers.planes.etcd_errors import Compacted, EtcdError
from trtllm_workers.planes.etcd_lease import BEATS_PER_TTL, EtcdLease, Trouble, retry_pause_s
from trtllm_workers.planes.etcd_view import EtcdView
from trtllm_workers.planes.record_keys import workers_prefix
from trtllm_workers.types import WorkerRecord

_CLOSE_TIMEOUT_S = 2.0


class EtcdDiscovery:
    """Implements Discovery (base.py holds its guarantees) with one key per life of a worker.

    * The owner renews its lease every quarter of ``ttl_s``; etcd removes the key ``ttl_s`` after
      the last renewal, half a second later at most (``ttl_s`` is rounded up to whole seconds, and
      etcd grants no less than one and a half times its election timeout).
    * Trouble with etcd ends nobody: owners register again by themselves when it is back, under a
      new lease; watchers keep the last set while it is away, and for one more ``ttl_s`` what then
      seems to be missing (``etcd_view.py`` says why). One warning when it begins, one line when it
      is over.
    * A member that does not answer within a quarter of ``ttl_s``, or has no majority behind it, is
      left for the next one.
    * Only the first contact may fail: ``register`` and the first ``watch`` raise ConfigError after
      ``connect_timeout_s``, at once when etcd refuses user or password.
    """

    def __init__(
        self,
        url: EtcdUrl,
        namespace: str = "default",
        login: EtcdLogin = EtcdLogin(),  # noqa: B008 - frozen
        ttl_s: float = 10.0,
        connect_timeout_s: float = 10.0,
    ) -> None:
        self._client = EtcdClient(url, login, call_timeout_s=ttl_s / BEATS_PER_TTL)
        self._namespace = namespace
        self._prefix = workers_prefix(namespace)
        self._ttl_s = ttl_s
        self._connect_timeout_s = connect_timeout_s
        self._trouble = Trouble(self._client.where)
        self._leases: set[EtcdLease] = set()
        self._view = EtcdView(self._prefix, ttl_s)
        self._follow_task: asyncio.Task[None] | None = None
        self._records: tuple[WorkerRecord, ...] = ()
        self._version = 0
        self._changed = asyncio.Event()
        self._closed = False

    async def register(self, record: WorkerRecord) -> EtcdLease:
        """Write the record and keep it alive. Raises ConfigError when etcd was never reached."""
        if self._closed:
            raise ConfigError(
                f"discovery at etcd {self._client.where} is closed; {record.worker_id} comes late"
            )
        lease = EtcdLease(self._client, self._namespace, self._ttl_s, record, self._trouble)
        await lease.start(self._connect_timeout_s)
        self._leases.add(lease)
        return lease

    async def watch(self) -> AsyncIterator[tuple[WorkerRecord, ...]]:
        """Yield the live records. Raises ConfigError when etcd was never reached."""
        task = self._follow_task
        if (task is None or task.done()) and not self._closed:
            task = asyncio.create_task(self._follow(), name=f"follow {self._prefix}")
            task.add_done_callback(self._follow_ended)
            self._follow_task = task
        seen_version = 0
        while not self._closed:
            changed = self._changed
            if self._version != seen_version:
                seen_version = self._version
                yield self._records
            elif task is not None and task.done():
                task.result()  # raises why
            else:
                # No deadline: nothing may change for days. close() ends it.
                await changed.wait()

    async def close(self) -> None:
        self._closed = True
        self._tell_watchers()
        if self._follow_task is not None:
            self._follow_task.cancel()
            await asyncio.wait({self._follow_task}, timeout=_CLOSE_TIMEOUT_S)
        await asyncio.gather(*(lease.close() for lease in self._leases))
        await self._client.close()

    async def _follow(self) -> None:
        await self._client.insist(self._list, self._connect_timeout_s)
        while True:
            try:
                await self._follow_one_stream()
            except EtcdError as error:
                self._view.lost_sight()
                self._trouble.begins(self, error)
            await asyncio.sleep(retry_pause_s(self._ttl_s))

    def _follow_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # watch() raises it to whoever waits
        self._tell_watchers()

    async def _list(self) -> tuple[int, int]:
        """Read the whole set; return from which revision to follow, and from which if that is gone."""
        keys, revision = await self._client.read_all(self._prefix)
        wanted = self._view.listed(keys, revision, _now_s())
        self._publish()
        return wanted, revision + 1

    async def _follow_one_stream(self) -> None:
        """List and follow until something goes wrong."""
        wanted, listed = await self._list()
        self._trouble.is_over(self)
        try:
            await self._follow_from(wanted)
        except Compacted:
            await self._follow_from(listed)

    async def _follow_from(self, revision: int) -> None:
        async with self._client.watch(self._prefix, revision) as batches:
            await _until_one_fails(self._read(batches), self._look_after())

    async def _read(self, batches: AsyncIterator[list[Event]]) -> None:
        async for events in batches:
            for event in events:
                self._view.happened(event, _now_s())
            self._publish()

    async def _look_after(self) -> None:
        """Ask etcd for a sign of life, and let go of records that stay missing.

        A stream alone does not show that etcd stands still, or has lost its majority.
        """
        loop = asyncio.get_running_loop()
        interval_s = self._ttl_s / BEATS_PER_TTL
        probe_s = loop.time() + interval_s
        while True:
            due_s = min(probe_s, self._view.next_expiry_s() or probe_s)
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            self._view.expire(_now_s())
            self._publish()
            if loop.time() >= probe_s:
                await self._client.has(self._prefix)
                probe_s = loop.time() + interval_s

    def _publish(self) -> None:
        records = self._view.records()
        if self._version == 0 or records != self._records:
            self._records = records
            self._version += 1
            self._tell_watchers()

    def _tell_watchers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def _until_one_fails(*works: Coroutine[Any, Any, None]) -> None:
    """Run until the first one raises, end the others and raise that. Not a group: one error."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        failed = [task for task in tasks if task.done()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    failed[0].result()


def _now_s() -> float:
    return asyncio.get_running_loop().time()  # monotonic: clocks that are set do not matter
