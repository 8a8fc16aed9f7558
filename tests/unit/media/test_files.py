from __future__ import annotations

import asyncio
import os
import socket
import threading
from pathlib import Path

import pytest

from tests.unit.media.support import (
    PARAM,
    Rooms,
    load,
    load_image,
    loader,
    png,
    safetensors,
    written,
)
from trtllm_workers.config.media import MediaSettings
from trtllm_workers.errors import MediaRejected
from trtllm_workers.media.files import open_file, read_whole
from trtllm_workers.types import MediaReference

LIMIT = 10_000


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    folder = tmp_path / "allowed"
    (folder / "inner").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "allowed-too").mkdir()
    (tmp_path / "allowed-too" / "a.png").write_bytes(b"secret")
    written(folder / "a.png", b"content")
    written(folder / "inner" / "b.png", b"inner")
    return folder


def read(path: str, allowed: Path | None) -> bytes:
    with open_file(path, allowed, PARAM, LIMIT) as file:
        return read_whole(file.fd, file.num_bytes, PARAM)


def refused(path: str, allowed: Path | None) -> str:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(MediaRejected) as caught:
        read(path, allowed)
    assert os.listdir("/proc/self/fd") == before
    assert caught.value.param == PARAM
    return str(caught.value)


def test_files_under_the_folder_are_read(allowed: Path) -> None:
    assert read(str(allowed / "a.png"), allowed) == b"content"
    assert read("a.png", allowed) == b"content"
    assert read("inner/../a.png", allowed) == b"content"
    assert read(str(allowed / "inner" / "b.png"), allowed) == b"inner"


def test_links_that_stay_inside_are_followed_and_the_folder_may_be_a_link(
    allowed: Path, tmp_path: Path
) -> None:
    (allowed / "link.png").symlink_to(allowed / "inner" / "b.png")
    (allowed / "link").symlink_to("inner")
    (tmp_path / "alias").symlink_to(allowed)
    assert read("link.png", allowed) == b"inner"
    assert read("link/b.png", allowed) == b"inner"
    assert read(str(tmp_path / "alias" / "a.png"), allowed) == b"content"
    assert read(str(allowed / "a.png"), tmp_path / "alias") == b"content"


def test_all_that_may_not_be_read_looks_as_if_it_were_not_there(
    allowed: Path, tmp_path: Path
) -> None:
    (allowed / "out.png").symlink_to(tmp_path / "secret.png")
    (allowed / "out").symlink_to(tmp_path)
    (allowed / "loop.png").symlink_to("loop.png")
    (allowed / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(allowed / "fifo.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(allowed / "socket.png"))
        answers = {
            refused(path, allowed)
            for path in (
                *("nothing.png", "inner/nothing.png", "a.png/b.png", "", ".", "..", "inner", "/"),
                *("../secret.png", str(tmp_path / "secret.png"), "inner/../../secret.png"),
                *(f"{allowed}-too/a.png", "../allowed-too/a.png", f"{allowed}/../secret.png"),
                *("out.png", "out/secret.png", "out/nothing.png", "loop.png", "a" * 300),
                *("zero.png", "fifo.png", "socket.png", "/dev/zero", "/dev/null", "/dev/stdin"),
                *("/proc/self/environ", "/proc/self/fd/0", "/proc/self/cwd/a.png", "/etc/passwd"),
                *("//etc/passwd", "/nothing/at/all", "~/x.png", "a\0.png"),
            )
        }
    assert len(answers) == 1
    [answer] = answers
    assert answer == f"{PARAM}: this names no file that may be read here"


def test_without_a_folder_no_file_is_read(allowed: Path) -> None:
    answers = {refused(str(allowed / "a.png"), None), refused("/nothing", None)}
    assert len(answers) == 1
    assert "no local files" in answers.pop()


def test_a_folder_that_is_gone_reads_nothing(tmp_path: Path) -> None:
    assert "no file that may be read" in refused("a.png", tmp_path / "gone")


@pytest.mark.parametrize("swapped", ["file", "folder"])
def test_a_link_that_is_swapped_in_after_the_check_is_not_followed(
    allowed: Path, tmp_path: Path, swapped: str
) -> None:
    (tmp_path / "b.png").write_bytes(b"secret")

    def swap() -> None:
        (allowed / "inner" / "b.png").unlink()
        if swapped == "file":
            (allowed / "inner" / "b.png").symlink_to(tmp_path / "b.png")
        else:
            (allowed / "inner").rmdir()
            (allowed / "inner").symlink_to(tmp_path)

    with pytest.raises(MediaRejected, match="no file that may be read"):
        open_file("inner/b.png", allowed, PARAM, LIMIT, between=swap)
    assert read("a.png", allowed) == b"content"


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_swapped_in_for_a_file_does_not_hang(allowed: Path, kind: str) -> None:
    def swap() -> None:
        (allowed / "a.png").unlink()
        if kind == "fifo":
            os.mkfifo(allowed / "a.png")
        else:
            (allowed / "a.png").symlink_to("/dev/zero")

    with pytest.raises(MediaRejected, match="no file that may be read"):
        open_file("a.png", allowed, PARAM, LIMIT, between=swap)


def test_size_is_limited_before_anything_is_read(allowed: Path) -> None:
    written(allowed / "limit.png", bytes(LIMIT))
    assert read("limit.png", allowed) == bytes(LIMIT)
    with (allowed / "large.png").open("wb") as file:
        file.truncate(1 << 40)  # sparse: reading it would take for ever
    assert f"{LIMIT} bytes" in refused("large.png", allowed)


def test_a_file_that_grows_or_shrinks_is_refused(allowed: Path) -> None:
    for change in (b"content and more", b"con"):
        written(allowed / "a.png", b"content")
        with open_file("a.png", allowed, PARAM, LIMIT) as file:
            num_bytes = file.num_bytes
            written(allowed / "a.png", change)
            with pytest.raises(MediaRejected, match="changed"):
                read_whole(file.fd, num_bytes, PARAM)


async def test_local_images_through_the_loader(allowed: Path) -> None:
    written(allowed / "a b.png", png(5, 4))
    async with loader(MediaSettings(allowed_local_path=allowed)) as made:
        for url in (f"file://{allowed}/a%20b.png", f"{allowed}/a b.png", "a b.png"):
            image = await load_image(made, url)
            assert (image.height, image.width, image.data) == (4, 5, png(5, 4))
        answers = set()
        for url in ("file:///etc/passwd", f"file://{allowed}/%2e%2e/secret.png", "file:///nothing"):
            with pytest.raises(MediaRejected) as caught:
                await made.load(MediaReference(url, PARAM), Rooms().claim, Rooms().drop)
            answers.add(str(caught.value))
        assert len(answers) == 1


async def test_a_file_system_that_hangs_does_not_hold_up_the_loop_and_its_rooms_go_later(
    allowed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, go_on = threading.Event(), threading.Event()
    real = os.preadv

    def slow(*arguments: object) -> int:
        hanging.set()
        assert go_on.wait(30)
        return real(*arguments)  # type: ignore[arg-type]

    header = {"x": {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}}
    written(allowed / "x.safetensors", safetensors(header, bytes(64)))
    monkeypatch.setattr(os, "preadv", slow)
    monkeypatch.setattr("trtllm_workers.media.work._GRACE_S", 0.05)
    rooms = Rooms()
    settings = MediaSettings(allowed_local_path=allowed, timeout_s=0.1)
    async with loader(settings) as made:
        with pytest.raises(MediaRejected, match="was not read within"):
            await load(made, "x.safetensors", rooms)
        # A thread may still write to the room, so it is not given back yet.
        assert hanging.is_set()
        assert len(rooms.open) == 1
        go_on.set()
        await asyncio.wait_for(rooms.dropped.wait(), 10)
        assert rooms.open == []
