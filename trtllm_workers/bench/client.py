"""The load: requests in a closed or an open loop over kept connections. Judges no answer.

One event loop in one process. A chunk costs it a few microseconds (benchmarks/README.md), so it keeps up
with any one ingress; ``cpu_share`` of a level says how close it came to its limit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from trtllm_workers.bench.answer import Answer
from trtllm_workers.bench.connection import Connection, Target, connect
from trtllm_workers.bench.records import Record

CHAT = "/v1/chat/completions"


class Client:
    """Owns its connections; leaving the context closes them."""

    def __init__(self, target: Target, *, timeout_s: float) -> None:
        self.target = target
        self._timeout_s = timeout_s
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        for connection in (*self._idle, *self._busy):
            connection.close()
        self._idle.clear()

    async def fetch(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Ask something small and return status and body. Raises OSError when nobody answers."""
        answer = Answer(Record(index=0), time.perf_counter())
        trouble = await self._exchange(self.target.request(method, path, body), answer)
        if trouble:
            raise OSError(trouble)
        return answer.status, bytes(answer.body)

    async def closed_loop(self, bodies: Sequence[bytes], concurrency: int) -> list[Record]:
        """Keep ``concurrency`` requests under way until all were asked; return them in order."""
        records: list[Record] = []
        began_s = time.perf_counter()

        async def stream() -> None:
            while len(records) < len(bodies):
                record = Record(index=len(records))
                records.append(record)
                record.start_s = record.intended_s = time.perf_counter() - began_s
                await self._ask(bodies[record.index], record, began_s)

        async with asyncio.TaskGroup() as streams:
            for _ in range(min(concurrency, len(bodies))):
                streams.create_task(stream())
        return records

    async def open_loop(self, bodies: Sequence[bytes], times_s: Sequence[float]) -> list[Record]:
        """Start each request at its time, however many are under way; return them in order."""
        records = [Record(index=index, intended_s=at_s) for index, at_s in enumerate(times_s)]
        began_s = time.perf_counter()

        async def request(record: Record) -> None:
            record.start_s = time.perf_counter() - began_s
            await self._ask(bodies[record.index], record, began_s)

        async with asyncio.TaskGroup() as requests:
            for record in records:
                early_s = record.intended_s - (time.perf_counter() - began_s)
                if early_s > 0:
                    await asyncio.sleep(early_s)
                requests.create_task(request(record))
        return records

    async def texts(self, bodies: Sequence[bytes]) -> list[Record]:
        """Ask one after the other, keeping what was answered."""
        records = []
        for index, body in enumerate(bodies):
            began_s = time.perf_counter()
            records.append(Record(index=index))
            await self._ask(body, records[-1], began_s, keep_text=True)
        return records

    async def _ask(
        self, body: bytes, record: Record, began_s: float, *, keep_text: bool = False
    ) -> None:
        answer = Answer(record, began_s, keep_text=keep_text)
        try:
            trouble = await self._exchange(self.target.request("POST", CHAT, body), answer)
        except OSError as wrong:
            trouble = f"no connection: {wrong.strerror or wrong}"
        if trouble:
            record.problem = record.problem or trouble
            record.end_s = time.perf_counter() - began_s

    async def _exchange(self, request: bytes, answer: Answer) -> str:
        """Return what kept the answer from coming whole, or ""."""
        connection: Connection | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    reused = self._take_idle()
                    connection = reused or await connect(self.target)
                    self._busy.add(connection)
                    trouble = await connection.ask(request, answer)
                    self._give_back(connection)
                    # A server may close a kept connection just when it is used again; that is no
                    # answer to this request.
                    if not trouble or reused is None or connection.num_received:
                        return trouble
        except TimeoutError:
            return f"no whole answer within {self._timeout_s:g} s"
        finally:
            if connection is not None and connection in self._busy:
                self._busy.discard(connection)
                connection.close()

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.alive:
                return connection
        return None

    def _give_back(self, connection: Connection) -> None:
        self._busy.discard(connection)
        if connection.alive:
            self._idle.append(connection)
        else:
            connection.close()
