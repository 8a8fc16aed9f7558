"""Which records a watcher of etcd believes in, on a clock that the test moves."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from tests.contract.planes import record
from trtllm_workers.planes import record_codec
from trtllm_workers.planes.etcd_client import Event, Kept
from trtllm_workers.planes.etcd_view import CLOSED, EtcdView
from trtllm_workers.planes.record_codec import Owner
from trtllm_workers.planes.record_keys import record_key, workers_prefix
from trtllm_workers.types import WorkerRecord

TTL_S = 10.0
PREFIX = workers_prefix("default")
OWNER = Owner(host="node-7", machine="", pid=1, started="1")


def key(each: WorkerRecord) -> str:
    return record_key(PREFIX, each.worker_id, each.address.incarnation)


class Watcher:
    def __init__(self) -> None:
        self.view = EtcdView(PREFIX, TTL_S)
        self.now_s = 1000.0

    def lists(self, revision: int, *records: WorkerRecord) -> int:
        kept = [Kept(key(each), record_codec.encode(each, OWNER)) for each in records]
        return self.view.listed(kept, revision, self.now_s)

    def sees_put(self, each: WorkerRecord, revision: int) -> None:
        value = record_codec.encode(each, OWNER)
        self.view.happened(Event(key(each), value, revision), self.now_s)

    def sees_closed(self, each: WorkerRecord, revision: int) -> None:
        self.view.happened(Event(key(each), CLOSED, revision), self.now_s)

    def sees_deleted(self, each: WorkerRecord, revision: int) -> None:
        self.view.happened(Event(key(each), None, revision), self.now_s)

    def after(self, seconds: float) -> tuple[WorkerRecord, ...]:
        self.now_s += seconds
        self.view.expire(self.now_s)
        return self.view.records()


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


A, B = record("a"), record("b")


def test_lease_that_runs_out_in_quiet_times_is_believed_at_once(watcher: Watcher) -> None:
    watcher.lists(5, A, B)
    watcher.sees_deleted(A, 6)
    assert watcher.after(0) == (B,)
    assert watcher.view.next_expiry_s() is None


def test_record_that_is_missing_after_a_break_is_kept_for_one_ttl(watcher: Watcher) -> None:
    watcher.lists(5, A, B)
    watcher.view.lost_sight()
    assert watcher.after(1000) == (A, B)  # however long etcd was away
    watcher.lists(9, B)
    assert watcher.view.next_expiry_s() == watcher.now_s + TTL_S
    assert watcher.after(9.9) == (A, B)
    assert watcher.after(0.1) == (B,)


def test_record_that_registers_again_in_that_time_stays(watcher: Watcher) -> None:
    watcher.lists(5, A)
    watcher.view.lost_sight()
    watcher.lists(9)
    watcher.sees_put(A, 10)
    assert watcher.after(100) == (A,)


def test_record_deleted_soon_after_a_break_is_kept_and_later_is_not(watcher: Watcher) -> None:
    watcher.lists(5, A, B)
    watcher.view.lost_sight()
    watcher.lists(6, A, B)
    assert watcher.after(9.9) == (A, B)
    watcher.sees_deleted(A, 7)
    assert watcher.after(9.9) == (A, B)
    watcher.sees_deleted(B, 8)
    assert watcher.after(0.1) == ()


def test_record_closed_on_purpose_is_gone_at_once_in_doubt_too(watcher: Watcher) -> None:
    watcher.lists(5, A)
    watcher.view.lost_sight()
    watcher.lists(6, A)
    watcher.sees_closed(A, 7)
    assert watcher.after(0) == ()
    watcher.sees_deleted(A, 8)
    assert watcher.after(0) == ()


def test_record_closed_during_a_break_is_gone_when_that_is_told(watcher: Watcher) -> None:
    watcher.lists(5, A, B)
    watcher.view.lost_sight()
    assert watcher.lists(9, B) == 6  # from where events are wanted: right after what was seen
    assert watcher.after(0) == (A, B)
    watcher.sees_closed(A, 7)
    watcher.sees_deleted(A, 8)
    assert watcher.after(0) == (B,)


def test_event_from_before_the_list_does_not_bring_a_record_back(watcher: Watcher) -> None:
    watcher.lists(5)
    watcher.view.lost_sight()
    watcher.lists(9, B)
    watcher.sees_put(A, 6)
    watcher.sees_deleted(A, 7)
    watcher.sees_deleted(B, 8)  # and was written again
    assert watcher.after(0) == (B,)


def test_second_break_gives_the_missing_their_time_again(watcher: Watcher) -> None:
    watcher.lists(5, A)
    for revision in (6, 7):
        watcher.view.lost_sight()
        watcher.lists(revision)
        assert watcher.after(9) == (A,)
    assert watcher.after(1) == ()


def test_etcd_that_began_anew_is_followed_from_its_own_revisions(watcher: Watcher) -> None:
    assert watcher.lists(500, A, B) == 501
    watcher.view.lost_sight()
    assert watcher.lists(3, B) == 4
    assert watcher.after(1) == (A, B)
    watcher.sees_put(A, 4)
    watcher.sees_deleted(B, 5)
    watcher.view.expire(watcher.now_s)
    assert watcher.after(100) == (A,)


def test_youngest_life_of_each_worker_is_shown_until_it_is_gone(watcher: Watcher) -> None:
    old, young = (record("a", incarnation=life) for life in ("18e9a", "18e9b"))
    watcher.lists(5, young, old)
    assert watcher.after(0) == (young,)
    watcher.sees_deleted(young, 6)
    assert watcher.after(0) == (old,)


def test_key_that_cannot_be_read_is_skipped_and_logged_once_until_it_is_new(
    watcher: Watcher,
) -> None:
    foreign = f"{PREFIX}x/1"
    with capture_logs() as logs:
        for revision in range(3):
            watcher.view.listed([Kept(foreign, b"noise")], 5 + revision, watcher.now_s)
        watcher.view.happened(Event(foreign, record_codec.encode(A, OWNER), 9), watcher.now_s)
        assert len(logs) == 1
        watcher.view.happened(Event(foreign, None, 10), watcher.now_s)
        watcher.view.happened(Event(foreign, record_codec.encode(A, OWNER), 11), watcher.now_s)
    assert [log["key"] for log in logs] == [foreign, foreign]
    assert "copy" in logs[1]["reason"]
    assert watcher.after(0) == ()


@pytest.mark.parametrize("worker_id", ["a/b", "../c", "d e%2F", "ü"])
def test_ids_of_any_characters_have_keys_of_their_own(worker_id: str) -> None:
    made = record_key(PREFIX, worker_id, "1/2")
    assert made.startswith(PREFIX)
    assert made.removeprefix(PREFIX).count("/") == 1
