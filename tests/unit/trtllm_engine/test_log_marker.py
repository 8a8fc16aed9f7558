from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from trtllm_workers.engines.trtllm.log_marker import LogMarker, end_of


@pytest.mark.parametrize(
    ("line", "transport"),
    [
        ("[TensorRT-LLM][INFO] UcxConnectionManager::UcxConnectionManager ip: 10.0.0.1", "UCX"),
        ("[TensorRT-LLM][INFO] NixlTransferAgent: backend UCX, 8 lanes", "NIXL"),
        ("nothing of the kind: UCX NIXL", ""),
    ],
)
def test_the_class_that_logs_tells_the_transport(tmp_path: Path, line: str, transport: str) -> None:
    log = tmp_path / "w.log"
    log.write_text(f"Model init total\n{line}\n")
    assert LogMarker(log, 0).look() == transport


def test_a_marker_in_two_pieces_is_found(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    log.write_text("x" * 100 + "NixlTrans")
    marker = LogMarker(log, 0)
    assert marker.look() == ""
    with log.open("a") as file:
        file.write("ferAgent is up\n")
    assert marker.look() == "NIXL"


def test_what_an_earlier_process_wrote_does_not_count(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    log.write_text("NixlTransferAgent\n")
    marker = LogMarker(log, end_of(log))
    assert marker.look() == ""
    with log.open("a") as file:
        file.write("UcxConnectionManager\n")
    assert marker.look() == "UCX"


async def test_a_log_that_says_nothing_is_not_waited_for_long(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    assert end_of(log) == 0
    async with asyncio.timeout(5):
        assert await LogMarker(log, 0).wait(0.05) == ""
        log.write_text("UcxConnectionManager\n")
        assert await LogMarker(log, 0).wait(0.05) == "UCX"
