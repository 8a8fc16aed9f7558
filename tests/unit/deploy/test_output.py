"""Lines, log files and the terminal: nothing is lost, nothing is obeyed, nobody is slowed down."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_workers.deploy.output import Lines, LogFile, Output, Terminal, printable


def read_all(fd: int) -> bytes:
    pieces = []
    while piece := os.read(fd, 65536):
        pieces.append(piece)
    return b"".join(pieces)


@given(st.binary(max_size=200), st.integers(1, 7))
def test_lines_are_the_same_however_the_bytes_arrive(raw: bytes, size: int) -> None:
    whole, pieces = Lines(), Lines()
    expected = [*whole.feed(raw), *whole.finish()]
    seen = [line for at in range(0, len(raw), size) for line in pieces.feed(raw[at : at + size])]
    assert [*seen, *pieces.finish()] == expected
    assert b"".join(expected) == raw.replace(b"\r", b"").replace(b"\n", b"")


def test_lines_break_a_line_without_an_end_into_pieces() -> None:
    lines = Lines()
    seen = [piece for _ in range(50) for piece in lines.feed(b"y" * 1000)]
    assert len(seen) == 3
    assert {len(piece) for piece in seen} == {16 * 1024}
    assert sum(map(len, seen)) + len(lines.rest) == 50_000


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"caf\xc3\xa9", "café"),
        (b"\xff\xfe", "\\xff\\xfe"),
        (b"\x1b[31mred\x1b[0m", "\x1b[31mred\x1b[0m"),
        (b"\x1b[2Jcleared", "\\x1b[2Jcleared"),
        (b"a\tb  ", "a\tb"),
        (b"\x00\x7f", "\\x00\\x7f"),
    ],
)
def test_printable_shows_what_could_steer_a_terminal(raw: bytes, shown: str) -> None:
    assert printable(raw) == shown


def test_log_file_tells_once_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    told: list[str] = []
    log = LogFile(tmp_path / "missing" / "w.log", told.append)
    log.write(b"lost\n")
    log.write(b"lost\n")
    assert len(told) == 1
    assert "No such file or directory" in told[0]
    (tmp_path / "missing").mkdir()
    log.write(b"kept\n")
    log.close()
    log.close()
    assert (tmp_path / "missing" / "w.log").read_bytes() == b"kept\n"


def test_log_file_turns_over_before_it_fills_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "w.log"
    log = LogFile(path, pytest.fail, max_bytes=100)
    for number in range(30):
        log.write(b"line %04d\n" % number)
    log.close()
    assert path.stat().st_size <= 100
    assert (tmp_path / "w.log.1").stat().st_size <= 100
    assert path.read_bytes().endswith(b"line 0029\n")


def test_terminal_prefixes_lines_and_colours_names() -> None:
    reader, writer = os.pipe()
    terminal = Terminal(writer, colour=True, names=["worker-0", "ingress"])
    terminal.line("ingress", "hello")
    terminal.say("ready")
    terminal.close()
    os.close(writer)
    assert read_all(reader).decode() == "\x1b[33m[ingress]\x1b[0m hello\nready\n"
    os.close(reader)


def test_terminal_that_nobody_reads_drops_the_newest_and_counts_them() -> None:
    reader, writer = os.pipe()
    terminal = Terminal(writer)
    for number in range(40_000):  # far more than the pipe and the waiting line hold
        terminal.line("w", f"line {number}")
    seen: list[bytes] = []
    drain = threading.Thread(target=lambda: seen.append(read_all(reader)))
    drain.start()
    terminal.close(timeout_s=10.0)
    os.close(writer)
    drain.join(10.0)
    os.close(reader)
    text = b"".join(seen).decode()
    shown = text.count("[w] line ")
    assert text.startswith("[w] line 0\n")
    # How often it is said depends on when the writer got its turns; nothing is lost uncounted.
    told = re.findall(r"\((\d+) lines not shown: the terminal is slow\)", text)
    assert told
    assert sum(map(int, told)) == 40_000 - shown


def test_terminal_survives_a_reader_that_left() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    terminal = Terminal(writer)
    for _ in range(3):
        terminal.say("nobody hears this")
    terminal.close()
    os.close(writer)


def test_tail_holds_the_last_lines_and_the_unfinished_one(tmp_path: Path) -> None:
    with open(os.devnull, "wb") as nothing:
        terminal = Terminal(nothing.fileno())
        output = Output("w", LogFile(tmp_path / "w.log", pytest.fail), terminal)
        output.feed(b"".join(b"line %d\n" % number for number in range(50)) + b"unfinished")
        assert output.tail() == [*(f"line {number}" for number in range(31, 50)), "unfinished"]
        output.finish()
        assert output.tail()[-1] == "unfinished"
        terminal.close()
