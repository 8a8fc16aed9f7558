"""Closes a deployment on all its hosts, through discovery and the request plane. Knows no run folder.

Ingresses first, so that running requests finish and no new ones come; then the workers. Each process
drains, or has its launcher end it; one that does not end by itself is killed there, by itself or by its
launcher, because nobody can signal a process of another host.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from trtllm_workers.errors import ConfigError, PlaneError
from trtllm_workers.planes.base import Discovery, Peer, RequestPlane
from trtllm_workers.planes.messages import Message, StopAsk
from trtllm_workers.types import Role, WorkerRecord

_REASON = "the deployment is being closed"
_CONNECT_TIMEOUT_S = 5.0
# What a process needs beyond its drain: to close its parts, and for its record to be seen gone.
_BEYOND_DRAIN_S = 30.0
_LOOK_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class Closed:
    """What became of a deployment: names with addresses of those that ended, were not to be reached, or
    are still there.
    """

    ended: tuple[str, ...]
    unreachable: tuple[str, ...]
    left: tuple[str, ...]


async def stop_everywhere(
    plane: RequestPlane,
    discovery: Discovery,
    *,
    drain_timeout_s: float,
    say: Callable[[str], None],
) -> Closed:
    """Close every process that discovery shows. ``plane`` has been started; both stay the caller's.

    Raises ConfigError when discovery cannot be read in time.
    """
    view = _View(discovery)
    watching = asyncio.create_task(view.follow(), name="stop-watch")
    unreachable: list[str] = []
    ended: list[str] = []
    try:
        await view.first(watching)
        for roles in ((Role.INGRESS,), (Role.AGGREGATED, Role.PREFILL, Role.DECODE, Role.ENCODE)):
            records = [record for record in view.records if record.role in roles]
            asked = []
            for record in records:
                say(f"asking {record.address} to end")
                if await _ask(plane, record, drain_timeout_s):
                    asked.append(record)
                else:
                    unreachable.append(str(record.address))
            gone = await view.until_gone(asked, drain_timeout_s + _BEYOND_DRAIN_S)
            ended += [str(record.address) for record in asked if record in gone]
        left = tuple(str(record.address) for record in view.records)
        return Closed(tuple(ended), tuple(unreachable), left)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _ask(plane: RequestPlane, record: WorkerRecord, drain_timeout_s: float) -> bool:
    try:
        peer = await plane.connect(record.address, _CONNECT_TIMEOUT_S)
        peer.send(StopAsk(drain_timeout_s, _REASON))
    except PlaneError:
        return False
    return True


def ignore(_peer: Peer, _message: Message) -> None:
    """Take what processes say while they end; discovery tells when they have."""


class _View:
    """What discovery shows, and waiting for it to change."""

    def __init__(self, discovery: Discovery) -> None:
        self._discovery = discovery
        self._changed = asyncio.Event()
        self._seen = False
        self.records: tuple[WorkerRecord, ...] = ()

    async def follow(self) -> None:
        async for records in self._discovery.watch():
            self.records, self._seen = records, True
            self._changed.set()

    async def first(self, watching: asyncio.Task[None]) -> None:
        """Wait for the first look. Raises what ``follow`` ended with, or ConfigError."""
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait(
                {changed, watching}, timeout=_LOOK_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            changed.cancel()
        if watching.done():
            watching.result()
        if not self._seen:
            raise ConfigError(
                f"discovery did not answer within {_LOOK_TIMEOUT_S:g} s; is --discovery right?",
                param="discovery",
            )

    async def until_gone(
        self, records: Collection[WorkerRecord], timeout_s: float
    ) -> list[WorkerRecord]:
        """Wait until the records are gone; return those that are when the time is over."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            live = {(one.worker_id, one.address.incarnation) for one in self.records}
            gone = [one for one in records if (one.worker_id, one.address.incarnation) not in live]
            left_s = deadline_s - time.monotonic()
            if len(gone) == len(records) or left_s <= 0:
                return gone
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._changed.wait()
