"""What ps shows of pairs and ranks: a second table for people, values for machines."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from trtllm_workers.deploy import proc
from trtllm_workers.deploy.listing import as_table, rows_of
from trtllm_workers.deploy.run import ProcessRecord, Run, RunFolder, RunRecord
from trtllm_workers.observe.status import PairStatus, StatusFile

PAIRS = (
    PairStatus(
        peer="prefill-0",
        transport="ucx",
        wire="cuda_ipc",
        state="ready",
        gb_per_s=11.256,
        num_handoffs=42,
    ),
    PairStatus(
        peer="prefill-1",
        transport="ucx",
        wire="",
        state="refused",
        reason="block_size is 32 here and 64 there",
    ),
)


def me() -> proc.Proc:
    found = proc.read(os.getpid())
    assert found is not None
    return found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a run whose decode worker is this very process."""
    folder = RunFolder(tmp_path / "abc123")
    folder.status("x").parent.mkdir(parents=True)
    status = StatusFile(folder.status("decode-0"))
    status.report("registered")
    status.report_pairs(PAIRS)
    decode = ProcessRecord(name="decode-0", role="decode", pid=me().pid, start_ticks=1)
    ended = ProcessRecord(name="prefill-0", role="prefill", pid=0, start_ticks=1)
    launcher = ProcessRecord(name="launcher", role="launcher", pid=0, start_ticks=0)
    record = RunRecord(
        run_id="abc123",
        host="here",
        boot_id="now",
        started_at_s=0.0,
        launcher=launcher,
        processes=(ended, decode),
    )
    return Run("abc123", folder, record, me(), {me().pid: ("decode-0", me())})


def test_pairs_of_a_decode_worker_are_a_second_table(run: Run) -> None:
    first, _, second = as_table(rows_of([run]), [run]).partition("\n\n")
    assert "decode-0" in first
    assert second.splitlines() == [
        "RUN     DECODE    PREFILL    TRANSPORT  WIRE      GB/S   HANDOFFS  STATE",
        "abc123  decode-0  prefill-0  ucx        cuda_ipc  11.26  42        ready",
        "abc123  decode-0  prefill-1  ucx        -         -      0         "
        "refused: block_size is 32 here and 64 there",
    ]


def test_machines_get_every_field_of_a_pair(run: Run) -> None:
    rows = msgspec.json.decode(msgspec.json.encode(rows_of([run])))
    by_name = {row["process"]: row for row in rows}
    assert by_name["prefill-0"]["pairs"] == []
    assert by_name["decode-0"]["pairs"][0] == {
        "peer": "prefill-0",
        "transport": "ucx",
        "wire": "cuda_ipc",
        "state": "ready",
        "gb_per_s": 11.256,
        "num_handoffs": 42,
        "reason": "",
    }


def test_without_pairs_there_is_one_table(run: Run) -> None:
    assert run.folder is not None
    StatusFile(run.folder.status("decode-0")).report("registered")
    assert "PREFILL" not in as_table(rows_of([run]), [run])


def test_worker_that_ended_shows_no_pairs(run: Run) -> None:
    run.members.clear()
    assert all(not row.pairs for row in rows_of([run]))


def test_ranks_have_names_of_their_own(run: Run) -> None:
    run.members[1] = ("decode-0 rank 1", me())
    run.members[2] = ("decode-0", me())
    names = [row.process for row in rows_of([run])]
    assert names == ["launcher", "prefill-0", "decode-0", "decode-0's child", "decode-0 rank 1"]
