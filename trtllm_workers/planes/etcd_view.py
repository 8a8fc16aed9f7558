"""Which records are alive, from what etcd lists and tells. Pure: knows no connection; time is given.

::

    listed or put ──▶ alive ──deleted, or not listed──▶ gone
                        ▲              │ while in doubt
                        │              ▼
                        └──put──── missing ──one ttl──▶ gone

While etcd cannot be reached, or stands still, leases run out although their owners live: when it is
back, it deletes them, or has lost them altogether. The owners register again by themselves within
a part of a ttl. So for one ttl after etcd was away a record that goes missing is kept for one more:
otherwise every stream of every worker would break over a server that carries none of them. An owner
that closes its lease writes CLOSED first; that is believed at once, in doubt or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from trtllm_workers.planes import record_codec
from trtllm_workers.planes.etcd_client import Event, Kept
from trtllm_workers.planes.record_codec import Unreadable
from trtllm_workers.planes.record_keys import record_key
from trtllm_workers.types import WorkerRecord

CLOSED: Final = b""  # the last value of a key whose owner closes its lease

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Entry:
    """What is known of one key. ``record`` is None where it cannot be read."""

    record: WorkerRecord | None
    missing_until_s: float | None = None


class EtcdView:
    """The live records under one prefix. ``ttl_s`` is how long owners get to register again."""

    def __init__(self, prefix: str, ttl_s: float) -> None:
        self._prefix = prefix
        self._ttl_s = ttl_s
        self._entries: dict[str, _Entry] = {}
        self._listed_revision = 0
        self._revision = 0
        self._skipped: set[str] = set()
        self._in_doubt = False
        self._doubt_until_s = float("-inf")

    def records(self) -> tuple[WorkerRecord, ...]:
        """Return the live records, the youngest life of each worker, sorted by worker_id."""
        live: dict[str, WorkerRecord] = {}
        for entry in self._entries.values():
            record = entry.record
            if record is not None:
                other = live.get(record.worker_id)
                if other is None or other.address.incarnation < record.address.incarnation:
                    live[record.worker_id] = record
        return tuple(live[worker_id] for worker_id in sorted(live))

    def lost_sight(self) -> None:
        """Note that etcd cannot be followed any more; everything stays as it was last seen."""
        self._in_doubt = True

    def listed(self, keys: Sequence[Kept], revision: int, now_s: float) -> int:
        """Take the whole set; return the revision from which on events are still wanted.

        After a break that lies before the list: a CLOSED in between is worth knowing.
        """
        if self._in_doubt:
            self._in_doubt = False
            self._doubt_until_s = now_s + self._ttl_s
        lost_its_data = revision < self._revision  # restored, or begun anew: events start over
        wanted = revision if lost_its_data or not self._revision else self._revision
        self._listed_revision = self._revision = revision
        found = {kept.key for kept in keys}
        for key in self._entries.keys() - found:
            self._miss(key, now_s)
        self._skipped &= found
        for kept in keys:
            self._take(kept.key, kept.value)
        return wanted + 1

    def happened(self, event: Event, now_s: float) -> None:
        """Take one event."""
        entry = self._entries.get(event.key)
        if event.revision <= self._listed_revision:
            # From before the list, which says better what is there; but not why something is not.
            if event.value == CLOSED and entry and entry.missing_until_s is not None:
                del self._entries[event.key]
            return
        self._revision = max(self._revision, event.revision)
        if event.value is None:
            self._skipped.discard(event.key)
            if entry is not None:
                self._miss(event.key, now_s)
        else:
            self._take(event.key, event.value)

    def expire(self, now_s: float) -> None:
        """Let go of what has been missing for too long."""
        for key, entry in list(self._entries.items()):
            if entry.missing_until_s is not None and entry.missing_until_s <= now_s:
                del self._entries[key]
                if entry.record is not None:
                    log.info("worker did not register again", worker_id=entry.record.worker_id)

    def next_expiry_s(self) -> float | None:
        """Return when ``expire`` has something to do; None when nothing is missing."""
        due = (entry.missing_until_s for entry in self._entries.values())
        return min((moment for moment in due if moment is not None), default=None)

    def _miss(self, key: str, now_s: float) -> None:
        if now_s < self._doubt_until_s:
            self._entries[key].missing_until_s = now_s + self._ttl_s
        else:
            del self._entries[key]

    def _take(self, key: str, value: bytes) -> None:
        if value == CLOSED:
            self._entries.pop(key, None)
            return
        self._entries[key] = _Entry(self._read(key, value))

    def _read(self, key: str, value: bytes) -> WorkerRecord | None:
        try:
            record = record_codec.decode(value).record
            expected = record_key(self._prefix, record.worker_id, record.address.incarnation)
            if key != expected:
                raise Unreadable(f"it holds the record of {record.worker_id}: a copy?")
        except Unreadable as error:
            if key not in self._skipped:
                self._skipped.add(key)
                log.warning("worker record skipped", key=key, reason=str(error))
            return None
        self._skipped.discard(key)
        return record
