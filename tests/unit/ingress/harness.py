"""What the ingress tests stand on: small checkpoints, and workers that do as they are told."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from trtllm_workers.errors import PeerLost
from trtllm_workers.ingress.fleet import Fleet
from trtllm_workers.ingress.parts import Ingress
from trtllm_workers.ingress.ports import listen
from trtllm_workers.ingress.serve import HttpServer
from trtllm_workers.ingress.settings import IngressSettings
from trtllm_workers.observe.metrics import Metrics
from trtllm_workers.planes.base import OnLost, OnMessage, Peer
from trtllm_workers.planes.messages import Abort, Message, Submit, Tokens
from trtllm_workers.types import (
    Address,
    EngineInfo,
    FinishReason,
    Role,
    TokenChunk,
    WorkerRecord,
)

CORPUS = [
    "Hello world, how are you today? I am fine, thank you very much.",
    "The quick brown fox jumps over the lazy dog. STOP here and there.",
    "日本語のテキスト、中文字符 한국어 텍스트 🎉🎊👩‍👩‍👧 naïve café",
    "def f(x):\n    return {'a': [1, 2]}\n",
] * 8
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CAPABILITIES = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "logprobs",
    "logit_bias",
)
MODEL = "test/tiny"
REPLY_TO = Address("127.0.0.1", 1, "ingress", "i1")


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """A Llama-2-like one: metaspace, byte fallback, a leading space that decoding strips."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS[:2] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    # The byte tokens are ordinary ones: only the first three are special.
    written = json.loads(tokenizer.to_str())
    written["added_tokens"] = [one for one in written["added_tokens"] if one["id"] < 3]
    return Tokenizer.from_str(json.dumps(written))


def write_checkpoint(
    folder: Path, tokenizer: Tokenizer | None = None, chat_template: str | None = CHATML
) -> Path:
    """Write what the ingress reads of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (tokenizer or byte_level_tokenizer()).save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def engine_info(folder: Path, **changes: Any) -> EngineInfo:
    values: dict[str, Any] = {
        "engine": "fake",
        "model_path": str(folder),
        "model_id": "tiny",
        "block_size": 16,
        "num_blocks": 64,
        "max_seq_len": 512,
        "max_batch_size": 8,
        "max_num_tokens": 512,
        "vocab_size": 400,
        "capabilities": CAPABILITIES,
    }
    return EngineInfo(**{**values, **changes})


def record(folder: Path, worker_id: str = "w0", model: str = MODEL, **info: Any) -> WorkerRecord:
    return WorkerRecord(
        worker_id=worker_id,
        model=model,
        role=Role.AGGREGATED,
        address=Address("127.0.0.1", 2, worker_id, "1"),
        engine=engine_info(folder, **info),
        started_at_s=1_700_000_000.0,
    )


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


class Call:
    """One POST over plain ASGI whose answer can be watched while it grows."""

    def __init__(self, app: Any, path: str, body: bytes) -> None:
        self._app = app
        self._scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        self._body: list[bytes] = [body]
        self.left = asyncio.Event()
        self._grown = asyncio.Event()
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.content = b""
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        await self._app(self._scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], message["headers"]
        else:
            self.content += message.get("body", b"")
        self._grown.set()

    async def until(self, text: str) -> None:
        """Wait until ``text`` has arrived."""
        async with asyncio.timeout(5):
            while text.encode() not in self.content:
                self._grown.clear()
                await self._grown.wait()

    async def result(self) -> httpx.Response:
        """Wait for the end of the response."""
        await asyncio.wait_for(self._task, 5)
        return httpx.Response(self.status, headers=self.headers, content=self.content)


class Stage:
    """A running ingress with fake workers, and a client that speaks ASGI to it."""

    def __init__(
        self,
        ingress: Ingress,
        plane: FakePlane,
        discovery: FakeDiscovery,
        app: Any,
        settings: IngressSettings,
    ) -> None:
        self.settings = settings
        self.server: HttpServer | None = None
        self.ingress = ingress
        self.plane = plane
        self.discovery = discovery
        self.app = app
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=20)

    @property
    def fleet(self) -> Fleet:
        assert self.ingress.fleet is not None
        return self.ingress.fleet

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until a change of the fleet makes ``condition`` true."""
        async with asyncio.timeout(10):
            while not condition():
                self.fleet.changed.clear()
                await self.fleet.changed.wait()

    async def until_ready(self, *models: str) -> None:
        models = models or (MODEL,)
        known = self.fleet.models
        await self.until(lambda: all(name in known and known[name].ready for name in models))

    async def chat(self, text: str = "Hi", **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        return await self.client.post(
            "/v1/chat/completions", json={"model": MODEL, "messages": messages, **fields}
        )

    def call(self, **fields: Any) -> Call:
        """Begin a streamed chat that can be watched."""
        messages = [{"role": "user", "content": "Hi"}]
        body = {"model": MODEL, "messages": messages, "stream": True, **fields}
        return Call(self.app, "/v1/chat/completions", json.dumps(body).encode())

    async def complete(self, prompt: Any = "Hi", **fields: Any) -> httpx.Response:
        return await self.client.post(
            "/v1/completions", json={"model": MODEL, "prompt": prompt, **fields}
        )


@asynccontextmanager
async def stage(*workers: FakeWorker, ready: bool = True, **settings: Any) -> AsyncIterator[Stage]:
    """Run an ingress over ``workers``."""
    told = IngressSettings(discovery="none:", secret=b"s", **settings)
    ingress = Ingress(told, Metrics(process=False))
    plane = FakePlane(ingress.on_message, ingress.on_lost)
    for worker in workers:
        plane.add(worker)
    discovery = FakeDiscovery()
    async with ingress.running(plane, discovery) as app:
        discovery.show(*(worker.record for worker in workers))
        playing = Stage(ingress, plane, discovery, app, told)
        async with playing.client:
            if ready:
                await playing.until_ready(*{worker.record.model for worker in workers})
            yield playing


def events(response: httpx.Response) -> list[Any]:
    """Return the JSON of every server-sent event, "[DONE]" as such."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines), response.text
    said = [line.removeprefix("data: ") for line in lines]
    return [one if one == "[DONE]" else json.loads(one) for one in said]


@asynccontextmanager
async def http_stage(*workers: FakeWorker, **settings: Any) -> AsyncIterator[tuple[Stage, int]]:
    """Run an ingress over ``workers`` behind a real HTTP server; yields the stage and the port."""
    async with stage(*workers, **settings) as playing:
        listening = asyncio.Event()
        sock = listen("127.0.0.1", 0)
        port = sock.getsockname()[1]
        server = HttpServer(playing.app, playing.settings, listening.set)
        playing.server = server
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            await asyncio.wait_for(listening.wait(), 5)
            yield playing, port
        finally:
            server.should_exit = True
            for connection in list(server.server_state.connections):
                connection.transport.abort()
            await asyncio.wait_for(serving, 10)
            sock.close()
