"""What a decode worker says of its pairs: kept through steps, written when it is worth showing."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from trtllm_workers.observe.status import PairStatus, Status, StatusFile, read_status

PAIR = PairStatus(peer="prefill-0", transport="ucx", wire="shm", state="ready")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def status(tmp_path: Path, clock: Clock) -> StatusFile:
    return StatusFile(tmp_path / "s.json", clock=clock)


def written(tmp_path: Path) -> Status:
    found = read_status(tmp_path / "s.json")
    assert found is not None
    return found


def test_pairs_leave_the_step_as_it_is(tmp_path: Path, status: StatusFile) -> None:
    status.report("pairing", detail="no prefill worker yet")
    before = written(tmp_path)
    status.report_pairs([PAIR])
    assert written(tmp_path) == msgspec.structs.replace(before, pairs=(PAIR,))


def test_pairs_are_kept_by_later_steps(tmp_path: Path, status: StatusFile) -> None:
    status.report_pairs([PAIR])
    status.report("registered")
    assert (written(tmp_path).step, written(tmp_path).pairs) == ("registered", (PAIR,))


def test_pair_that_changes_its_state_is_written_at_once(tmp_path: Path, status: StatusFile) -> None:
    status.report_pairs([PAIR])
    lost = msgspec.structs.replace(PAIR, state="lost", reason="connection closed")
    status.report_pairs([lost])
    assert written(tmp_path).pairs == (lost,)
    status.report_pairs([])
    assert written(tmp_path).pairs == ()


def test_counts_alone_are_written_once_a_second(
    tmp_path: Path, status: StatusFile, clock: Clock
) -> None:
    def after(num_handoffs: int) -> tuple[PairStatus, ...]:
        status.report_pairs([msgspec.structs.replace(PAIR, num_handoffs=num_handoffs)])
        return written(tmp_path).pairs

    assert after(0)[0].num_handoffs == 0
    assert after(1)[0].num_handoffs == 0
    clock.now_s += 1.0
    assert after(2)[0].num_handoffs == 2
    assert after(3)[0].num_handoffs == 2
    status.report("draining")  # the next report of any kind has the newest
    assert written(tmp_path).pairs[0].num_handoffs == 3


def test_pairs_that_did_not_change_write_nothing(tmp_path: Path, status: StatusFile) -> None:
    status.report_pairs([PAIR])
    (tmp_path / "s.json").unlink()
    status.report_pairs([PAIR])
    assert not (tmp_path / "s.json").exists()


def test_pairs_that_could_not_be_written_are_tried_again(tmp_path: Path, clock: Clock) -> None:
    status = StatusFile(tmp_path / "later" / "s.json", clock=clock)
    status.report_pairs([PAIR])
    (tmp_path / "later").mkdir()
    status.report_pairs([PAIR])
    assert written(tmp_path / "later").pairs == (PAIR,)


def test_without_a_file_nothing_happens() -> None:
    StatusFile(None).report_pairs([PAIR])
