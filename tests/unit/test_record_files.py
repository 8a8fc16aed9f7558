"""Records as files: who is judged alive, on a clock that the test moves; foreign files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from tests.contract.planes import record
from trtllm_workers.planes import record_codec, record_files
from trtllm_workers.planes.record_codec import FORMAT, Owner, RecordFile
from trtllm_workers.planes.record_files import RecordFolder, this_process
from trtllm_workers.types import WorkerRecord

ELSEWHERE = Owner(host="node-7", machine="another boot", pid=1, started="1")


class Folder:
    """A folder watched by a clock that the test moves, with an owner on another host."""

    def __init__(self, path: Path, ttl_s: float = 5.0) -> None:
        self.path = path
        self.now_s = 1000.0
        self.view = RecordFolder(path, ttl_s, clock=lambda: self.now_s)
        self._beats = 0

    def put(self, each: WorkerRecord, owner: Owner = ELSEWHERE) -> Path:
        record_files.write(self.path, each, owner)
        return self.path / record_files.file_name(each.worker_id, each.address.incarnation)

    def beat(self, path: Path, clock_s: float | None = None) -> None:
        """Move a heartbeat, by a host whose clock says ``clock_s``."""
        self._beats += 1
        moment = clock_s if clock_s is not None else 1e9 + self._beats
        os.utime(path, (moment, moment))

    def look(self, after_s: float = 0.0) -> list[str]:
        """Look twice a second for ``after_s`` and return the ids of the last look."""
        for _ in range(int(after_s * 2)):
            self.now_s += 0.5
            self.view.look()
        return [each.worker_id for each in self.view.look()]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "workers")


@pytest.mark.parametrize("step", [1, -1], ids=["oldest first", "youngest first"])
def test_youngest_life_of_each_worker_is_shown(folder: Folder, step: int) -> None:
    for worker_id in [f"worker-{index}" for index in range(8)]:
        for life in ["18e9a", "18e9b", "18e9c"][::step]:
            folder.put(record(worker_id, incarnation=life))
    assert [each.address.incarnation for each in folder.view.look()] == ["18e9c"] * 8


def test_record_of_another_host_is_believed_for_one_ttl(folder: Folder) -> None:
    folder.put(record("worker-0"))
    assert folder.look() == ["worker-0"]
    assert folder.look(after_s=4.5) == ["worker-0"]
    assert folder.look(after_s=1.0) == []


def test_record_stays_as_long_as_its_heartbeat_moves(folder: Folder) -> None:
    path = folder.put(record("worker-0"))
    for _ in range(10):
        folder.beat(path)
        assert folder.look(after_s=3.0) == ["worker-0"]


@pytest.mark.parametrize("clock_s", [0.0, 1.0, 9e9], ids=["1970", "1970 too", "2255"])
def test_clock_of_the_other_host_does_not_matter(folder: Folder, clock_s: float) -> None:
    path = folder.put(record("worker-0"))
    for beat in range(4):
        folder.beat(path, clock_s=clock_s + beat)
        assert folder.look(after_s=4.0) == ["worker-0"]


def test_heartbeat_that_goes_backwards_is_a_heartbeat(folder: Folder) -> None:
    path = folder.put(record("worker-0"))
    for beat in range(4):
        folder.beat(path, clock_s=1e9 - 3600 * beat)
        assert folder.look(after_s=4.0) == ["worker-0"]


def test_record_that_revives_is_shown_again(folder: Folder) -> None:
    path = folder.put(record("worker-0"))
    assert folder.look(after_s=10.0) == []
    folder.beat(path)
    assert folder.look() == ["worker-0"]


def test_watcher_that_looked_away_holds_nothing_against_the_owners(folder: Folder) -> None:
    folder.put(record("worker-0"))
    folder.look(after_s=3.0)
    folder.now_s += 3600.0
    assert folder.look() == ["worker-0"]
    assert folder.look(after_s=3.0) == []  # but goes on counting where it stopped


def test_file_of_an_owner_dead_for_long_is_removed(folder: Folder) -> None:
    path = folder.put(record("worker-0"))
    folder.look(after_s=49.0)
    assert path.exists()
    folder.look(after_s=2.0)
    assert not path.exists()


def test_unfinished_file_of_a_killed_writer_is_removed(folder: Folder) -> None:
    path = folder.put(record("worker-0"))
    unfinished = path.with_name(f".{path.name}.12345678")
    path.rename(unfinished)
    assert folder.look(after_s=49.0) == []
    assert unfinished.exists()
    folder.look(after_s=2.0)
    assert not unfinished.exists()


def test_file_of_a_gone_process_of_this_host_is_removed_at_once(folder: Folder) -> None:
    mine = this_process("here")
    before = msgspec.structs.replace(mine, started=str(int(mine.started) - 1))  # its pid was reused
    gone = folder.put(record("gone"), before)
    folder.put(record("here"), mine)
    assert folder.look() == ["here"]
    assert not gone.exists()


def test_equal_pid_on_another_host_is_not_taken_for_a_process_of_this_one(folder: Folder) -> None:
    mine = this_process("here")
    folder.put(record("there"), msgspec.structs.replace(mine, machine="another boot", started="1"))
    folder.put(record("unknown"), msgspec.structs.replace(mine, machine="", started="1"))
    assert folder.look() == ["there", "unknown"]


def test_files_that_did_not_change_are_not_parsed_again(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[bytes] = []
    decode = record_codec.decode

    def note(text: bytes) -> RecordFile:
        parsed.append(text)
        return decode(text)

    monkeypatch.setattr(record_codec, "decode", note)
    path = folder.put(record("worker-0"))
    folder.look(after_s=3.0)
    assert len(parsed) == 1
    folder.beat(path)
    folder.look(after_s=3.0)
    assert len(parsed) == 2


# Foreign files


def good_bytes(each: WorkerRecord, **changes: object) -> bytes:
    content = msgspec.to_builtins(RecordFile(format=FORMAT, owner=ELSEWHERE, record=each))
    return json.dumps(content | changes).encode()


FOREIGN = {
    "empty.json": b"",
    "noise.json": bytes(range(256)),
    "list.json": b"[1, 2]",
    "nested.json": b"[" * 100_000,
    "newer@1.json": good_bytes(record("newer", incarnation="1"), format=2),
    "wrong@1.json": good_bytes(record("wrong", incarnation="1"), record={"worker_id": 7}),
    "copy of worker-0@1.json": good_bytes(record("worker-0", incarnation="1")),
}


@pytest.mark.parametrize(("name", "content"), FOREIGN.items(), ids=FOREIGN)
def test_file_that_cannot_be_read_is_skipped_and_logged_once(
    folder: Folder, name: str, content: bytes
) -> None:
    folder.put(record("worker-0"))
    (folder.path / name).write_bytes(content)
    with capture_logs() as logs:
        assert folder.look(after_s=2.0) == ["worker-0"]
    assert [log["event"] for log in logs] == ["worker record skipped"]
    assert name in logs[0]["file"]
    folder.look(after_s=100.0)
    assert (folder.path / name).exists()  # what is not ours stays


def test_newer_format_is_named(folder: Folder) -> None:
    folder.path.mkdir()
    (folder.path / "newer@1.json").write_bytes(FOREIGN["newer@1.json"])
    with capture_logs() as logs:
        folder.look()
    assert logs[0]["reason"] == "it has format 2, this release reads format 1"


def test_other_things_in_the_folder_are_left_alone(folder: Folder) -> None:
    folder.path.mkdir()
    (folder.path / "notes.txt").write_text("keep me")
    (folder.path / ".hidden").write_text("keep me")
    (folder.path / "folder.json").mkdir()
    assert folder.look(after_s=100.0) == []
    assert len(list(folder.path.iterdir())) == 3


def test_foreign_file_that_becomes_a_record_is_read(folder: Folder) -> None:
    folder.path.mkdir()
    path = folder.path / "worker-0@1.json"
    path.write_bytes(b"soon")
    assert folder.look() == []
    path.write_bytes(good_bytes(record("worker-0", incarnation="1")))
    folder.beat(path)
    assert folder.look() == ["worker-0"]
