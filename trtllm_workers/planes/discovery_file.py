"""Discovery in a folder: on one host, or on a file system that several share. Knows no socket.

Files lie in ``<root>/workers`` (what they hold: ``record_files.py``). All disk work is done in
threads, so that a file system that hangs stops neither the event loop nor the end of the process.
While the folder cannot be read, watchers keep the last set they saw.

On NFS give hosts a ttl of 15 s or more where directory entries are cached (``acdirmin``).
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final, TypeVar

import structlog

from trtllm_workers.errors import ConfigError
from trtllm_workers.planes import record_files
from trtllm_workers.planes.record_files import RecordFolder
from trtllm_workers.types import WorkerRecord

WORKERS_FOLDER: Final = "workers"
_ANSWER_TIMEOUT_S = 10.0  # register and update: longer means that the file system hangs
_CLOSE_TIMEOUT_S = 2.0
_BEATS_PER_TTL = 3

log = structlog.get_logger(__name__)
T = TypeVar("T")


class FileDiscovery:
    """Implements Discovery (base.py holds its guarantees) with one file per life of a worker.

    * The owner touches its file every third of ``ttl_s``; watchers look every ``poll_interval_s``
      and judge by their own monotonic clock, so hosts' clocks may differ.
    * Death of a process of the same host is seen at the next look; that of another host, or a
      process that stands still, after ``ttl_s``.
    * A new watcher believes a record of another host for one ``ttl_s`` before its first heartbeat.
    """

    def __init__(self, root: Path, ttl_s: float = 5.0, poll_interval_s: float = 0.25) -> None:
        if not 0 < poll_interval_s < ttl_s / 2:
            raise ConfigError(
                f"poll interval ({poll_interval_s:g} s) must be above 0 and below half the time to "
                f"live of a record ({ttl_s:g} s)"
            )
        self._folder = root / WORKERS_FOLDER
        self._ttl_s = ttl_s
        self._poll_interval_s = poll_interval_s
        self._leases: set[_FileLease] = set()
        self._view = RecordFolder(self._folder, ttl_s)
        self._poll_task: asyncio.Task[None] | None = None
        self._records: tuple[WorkerRecord, ...] = ()
        self._version = 0
        self._failure: str | None = None
        self._changed = asyncio.Event()
        self._closed = False

    async def register(self, record: WorkerRecord) -> _FileLease:
        """Write the record and keep it alive. Raises ConfigError when it cannot be written."""
        if self._closed:
            raise ConfigError(
                f"discovery in {self._folder} is closed; {record.worker_id} comes late"
            )
        lease = _FileLease(self._folder, self._ttl_s, record)
        await lease.start()
        self._leases.add(lease)
        return lease

    async def watch(self) -> AsyncIterator[tuple[WorkerRecord, ...]]:
        """Yield the live records. Raises ConfigError when the folder cannot be read at first."""
        if self._poll_task is None and not self._closed:
            self._poll_task = asyncio.create_task(self._poll(), name=f"poll {self._folder}")
        seen_version = 0
        while not self._closed:
            changed = self._changed
            if self._version != seen_version:
                seen_version = self._version
                yield self._records
            elif self._version == 0 and self._failure is not None:
                raise ConfigError(
                    f"cannot read the discovery folder {self._folder}: {self._failure}"
                )
            else:
                # No deadline: nothing may change for days. close() ends it.
                await changed.wait()

    async def close(self) -> None:
        self._closed = True
        self._tell_watchers()
        await _cancel(self._poll_task)
        await asyncio.gather(*(lease.close() for lease in self._leases))

    async def _poll(self) -> None:
        while True:
            try:
                records = await _patiently(self._view.look, self._ttl_s, self._folder)
            except (OSError, RuntimeError) as error:  # RuntimeError: no thread to be had
                if self._failure is None:
                    log.warning(
                        "discovery folder cannot be read",
                        folder=str(self._folder),
                        reason=str(error),
                    )
                self._failure = str(error)
                if self._version == 0:
                    self._tell_watchers()
            else:
                self._failure = None
                if self._version == 0 or records != self._records:
                    self._records = records
                    self._version += 1
                    self._tell_watchers()
            await asyncio.sleep(self._poll_interval_s)

    def _tell_watchers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class _FileLease:
    """Implements Lease: a file, and a task that touches it."""

    def __init__(self, folder: Path, ttl_s: float, record: WorkerRecord) -> None:
        self._folder = folder
        self._ttl_s = ttl_s
        self._record = record
        self._path = folder / record_files.file_name(record.worker_id, record.address.incarnation)
        self._owner = record_files.this_process(socket.gethostname())
        self._lives = RecordFolder(folder, ttl_s, record.worker_id)
        # Held by threads: one that hangs in a write must not bring the file back after close().
        self._disk = threading.Lock()
        self._closed = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        try:
            await self._write(self._record, check=False)
        except BaseException:
            self._closed = True
            raise
        self._task = asyncio.create_task(self._beat_on(), name=f"lease {self._record.worker_id}")

    async def update(self, record: WorkerRecord) -> None:
        """Replace the record. Raises ConfigError: a younger life took over, or it cannot be written."""
        mine, other = self._record, record
        if (mine.worker_id, mine.address.incarnation) != (
            other.worker_id,
            other.address.incarnation,
        ):
            raise ConfigError(
                f"the lease of {mine.worker_id} ({mine.address.incarnation}) cannot take the record of "
                f"{other.worker_id} ({other.address.incarnation}); register that one"
            )
        await self._write(record, check=True)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await _cancel(self._task)
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await _in_thread(self._remove)
        except (OSError, RuntimeError) as error:  # TimeoutError is an OSError
            log.warning(
                "worker record not removed; it vanishes with its heartbeat",
                file=str(self._path),
                reason=str(error) or "the file system does not answer",
            )

    async def _write(self, record: WorkerRecord, *, check: bool) -> None:
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                await _in_thread(lambda: self._write_now(record, check=check))
        except (OSError, RuntimeError) as error:  # TimeoutError is an OSError
            reason = str(error) or f"no answer within {_ANSWER_TIMEOUT_S:g} s"
            raise ConfigError(
                f"cannot write the record of {record.worker_id} into the discovery folder: {reason}; "
                "choose a folder that can be written"
            ) from error

    async def _beat_on(self) -> None:
        failing = False
        while True:
            await asyncio.sleep(self._ttl_s / _BEATS_PER_TTL)
            try:
                await _patiently(self._beat_now, self._ttl_s, self._folder)
            except (OSError, RuntimeError) as error:
                if not failing:
                    log.warning(
                        "heartbeat failed, trying again", file=str(self._path), reason=str(error)
                    )
                failing = True
            else:
                if failing:
                    log.info("heartbeat works again", file=str(self._path))
                failing = False

    # In threads

    def _write_now(self, record: WorkerRecord, *, check: bool) -> None:
        with self._disk:
            if self._closed:
                raise ConfigError(f"the lease of {record.worker_id} is closed")
            if check:
                self._refuse_if_older()
            record_files.write(self._folder, record, self._owner)
            self._record = record

    def _refuse_if_older(self) -> None:
        mine = self._record.address.incarnation
        for record in self._lives.look():
            if record.address.incarnation > mine:
                raise ConfigError(
                    f"worker {record.worker_id} lives on as incarnation {record.address.incarnation} "
                    f"at {record.address}; this older one ({mine}) must end"
                )

    def _beat_now(self) -> None:
        with self._disk:
            if self._closed:
                return
            # Looking at every beat is how this lease knows which other lives' hearts still beat.
            self._lives.look()
            try:
                record_files.touch(self._path)
            except FileNotFoundError:  # taken for dead while this process stood still
                record_files.write(self._folder, self._record, self._owner)

    def _remove(self) -> None:
        with self._disk:
            self._path.unlink(missing_ok=True)


async def _cancel(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.wait({task}, timeout=_CLOSE_TIMEOUT_S)


async def _patiently(call: Callable[[], T], expected_s: float, folder: Path) -> T:
    """Run a call in a thread and wait as long as it takes, saying so when it takes long.

    Without a deadline on purpose: a thread inside a hung file system cannot be ended, and a second
    one beside it would hang as well. Cancelling leaves it behind; it is a daemon.
    """
    future = _in_thread(call)
    done, _ = await asyncio.wait({future}, timeout=expected_s)
    if not done:
        log.warning("discovery folder does not answer", folder=str(folder), waited_s=expected_s)
    return await future


def _in_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """Run a call in a daemon thread: the default executor's threads would hold up the exit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    # Whoever waited may have been cancelled; an error nobody waits for is no news.
    future.add_done_callback(lambda done: done.cancelled() or done.exception())

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # None only where T is None

    def run() -> None:
        result, error = None, None
        try:
            result = call()
        except BaseException as caught:  # noqa: BLE001 - carried over to the waiting task
            error = caught
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            return  # the loop has ended; nobody waits

    threading.Thread(target=run, name="discovery-disk", daemon=True).start()
    return future
