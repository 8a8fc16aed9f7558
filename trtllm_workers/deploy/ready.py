"""The readiness ladder: how far each process has come, which step is stuck, one token at the end.

::

    process started ─▶ starting ─▶ model n % ─▶ registering ─▶ registered ┐
                       (a decode worker: … ─▶ registering ─▶ pairing ─▶ registered)
    process started ─▶ starting ─▶ listening ─────────────────────────────┴▶ one-token probe

Knows how processes report (observe/status.py) and no process itself.
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from trtllm_workers.deploy.names import ETCD, NATS
from trtllm_workers.errors import StartError
from trtllm_workers.observe.status import Status, read_status

PROBE = "one-token probe"
IMAGE_PROBE = "one-token probe with an image"
_PROBE_SIDE = 64  # pixels

# Status files are looked at rather than watched: inotify handles run out on shared machines and
# see nothing on network file systems. A start lasts seconds; afterwards nobody looks.
_LOOK_INTERVAL_S = 0.05
_STILL_WAITING_S = 15.0
_SMALLEST_SHOWN_ADVANCE = 0.1
_ATTEMPT_TIMEOUT_S = 30.0
_RETRY_S = 0.1
_MAX_ANSWER_BYTES = 256 * 1024

_LAST_STEP = {"ingress": "listening", NATS: "listening", ETCD: "listening"}


@dataclass(slots=True)
class _Rung:
    role: str
    text: str
    since_s: float
    told_s: float
    step: str = ""
    done: float | None = None
    ready: bool = False
    detail: str = ""


class Ladder:
    """What is known of each process's way to readiness. Pure: the caller brings time and reports."""

    def __init__(self, roles: Mapping[str, str], now_s: float) -> None:
        self._rungs = {
            name: _Rung(role, "process started", now_s, now_s) for name, role in roles.items()
        }

    @property
    def ready(self) -> bool:
        """Whether every process has reached its last step."""
        return all(rung.ready for rung in self._rungs.values())

    def step(self, name: str) -> str:
        """Return the step a process has come to, in words."""
        return self._rungs[name].text

    def detail(self, name: str) -> str:
        """Return what the process said with its step."""
        return self._rungs[name].detail

    def hopeless(self, name: str, status: Status | None) -> str | None:
        """Return why a decode worker will never be ready: every prefill worker is refused."""
        if status is None or self._rungs[name].ready:
            return None
        num_prefills = sum(rung.role == "prefill" for rung in self._rungs.values())
        refused = [pair for pair in status.pairs if pair.state in ("refused", "mismatch")]
        if not refused or len(refused) < num_prefills:
            return None
        return "; ".join(f"{one.peer}: {one.state}: {one.reason}" for one in refused)

    def observe(self, name: str, status: Status | None, now_s: float) -> str | None:
        """Take a report; return the step in words when it is worth a line."""
        rung = self._rungs[name]
        if status is None:
            return None
        text = step_in_words(status)
        if text == rung.text:
            return None
        new_step = status.step != rung.step or status.detail != rung.detail
        advance = (status.done or 0.0) - (rung.done or 0.0)
        rung.step, rung.text, rung.since_s, rung.detail = status.step, text, now_s, status.detail
        rung.ready = status.step == _LAST_STEP.get(rung.role, "registered")
        if not new_step and advance < _SMALLEST_SHOWN_ADVANCE and status.done != 1.0:
            return None
        rung.done = status.done
        rung.told_s = now_s
        return text

    def waiting(self, now_s: float) -> list[str]:
        """Return a line for each process that has been silent for 15 s and is not ready."""
        lines = []
        for name, rung in self._rungs.items():
            if not rung.ready and now_s - rung.told_s >= _STILL_WAITING_S:
                rung.told_s = now_s
                lines.append(
                    f"still waiting for {name}: {rung.text} (since {now_s - rung.since_s:.0f} s)"
                )
        return lines

    def stuck(self, now_s: float) -> tuple[str, str, float]:
        """Return (name, step, seconds without advance) of what has stood still longest."""
        name, rung = min(
            ((name, rung) for name, rung in self._rungs.items() if not rung.ready),
            key=lambda pair: pair[1].since_s,
        )
        return name, rung.text, now_s - rung.since_s


def reachable(url: str) -> str:
    """Return a URL that works on this machine for one that says "every address"."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def step_in_words(status: Status) -> str:
    """Return a report for people: ``model 60 %``, ``listening on http://…``."""
    if status.step == "listening" and status.detail:
        return f"listening on {status.detail}"
    if status.done is not None:
        return f"{status.step} {status.done * 100:.0f} %"
    return f"{status.step}: {status.detail}" if status.detail else status.step


async def climb(
    ladder: Ladder,
    status_files: Mapping[str, Path],
    show: Callable[[str, str], None],
    read: Callable[[Path], Status | None] = read_status,
) -> None:
    """Return once every process is ready; ``show(name, step)`` is told of each advance.

    Has no deadline of its own: the caller sets one and asks ``ladder.stuck``.
    """
    clock = asyncio.get_running_loop().time
    while True:
        for name, path in status_files.items():
            status = read(path)
            if line := ladder.observe(name, status, clock()):
                show(name, line)
            if why := ladder.hopeless(name, status):
                raise StartError(f"{name} has no prefill worker that fits: {why}")
        if ladder.ready:
            return
        for line in ladder.waiting(clock()):
            show("", line)
        await asyncio.sleep(_LOOK_INTERVAL_S)


async def probe(url: str, model: str, on_trouble: Callable[[str], None]) -> None:
    """Ask the model for one token through the real HTTP port, until it answers.

    "Not there yet" (connection refused, 404, 429, 503) is tried again, and ``on_trouble`` is told
    each time; any other answer raises StartError with what the ingress said. No deadline of its own.
    """
    body = {"model": model, "prompt": "Hello", "max_tokens": 1}
    refused = await _until_answered(f"{url}/v1/completions", body, PROBE, model, on_trouble)
    if refused:
        raise StartError(f"the {PROBE} of model '{model}' failed: {refused}")


async def probe_image(url: str, model: str, on_trouble: Callable[[str], None]) -> str:
    """Ask for one token about a small image, until there is an answer; see ``probe``.

    So the whole chain of an image is up, encode workers included. Returns why the model takes no image
    after all, "" when it does.
    """
    reference = {"type": "image_url", "image_url": {"url": _grey_square()}}
    message = {"role": "user", "content": [reference, {"type": "text", "text": "Hello"}]}
    body = {"model": model, "messages": [message], "max_tokens": 1}
    return await _until_answered(f"{url}/v1/chat/completions", body, IMAGE_PROBE, model, on_trouble)


async def _until_answered(
    url: str, body: object, what: str, model: str, on_trouble: Callable[[str], None]
) -> str:
    """POST until the answer is good ("") or a refusal that will not change (its words)."""
    while True:
        try:
            status, answer = await asyncio.wait_for(_post(url, body), _ATTEMPT_TIMEOUT_S)
        except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError) as wrong:
            on_trouble(str(wrong) or f"no answer within {_ATTEMPT_TIMEOUT_S:.0f} s")
        else:
            if status == 200:
                return ""
            said = f"HTTP {status}: {_message_of(answer)}"
            if status not in (404, 429, 503):
                if status < 500:
                    return said
                raise StartError(f"the {what} of model '{model}' failed: {said}")
            on_trouble(said)
        await asyncio.sleep(_RETRY_S)


def _grey_square() -> str:
    """Return a small PNG as a ``data:`` URL; PNG: https://www.w3.org/TR/png/."""
    row = b"\0" + b"\x80" * 3 * _PROBE_SIDE
    chunks = (
        (b"IHDR", struct.pack(">2I5B", _PROBE_SIDE, _PROBE_SIDE, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(row * _PROBE_SIDE)),
        (b"IEND", b""),
    )
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


async def _post(url: str, content: object) -> tuple[int, bytes]:
    """POST JSON and return (HTTP status, body). No HTTP library: they load slowly."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        body = json.dumps(content).encode()
        head = (
            f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status_line = await reader.readline()
        status = int(status_line.split()[1]) if status_line.count(b" ") else 0
        if not status:
            raise ValueError("the ingress closed the connection without an answer")
        answer = b""
        while len(answer) < _MAX_ANSWER_BYTES and (piece := await reader.read(_MAX_ANSWER_BYTES)):
            answer += piece
        return status, answer.partition(b"\r\n\r\n")[2]
    finally:
        writer.close()


def _message_of(body: bytes) -> str:
    """Return the message of an OpenAI-shaped error, or the beginning of what came instead."""
    try:
        # The body may come in chunks, with a length before and after; the JSON is in between.
        return str(json.loads(body[body.find(b"{") : body.rfind(b"}") + 1])["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace").strip() or "(empty answer)"
