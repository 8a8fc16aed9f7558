"""Workers that do as they are told, and the plane and discovery they are on."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tests.unit.ingress.checkpoints import REPLY_TO, record
from trtllm_workers.errors import PeerLost
from trtllm_workers.planes.base import OnLost, OnMessage, Peer
from trtllm_workers.planes.messages import Abort, Message, Submit, Tokens
from trtllm_workers.types import Address, FinishReason, TokenChunk, WorkerRecord

Script = Callable[["FakeWorker", Submit], None]


class FakeWorker:
    """A worker at the far end of a FakePlane. ``script`` is called with every Submit."""

    def __init__(self, record: WorkerRecord, script: Script | None = None) -> None:
        self.record = record
        self.script = script
        self.submits: list[Submit] = []
        self.aborted: list[int] = []
        self.changed = asyncio.Event()
        self.peer: FakePeer | None = None
        self.refuse_connections = False
        self.plane: FakePlane | None = None

    def on_message(self, message: Message) -> None:
        if isinstance(message, Submit):
            self.submits.append(message)
            if self.script is not None:
                asyncio.get_running_loop().call_soon(self.script, self, message)
        elif isinstance(message, Abort):
            self.aborted += message.streams
        self.changed.set()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until something arrived that makes ``condition`` true."""
        async with asyncio.timeout(5):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def until_submits(self, count: int) -> None:
        """Wait until ``count`` requests have come."""
        await self.until(lambda: len(self.submits) >= count)

    def say(self, message: Message) -> None:
        plane, peer = self._connected()
        plane.on_message(peer, message)

    def token(self, stream: int, token_id: int) -> None:
        """Send one bare token, in columns."""
        self.say(Tokens(array("I", [stream]).tobytes(), array("I", [token_id]).tobytes(), []))

    def chunk(self, stream: int, token_ids: Sequence[int] = (), **fields: Any) -> None:
        self.say(Tokens(b"", b"", [(stream, TokenChunk(token_ids=tuple(token_ids), **fields))]))

    def end(self, stream: int, reason: FinishReason = FinishReason.STOP, **fields: Any) -> None:
        self.chunk(stream, (), finish_reason=reason, **fields)

    def answer(self, submit: Submit, token_ids: Sequence[int], **fields: Any) -> None:
        """Send a whole answer: a first chunk, bare tokens, an end."""
        limit = submit.request.sampling.max_tokens
        token_ids = token_ids[:limit]
        if token_ids:
            self.chunk(submit.stream, token_ids[:1], cached_tokens=fields.pop("cached_tokens", 0))
        for token_id in token_ids[1:]:
            self.token(submit.stream, token_id)
        if len(token_ids) == limit:
            self.end(submit.stream, FinishReason.LENGTH)
        else:
            self.end(submit.stream, **{"num_hidden_tokens": 1, **fields})

    def lose(self, reason: str = "connection reset") -> None:
        """End the connection, as a process that was killed does."""
        plane, peer = self._connected()
        self.peer = None
        peer.alive = False
        plane.on_lost(peer, PeerLost(reason))

    def _connected(self) -> tuple[FakePlane, FakePeer]:
        assert self.plane is not None
        assert self.peer is not None, "the ingress has connected"
        return self.plane, self.peer


def says(tokenizer: Tokenizer, text: str, **fields: Any) -> Script:
    """Return a script that answers every request with ``text``."""
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids

    def script(worker: FakeWorker, submit: Submit) -> None:
        worker.answer(submit, token_ids, **fields)

    return script


class FakePeer:
    """The ingress's end of a connection to a FakeWorker."""

    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker
        self.address = worker.record.address
        self.write_paused = False
        self.alive = True

    def send(self, message: Message) -> None:
        if not self.alive:
            raise PeerLost(f"{self.address} is gone")
        self._worker.on_message(message)


class FakePlane:
    """A request plane whose other ends are FakeWorkers."""

    def __init__(self, on_message: OnMessage, on_lost: OnLost) -> None:
        self.on_message = on_message
        self.on_lost = on_lost
        self.address = REPLY_TO
        self.workers: dict[Address, FakeWorker] = {}

    def add(self, worker: FakeWorker) -> FakeWorker:
        worker.plane = self
        self.workers[worker.record.address] = worker
        return worker

    async def start(self) -> None:
        return

    async def connect(self, address: Address, timeout_s: float = 5.0) -> Peer:
        worker = self.workers.get(address)
        if worker is None or worker.refuse_connections:
            raise PeerLost(f"nobody answers at {address}")
        if worker.peer is None:
            worker.peer = FakePeer(worker)
        return worker.peer

    def peer(self, address: Address) -> Peer | None:
        worker = self.workers.get(address)
        return worker.peer if worker is not None else None

    def peers(self) -> Sequence[Peer]:
        return [worker.peer for worker in self.workers.values() if worker.peer is not None]

    async def close(self) -> None:
        self.workers.clear()


class FakeDiscovery:
    """A discovery whose records the test sets."""

    def __init__(self) -> None:
        self._records: tuple[WorkerRecord, ...] = ()
        self._changed = asyncio.Event()
        self._changed.set()
        self._failing = False
        self._failures = 0
        self.failed_twice = asyncio.Event()

    def show(self, *records: WorkerRecord) -> None:
        self._records = records
        self._changed.set()

    def fail(self) -> None:
        """End the running watch with an error."""
        self._failing = True
        self._changed.set()

    async def watch(self) -> AsyncIterator[tuple[WorkerRecord, ...]]:
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._failing:
                self._changed.set()
                self._failures += 1
                if self._failures == 2:
                    self.failed_twice.set()
                raise OSError("stale file handle")
            yield self._records

    async def register(self, record: WorkerRecord) -> Any:
        raise AssertionError("an ingress registers nothing")

    async def close(self) -> None:
        return


def fakes(checkpoint: Path, count: int = 2, **info: Any) -> list[FakeWorker]:
    return [FakeWorker(record(checkpoint, f"w{at}", **info)) for at in range(count)]


async def began(*workers: FakeWorker) -> tuple[FakeWorker, FakeWorker, Submit]:
    """Return the worker that got a request, another one, and what it got."""
    async with asyncio.timeout(5):
        while not any(worker.submits for worker in workers):
            waits = [asyncio.create_task(worker.changed.wait()) for worker in workers]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
    used = next(worker for worker in workers if worker.submits)
    other = next((worker for worker in workers if worker is not used), used)
    return used, other, used.submits[0]
