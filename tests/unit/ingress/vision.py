"""A checkpoint whose template takes images, and workers that make items of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from tests.unit.ingress.checkpoints import MODEL, byte_level_tokenizer, write_checkpoint
from tests.unit.ingress.fakes import FakeWorker
from tests.unit.ingress.roles import Worker
from tests.unit.ingress.stage import Call, Stage
from trtllm_workers.planes.media_messages import EncodeAsk, Encoded, EncodeDone, EncodeFailed
from trtllm_workers.planes.messages import Message
from trtllm_workers.types import Address, MediaItem, Role, VisionInfo

PLACEHOLDER = "<image>"
PARTS_ONLY = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BOTH = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CAT, DOG = "http://images.test/cat.png", "file:///data/dog.pt"


def vision_tokenizer() -> Tokenizer:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens([AddedToken(PLACEHOLDER, special=True)])
    return tokenizer


def vision_checkpoint(folder: Path, template: str | None = PARTS_ONLY) -> Path:
    return write_checkpoint(folder, vision_tokenizer(), template)


def vision_info(**changes: Any) -> VisionInfo:
    values: dict[str, Any] = {
        "family": "llava",
        "image_token_id": vision_tokenizer().token_to_id(PLACEHOLDER),
        "placeholder": PLACEHOLDER,
        "hidden_size": 8,
        "dtype": "float32",
    }
    return VisionInfo(**{**values, **changes})


def item(
    url: str, holder: Address, index: int = 0, num_tokens: int = 3, **fields: Any
) -> MediaItem:
    digest = blake2b(f"{url} {index}".encode(), digest_size=16).digest()
    return MediaItem(digest, 0, num_tokens, holder=holder, num_bytes=num_tokens * 32, **fields)


class Seer(Worker):
    """A fake worker that encodes: at once, or with ``waits`` when told to.

    A URL that ends with ``#N`` holds N images. ``refuses`` answers every ask with an error (code, message,
    param); ``sees`` is mixed into what an image shows.
    """

    def __init__(
        self,
        checkpoint: Path,
        name: str,
        role: Role = Role.AGGREGATED,
        *prefills: Worker,
        waits: bool = False,
        refuses: tuple[str, str, str | None] | None = None,
        vision: VisionInfo | None = None,
        info: dict[str, Any] | None = None,
        num_tokens: int = 3,
        **fields: Any,
    ) -> None:
        if vision is None:
            vision = vision_info(encodes=role is not Role.DECODE)
        values: dict[str, Any] = {"vision": vision, "vocab_size": 401, **(info or {})}
        if role is Role.ENCODE:
            values |= {"max_seq_len": 0, "vocab_size": 0, "num_blocks": 0, "capabilities": ()}
        super().__init__(checkpoint, name, role, *prefills, info=values, **fields)
        self.waits = waits
        self.refuses = refuses
        self.num_tokens = num_tokens
        self.sees = ""
        self.native = b""
        self.asks: list[EncodeAsk] = []
        self.done: list[int] = []

    def on_message(self, message: Message) -> None:
        if isinstance(message, EncodeAsk):
            self.asks.append(message)
            if not self.waits:
                asyncio.get_running_loop().call_soon(self.encode, message)
        elif isinstance(message, EncodeDone):
            self.done.append(message.ask)
        super().on_message(message)

    def encode(self, ask: EncodeAsk) -> None:
        """Answer an ask."""
        if self.peer is None:
            return
        if self.refuses is not None:
            code, message, param = self.refuses
            self.say(EncodeFailed(ask.ask, code, message, param))
            return
        items = [
            [
                item(
                    self.sees + one.url,
                    self.record.address,
                    index,
                    self.num_tokens,
                    native=self.native,
                )
                for index in range(int(one.url.partition("#")[2] or 1))
            ]
            for one in ask.references
        ]
        self.say(Encoded(ask.ask, items, num_cached=1))

    async def until_asked(self, count: int = 1) -> EncodeAsk:
        await self.until(lambda: len(self.asks) >= count)
        return self.asks[count - 1]

    async def until_done(self) -> None:
        """Wait until every ask has been ended, and see that none is ended twice."""
        await self.until(lambda: len(self.done) >= len(self.asks))
        assert sorted(self.done) == sorted(ask.ask for ask in self.asks)


async def until(condition: Callable[[], object], *workers: FakeWorker) -> None:
    """Wait until something arrives at one of the workers that makes ``condition`` true."""
    async with asyncio.timeout(5):
        while not condition():
            waits = [asyncio.create_task(worker.changed.wait()) for worker in workers]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for worker, wait in zip(workers, waits, strict=True):
                wait.cancel()
                worker.changed.clear()


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def body(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": list(messages), **fields}


async def see(playing: Stage, *urls: str, **fields: Any) -> Any:
    """Post a chat about these images."""
    message = user(text("Look: "), *map(image, urls), text(" What is it?"))
    return await playing.client.post("/v1/chat/completions", json=body(message, **fields))


def rendered(*parts: str) -> str:
    return f"<|im_start|>user\n{''.join(parts)}<|im_end|>\n<|im_start|>assistant\n"


def expanded(prompt: str, *lengths: int) -> list[int]:
    """Return the tokens of a prompt whose placeholders stand for so many rows."""
    tokenizer = vision_tokenizer()
    image_id = tokenizer.token_to_id(PLACEHOLDER)
    left = iter(lengths)
    ids: list[int] = []
    for token_id in tokenizer.encode(prompt, add_special_tokens=False).ids:
        ids += [image_id] * next(left) if token_id == image_id else [token_id]
    return ids


def look(playing: Stage, *urls: str, **fields: Any) -> Call:
    """Begin a streamed chat about images that can be watched."""
    return playing.call(messages=[user(*map(image, urls or (CAT,)), text("?"))], **fields)


async def until_encoders(playing: Stage, count: int) -> None:
    served = playing.fleet.models
    await playing.until(lambda: len(served[MODEL].encoders()) == count)


def e_p_d(seeing: Path, **fields: Any) -> tuple[Seer, Seer, Seer]:
    """Return two encode workers and a worker that cannot encode."""
    e0, e1 = (Seer(seeing, f"e{at}", Role.ENCODE, **fields) for at in range(2))
    return e0, e1, Seer(seeing, "w0", vision=vision_info(encodes=False))
