from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import structlog

from trtllm_workers.observe.log_sinks import Sink, SinkHandler, file_sink
from trtllm_workers.observe.logs import (
    REDACTED,
    bound,
    close_logs,
    dropped_lines,
    get_logger,
    setup_logs,
)

Setup = Callable[..., Path]


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    """Set logs up with a file; afterwards everything is as it was."""
    root = logging.getLogger()
    level = root.level

    def begin(
        fmt: Literal["console", "json"] = "json", level: str = "info", path: Path | None = None
    ) -> Path:
        path = path or tmp_path / "logs" / "worker-0.log"
        setup_logs("worker-0", fmt=fmt, level=level, path=path)
        return path

    yield begin
    close_logs()
    logging.captureWarnings(False)
    root.setLevel(level)
    structlog.reset_defaults()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_has_time_level_process_event_and_what_is_bound(setup: Setup) -> None:
    path = setup()
    with bound(request_id="r1", worker_id="w1"):
        get_logger("x").info("prefill done", prompt_tokens=512)
    get_logger("x").warning("outside")
    first, second = lines(path)
    assert list(first)[:4] == ["time", "level", "process", "event"]
    assert first["time"].endswith("Z")
    assert first | {"time": ""} == {
        "time": "",
        "level": "info",
        "process": "worker-0",
        "event": "prefill done",
        "prompt_tokens": 512,
        "request_id": "r1",
        "worker_id": "w1",
    }
    assert "request_id" not in second


@pytest.mark.parametrize("name", ["uvicorn.error", "uvicorn.access", "asyncio", "some.library"])
def test_records_of_other_libraries_come_out_the_same(setup: Setup, name: str) -> None:
    logging.getLogger("uvicorn.error").addHandler(logging.NullHandler())
    path = setup()
    with bound(request_id="r1"):
        logging.getLogger(name).warning("from %s", name)
    (line,) = lines(path)
    assert (line["event"], line["level"]) == (f"from {name}", "warning")
    assert (line["process"], line["request_id"]) == ("worker-0", "r1")


def test_warnings_are_logged(setup: Setup) -> None:
    path = setup()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)  # catch_warnings put the old way of showing back
        warnings.warn("careful", stacklevel=1)
        logging.captureWarnings(False)
    assert "careful" in lines(path)[0]["event"]


def test_levels_below_the_chosen_one_are_not_written(setup: Setup) -> None:
    path = setup(level="warning")
    get_logger("x").info("no")
    logging.getLogger("x").info("no")
    get_logger("x").error("yes")
    assert [line["event"] for line in lines(path)] == ["yes"]


def test_exceptions_come_with_their_traceback(setup: Setup) -> None:
    path = setup()
    for log in (get_logger("x"), logging.getLogger("asyncio")):
        try:
            raise ValueError("inner")
        except ValueError:
            log.exception("broke")
    for line in lines(path):
        assert "ValueError: inner" in line["exception"]
        assert line["level"] == "error"


def test_secrets_are_redacted_wherever_they_stand(setup: Setup) -> None:
    path = setup()
    get_logger("x").info(
        "got Bearer sk-1234567890",
        api_key="hidden",
        cluster_secret="hidden",
        token="hidden",
        headers={"Authorization": "hidden", "x-auth-token": "hidden", "Accept": "json"},
        nested=[{"password": "hidden"}],
        prompt_tokens=3,
        token_ids=[1, 2],
        secret=None,
    )
    logging.getLogger("y").warning("Authorization: Bearer hidden-too")
    text = path.read_text()
    assert "hidden" not in text
    assert "sk-1234567890" not in text
    first = lines(path)[0]
    assert first["event"] == f"got Bearer {REDACTED}"
    assert (first["prompt_tokens"], first["token_ids"], first["secret"]) == (3, [1, 2], None)
    assert first["headers"]["Accept"] == "json"


def test_text_from_a_request_cannot_forge_a_console_line(setup: Setup) -> None:
    path = setup(fmt="console")
    get_logger("x").info("bad\nname", model="a\x1b[31m\r\nforged", empty="", plain="word")
    (line,) = path.read_text().splitlines()
    assert "bad\\nname" in line
    assert line.endswith('model=a\\x1b[31m\\r\\nforged  empty=""  plain=word')


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize("fmt", ["console", "json"])
def test_what_cannot_be_shown_is_said_and_nobody_is_disturbed(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, fmt: Literal["console", "json"]
) -> None:
    path = setup(fmt=fmt)
    root = logging.getLogger()  # pytest's own handler would raise
    ours = [one for one in root.handlers if isinstance(one, SinkHandler)]
    monkeypatch.setattr(root, "handlers", ours)
    get_logger("x").info("odd", value=Unshowable(), broken="\ud800")
    logging.getLogger("y").warning("%d", "not a number")
    odd, wrong = path.read_text().splitlines()
    assert "<Unshowable: repr raised RuntimeError>" in odd
    assert "a log line of y could not be formatted (TypeError)" in wrong


def test_a_second_set_up_replaces_the_first(setup: Setup, tmp_path: Path) -> None:
    setup()
    second = setup(path=tmp_path / "second.log")
    get_logger("y").warning("once")
    handlers = [one for one in logging.getLogger().handlers if isinstance(one, SinkHandler)]
    assert len(handlers) == 2  # standard error and the file
    assert [line["event"] for line in lines(second)] == ["once"]


def test_log_files_are_for_their_owner_alone(setup: Setup) -> None:
    path = setup()
    get_logger("x").info("first")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_lines_that_cannot_be_written_are_counted_and_reported_once(
    setup: Setup, tmp_path: Path
) -> None:
    obstacle = tmp_path / "logs"
    obstacle.write_text("a file where a folder should be")
    path = setup()
    log = get_logger("x")
    log.info("lost 1")
    log.info("lost 2")
    assert dropped_lines() == 2
    obstacle.unlink()
    log.info("back")
    log.info("again")
    assert [line["event"] for line in lines(path)] == [
        "log lines were dropped: 2 (File exists)",
        "back",
        "again",
    ]
    assert dropped_lines() == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_does_not_reach_the_caller(setup: Setup) -> None:
    setup(path=Path("/dev/full"))
    for _ in range(3):
        get_logger("x").error("no space")
    assert dropped_lines() == 3


def test_a_line_that_broke_off_does_not_swallow_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.log"
    sink: Sink = file_sink(path)
    real_write = os.write
    room = [4]

    def short_write(fd: int, content: bytes) -> int:
        if room[0] == 0:
            raise OSError(28, "No space left on device")
        room[0] -= (written := real_write(fd, content[: room[0]]))
        return written

    monkeypatch.setattr(os, "write", short_write)
    assert not sink.write("broken off")
    room[0] = 1000
    assert sink.write("whole")
    sink.close()
    assert path.read_text() == "brok\nwhole\n"
    assert (sink.dropped, sink.reason) == (1, "No space left on device")


CHILD = """
import logging, sys
from pathlib import Path
from trtllm_workers.observe.logs import get_logger, setup_logs, dropped_lines
setup_logs("child", fmt="json", level="info", path=None)
for _ in range(3):
    get_logger("x").info("hello")
    logging.getLogger("y").warning("hello")
Path(sys.argv[1]).write_text(str(dropped_lines()))
"""


@pytest.mark.parametrize(
    ("redirection", "dropped"), [("2>&-", "0"), ("2>/dev/full", "6"), ("2>/dev/null", "0")]
)
def test_a_process_survives_whatever_its_stderr_is(
    tmp_path: Path, redirection: str, dropped: str
) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    out = tmp_path / "out"
    command = f'exec "$0" "$1" "$2" {redirection}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, str(script), str(out)], timeout=30, check=False
    )
    assert done.returncode == 0
    assert out.read_text() == dropped


def test_a_process_survives_a_reader_of_stderr_that_left(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path / "out")],
            stderr=writer,
            timeout=30,
            check=False,
        )
    finally:
        os.close(writer)
    assert done.returncode == 0
    assert (tmp_path / "out").read_text() == "6"
