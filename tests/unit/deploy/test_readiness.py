"""The readiness ladder on a clock of our own, and the probe against a real socket."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from PIL import Image

from trtllm_workers.deploy.ready import Ladder, climb, probe, probe_image, reachable
from trtllm_workers.errors import StartError
from trtllm_workers.observe.status import Status, StatusFile, read_status

ROLES = {"worker-0": "aggregated", "ingress": "ingress"}


def said(step: str, done: float | None = None, detail: str = "") -> Status:
    return Status(step=step, since=0.0, done=done, detail=detail)


def test_ladder_shows_each_step_and_tenths_of_the_model() -> None:
    ladder = Ladder(ROLES, now_s=0.0)
    shown = [
        ladder.observe("worker-0", status, now_s=1.0)
        for status in (
            None,
            said("starting"),
            said("starting"),
            said("model", 0.0),
            said("model", 0.05),
            said("model", 0.12),
            said("model", 0.15),
            said("model", 1.0),
            said("registering"),
            said("registered"),
        )
    ]
    assert [line for line in shown if line] == [
        "starting",
        "model 0 %",
        "model 12 %",
        "model 100 %",
        "registering",
        "registered",
    ]


def test_ladder_is_ready_when_every_process_reached_its_own_last_step() -> None:
    ladder = Ladder(ROLES, now_s=0.0)
    ladder.observe("worker-0", said("registered"), 1.0)
    assert not ladder.ready
    ladder.observe("ingress", said("listening", detail="http://127.0.0.1:1"), 1.0)
    assert ladder.ready
    assert ladder.detail("ingress") == "http://127.0.0.1:1"


def test_decode_worker_shows_what_it_lacks_for_a_pair() -> None:
    ladder = Ladder({"decode-0": "decode"}, now_s=0.0)
    shown = [
        ladder.observe("decode-0", status, now_s=at)
        for at, status in (
            (1.0, said("registering")),
            (2.0, said("pairing", detail="no prefill worker yet")),
            (3.0, said("pairing", detail="no prefill worker yet")),
            (4.0, said("pairing", detail="prefill-0: checking")),
        )
    ]
    assert [line for line in shown if line] == [
        "registering",
        "pairing: no prefill worker yet",
        "pairing: prefill-0: checking",
    ]
    assert ladder.stuck(10.0) == ("decode-0", "pairing: prefill-0: checking", 6.0)
    ladder.observe("decode-0", said("registered"), 11.0)
    assert ladder.ready


def test_ladder_says_what_it_still_waits_for_every_15_s() -> None:
    ladder = Ladder({"worker-0": "aggregated"}, now_s=0.0)
    ladder.observe("worker-0", said("model", 0.6), 2.0)
    assert ladder.waiting(16.9) == []
    assert ladder.waiting(18.0) == ["still waiting for worker-0: model 60 % (since 16 s)"]
    assert ladder.waiting(18.1) == []
    assert ladder.waiting(33.0) == ["still waiting for worker-0: model 60 % (since 31 s)"]


def test_stuck_names_what_stood_still_longest_and_is_not_ready() -> None:
    ladder = Ladder({"worker-0": "aggregated", "worker-1": "aggregated", "ingress": "ingress"}, 0.0)
    ladder.observe("ingress", said("listening"), 1.0)
    ladder.observe("worker-1", said("model", 0.6), 5.0)
    ladder.observe("worker-0", said("model", 0.9), 40.0)
    assert ladder.stuck(47.0) == ("worker-1", "model 60 %", 42.0)


async def test_climb_reads_the_status_files(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.json" for name in ROLES}
    StatusFile(files["worker-0"]).report("registered")
    StatusFile(files["ingress"]).report("listening", detail="http://127.0.0.1:1")
    shown: list[tuple[str, str]] = []
    ladder = Ladder(ROLES, asyncio.get_running_loop().time())
    await asyncio.wait_for(climb(ladder, files, lambda *line: shown.append(line)), 5.0)
    assert ("worker-0", "registered") in shown


def test_status_file_keeps_since_within_a_step_and_drops_tiny_advances(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    status = StatusFile(path)
    status.report("model", done=0.0)
    began = read_status(path)
    status.report("model", done=0.001)
    assert read_status(path) == began
    status.report("model", done=0.5)
    half = read_status(path)
    assert began is not None
    assert half is not None
    assert (half.done, half.since) == (0.5, began.since)
    status.report("model", done=1.0)
    finished = read_status(path)
    assert finished is not None
    assert finished.done == 1.0


def test_status_that_cannot_be_written_harms_nobody(tmp_path: Path) -> None:
    StatusFile(tmp_path / "gone" / "s.json").report("starting")
    StatusFile(None).report("starting")
    (tmp_path / "broken.json").write_text('{"step": ')
    assert read_status(tmp_path / "broken.json") is None


@asynccontextmanager
async def answering(*answers: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Serve the answers one connection after the other; the last one again and again."""
    left = list(answers)
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        assert length
        asked.append(head + await reader.readexactly(int(length[1])))
        writer.write(left.pop(0) if len(left) > 1 else left[0])
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked


def http(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


async def test_probe_tries_again_until_the_model_answers() -> None:
    not_yet = http(404, b'{"error": {"message": "no model here yet"}}')
    heard: list[str] = []
    async with answering(not_yet, b"", http(200, b"{}")) as (url, asked):
        await asyncio.wait_for(probe(url, "my model", heard.append), 10.0)
    assert heard == [
        "HTTP 404: no model here yet",
        "the ingress closed the connection without an answer",
    ]
    assert b'"model": "my model"' in asked[0]
    assert b'"max_tokens": 1' in asked[0]


async def test_probe_gives_up_on_an_answer_that_will_not_change() -> None:
    head = b"HTTP/1.1 400 X\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked = head + b'2b\r\n{"error": {"message": "bad prompt"}}\r\n0\r\n\r\n'
    async with answering(chunked) as (url, _):
        with pytest.raises(StartError, match="model 'm' failed: HTTP 400: bad prompt"):
            await asyncio.wait_for(probe(url, "m", lambda _: None), 10.0)


async def test_the_probe_with_an_image_waits_for_encode_workers() -> None:
    not_yet = http(503, b'{"error": {"message": "no encode worker is ready"}}')
    heard: list[str] = []
    async with answering(not_yet, http(200, b"{}")) as (url, asked):
        assert not await asyncio.wait_for(probe_image(url, "seer", heard.append), 10.0)
    assert heard == ["HTTP 503: no encode worker is ready"]
    sent = json.loads(asked[-1].partition(b"\r\n\r\n")[2])
    url_of_image = sent["messages"][0]["content"][0]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url_of_image.partition(",")[2])))
    image.load()
    assert (image.size, image.mode) == ((64, 64), "RGB")


async def test_a_model_that_takes_no_images_after_all_is_told() -> None:
    refusal = http(400, b'{"error": {"message": "its template has no place for images"}}')
    async with answering(refusal) as (url, _):
        said = await asyncio.wait_for(probe_image(url, "m", lambda _: None), 10.0)
    assert said == "HTTP 400: its template has no place for images"


@pytest.mark.parametrize(
    ("said_url", "url"),
    [
        ("http://0.0.0.0:80", "http://127.0.0.1:80"),
        ("http://[::]:80", "http://[::1]:80"),
        ("http://10.0.0.1:80", "http://10.0.0.1:80"),
    ],
)
def test_reachable_replaces_every_address_by_loopback(said_url: str, url: str) -> None:
    assert reachable(said_url) == url
