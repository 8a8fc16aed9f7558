"""What the request plane costs: two processes, one connection, and the frames alone.

    .venv/bin/python -m benchmarks.request_plane            # all, on uvloop and on asyncio
    .venv/bin/python -m benchmarks.request_plane --loop uvloop --seconds 3

* ``one-way 32/tick``: messages of about 200 B, 32 sent in each loop iteration; messages/s and CPU µs
  a message at the sender and at the receiver.
* ``tokens 128/step``: one Tokens message of 128 plain tokens each loop iteration, from TokenBatch to
  a dict lookup and a call for each token; CPU µs a token at both ends.
* ``round trip``: one message to and fro at a time; µs at p50 and p99.
* ``64 in flight``: round trips/s with 64 of them always under way.
* ``frames``: encode and decode without a socket; µs a token at 128 tokens a frame.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
import timeit
from collections.abc import Awaitable, Callable, Coroutine
from multiprocessing.connection import Connection as Pipe
from typing import Any

import msgspec
import structlog
import uvloop

from trtllm_workers.errors import PeerLost
from trtllm_workers.planes.base import Peer
from trtllm_workers.planes.frames import Decoder, TokenBatch, columns, encode
from trtllm_workers.planes.mesh import TcpMesh, new_incarnation
from trtllm_workers.planes.messages import Drain, Message, Tokens
from trtllm_workers.types import Address, TokenChunk

SECRET = b"of the benchmark"
WORDS = "x" * 180
STREAMS = 128
_ECHO, _ASK, _END = "echo", "ask", "end"

Runner = Callable[[Coroutine[Any, Any, None]], None]


def runner(name: str) -> Runner:
    """Return what runs a coroutine on the loop of that name."""
    return uvloop.run if name == "uvloop" else asyncio.run


def far_end(loop: str, pipe: Pipe) -> None:
    """Run the other process: it counts messages, echoes those that ask for it, and reports its CPU."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))

    async def run() -> None:
        ended = asyncio.Event()
        counts = [0, 0]
        sinks = {stream: int for stream in range(STREAMS)}

        def on_message(peer: Peer, message: Message) -> None:
            if type(message) is Tokens:
                streams, tokens = columns(message)
                for stream, token in zip(streams, tokens, strict=True):
                    sinks[stream](token)
                counts[1] += len(streams)
                return
            reason = message.reason if isinstance(message, Drain) else ""
            if reason.startswith(_ECHO):
                peer.send(message)
            elif reason == _ASK:
                told = msgspec.json.encode([*counts, time.process_time()]).decode()
                peer.send(Drain(told))
            elif reason == _END:
                ended.set()
            else:
                counts[0] += 1

        mesh = TcpMesh(
            peer_id="far",
            incarnation=new_incarnation(),
            secret=SECRET,
            on_message=on_message,
            on_lost=lambda _peer, _error: ended.set(),
        )
        await mesh.start()
        pipe.send(msgspec.to_builtins(mesh.address))
        async with asyncio.timeout(600):
            await ended.wait()
        await mesh.close()

    runner(loop)(run())


class Near:
    """The measuring process."""

    def __init__(self, mesh: TcpMesh, peer: Peer) -> None:
        self.mesh = mesh
        self.peer = peer
        self.answered: Callable[[Drain], None] = lambda _drain: None

    async def far_state(self) -> tuple[int, int, float]:
        """Return (messages, tokens, CPU s) of the far end, once it has read what was sent before."""
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.answered = lambda drain: answer.set_result(drain.reason)
        self.peer.send(Drain(_ASK))
        async with asyncio.timeout(60):
            told = await answer
        return msgspec.json.decode(told, type=tuple[int, int, float])

    async def paced(self, seconds: float, step: Callable[[], None]) -> str:
        """Call ``step`` in each loop iteration while the peer keeps up; return the costs per unit."""
        before, cpu_s, start_s = await self.far_state(), time.process_time(), time.perf_counter()
        while time.perf_counter() - start_s < seconds:
            step()
            await asyncio.sleep(0)
            while self.peer.write_paused:  # noqa: ASYNC110 - the plane tells it by a property only
                await asyncio.sleep(0.001)
        sent_cpu_s = time.process_time() - cpu_s
        after = await self.far_state()
        wall_s = time.perf_counter() - start_s
        units = max(after[0] - before[0], after[1] - before[1])
        sent_us, received_us = sent_cpu_s / units * 1e6, (after[2] - before[2]) / units * 1e6
        return f"{units / wall_s / 1000:8.0f} k/s   CPU {sent_us:.2f} / {received_us:.2f} µs"


async def one_way(near: Near, seconds: float) -> str:
    """32 messages in each loop iteration."""
    message = Drain(WORDS)

    def step() -> None:
        for _ in range(32):
            near.peer.send(message)

    return await near.paced(seconds, step)


async def tokens(near: Near, seconds: float) -> str:
    """One engine step of 128 streams in each loop iteration."""
    batch = TokenBatch()
    chunks = [TokenChunk((stream * 100,)) for stream in range(STREAMS)]

    def step() -> None:
        for stream, chunk in enumerate(chunks):
            batch.add(stream, chunk)
        message = batch.take()
        if message is not None:
            near.peer.send(message)

    return await near.paced(seconds, step)


async def round_trips(near: Near, seconds: float) -> str:
    """One at a time."""
    loop = asyncio.get_running_loop()
    message = Drain(_ECHO + WORDS)
    times_us: list[float] = []
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        answer: asyncio.Future[None] = loop.create_future()
        near.answered = lambda _drain, answer=answer: answer.set_result(None)  # type: ignore[misc]  # bound per turn
        start_s = time.perf_counter()
        near.peer.send(message)
        await answer
        times_us.append((time.perf_counter() - start_s) * 1e6)
    cuts = statistics.quantiles(times_us, n=100)
    return f"p50 {cuts[49]:.0f} µs   p99 {cuts[98]:.0f} µs"


async def in_flight(near: Near, seconds: float) -> str:
    """64 at a time."""
    message = Drain(_ECHO + WORDS)
    count, under_way = 0, 64
    done = asyncio.Event()
    end_s = time.perf_counter() + seconds

    def again(_drain: Drain) -> None:
        nonlocal count, under_way
        count += 1
        if time.perf_counter() < end_s:
            near.peer.send(message)
        else:
            under_way -= 1
            if under_way == 0:
                done.set()

    near.answered = again
    start_s = time.perf_counter()
    for _ in range(64):
        near.peer.send(message)
    async with asyncio.timeout(seconds + 60):
        await done.wait()
    return f"{count / (time.perf_counter() - start_s) / 1000:8.0f} k/s"


ROWS: dict[str, Callable[[Near, float], Awaitable[str]]] = {
    "one-way 32/tick": one_way,
    "tokens 128/step": tokens,
    "round trip": round_trips,
    "64 in flight": in_flight,
}


async def near_end(loop: str, far: Address, seconds: float) -> None:
    """Connect to the far end and print every row."""
    near: Near | None = None
    ended = False

    def on_message(_peer: Peer, message: Message) -> None:
        if near is not None and isinstance(message, Drain):
            near.answered(message)

    def on_lost(_peer: Peer, error: PeerLost) -> None:
        if not ended:
            print(f"lost: {error}")

    mesh = TcpMesh(
        peer_id="near",
        incarnation=new_incarnation(),
        secret=SECRET,
        on_message=on_message,
        on_lost=on_lost,
    )
    await mesh.start()
    start_s = time.perf_counter()
    near = Near(mesh, await mesh.connect(far))
    print(f"{loop:8} {'connect':18} {(time.perf_counter() - start_s) * 1000:.1f} ms")
    for name, row in ROWS.items():
        print(f"{loop:8} {name:18} {await row(near, seconds)}")
    ended = True
    near.peer.send(Drain(_END))
    await mesh.close()


def frames() -> None:
    """Print the costs of encoding and decoding."""
    batch, decoder = TokenBatch(), Decoder()
    chunks = [TokenChunk((stream * 100,)) for stream in range(STREAMS)]
    sinks = {stream: int for stream in range(STREAMS)}

    def make() -> bytes:
        for stream, chunk in enumerate(chunks):
            batch.add(stream, chunk)
        message = batch.take()
        return encode(message) if message is not None else b""

    frame = make()

    def read() -> None:
        for message in decoder.feed(frame):
            if type(message) is Tokens:
                for stream, token in zip(*columns(message), strict=True):
                    sinks[stream](token)

    for name, call in (("encode", make), ("decode and demux", read)):
        best_s = min(timeit.repeat(call, number=1000, repeat=7)) / 1000
        size = len(frame) / STREAMS
        print(f"frames   {name:18} {best_s / STREAMS * 1e6:.3f} µs a token, {size:.1f} B")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--loop", choices=["uvloop", "asyncio", "both"], default="both")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    frames()
    spawn = multiprocessing.get_context("spawn")
    for loop in ("uvloop", "asyncio") if options.loop == "both" else (options.loop,):
        ours, theirs = spawn.Pipe()
        far = spawn.Process(target=far_end, args=(loop, theirs))
        far.start()
        try:
            if not ours.poll(30):
                raise SystemExit("the far end did not start within 30 s")
            address = msgspec.convert(ours.recv(), Address)
            runner(loop)(near_end(loop, address, options.seconds))
            far.join(10)
        finally:
            far.kill()
            far.join()


if __name__ == "__main__":
    main()
