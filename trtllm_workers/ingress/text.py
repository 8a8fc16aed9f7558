"""One model's text: chat template, prompt to ids, ids to text. Knows no request and no worker.

Encoding uses ``fastokens`` when it loads the tokenizer and agrees with Hugging Face's on a set of
awkward texts, else Hugging Face's ``tokenizers``.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trtllm_workers.errors import ConfigError
from trtllm_workers.ingress.detokenize import ByteDecoder, Decoder, WindowDecoder
from trtllm_workers.ingress.template import ChatTemplate, load_chat_template
from trtllm_workers.ingress.tokenizer_file import TokenizerFile, read_tokenizer_file

Encode = Callable[[str, bool], list[int]]

# Above this many characters a prompt is encoded in a thread: Hugging Face needs about 0.2 ms per
# 1000 characters, fastokens about 0.03, and the event loop serves every other stream meanwhile.
_SLOW_INLINE_CHARACTERS = 4_000
_FAST_INLINE_CHARACTERS = 32_000

# Tokens of the prompt that a window decoder needs to see before an answer that continues it.
_CONTEXT_TOKENS = 6

_AWKWARD = (
    "",
    " ",
    "Hello, world!",
    "  two leading spaces, trailing  ",
    "line\nline\r\n\n\tindented   \n",
    "It's we've I'LL don't 12345 6.789e-10 $9,99",
    "日本語のテキスト 中文 한국어 العربية हिन्दी ไทย",
    "emoji 🎉👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u00e9 \u200b zero\u00a0width",
    "def f(x):\n    return {'a': [1, 2], \"b\": None}  # comment\n",
    "<|im_start|>user\n<s>[INST] <bos> </s><|endoftext|>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa !!!!!!!! ........ ________",
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextModel:
    """Text in and out for one model. ``executor`` runs the encoding of large prompts."""

    def __init__(
        self,
        *,
        encode: Encode,
        encoder_name: str,
        inline_characters: int,
        file: TokenizerFile,
        decode_window: Callable[[list[int], bool], str] | None,
        template: ChatTemplate | None,
        bos_token_id: int | None,
        executor: Executor,
    ) -> None:
        self.template = template
        self.table = file.table
        self.encoder_name = encoder_name
        self._encode = encode
        self._inline_characters = inline_characters
        self._decode_window = decode_window
        self._bos_token_id = bos_token_id
        self._executor = executor
        self._special = file.special
        self._tokens_by_id = {token_id: token for token, token_id in file.tokens.items()}
        if file.table is not None:
            self._tokens_by_id = {}  # the table says it all

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Return the ids of prompts; many characters are encoded off the event loop."""
        if sum(map(len, texts)) <= self._inline_characters:
            return self._encode_all(texts, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, self._encode_all, texts, add_special_tokens
        )

    def _encode_all(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        encoded = [self._encode(text, add_special_tokens) for text in texts]
        bos = self._bos_token_id
        if add_special_tokens and bos is not None:
            for token_ids in encoded:
                if token_ids[:2] == [bos, bos]:
                    # The caller wrote the beginning-of-text token and the tokenizer added its own.
                    del token_ids[0]
        return encoded

    def decoder(self, *, skip_special_tokens: bool, prompt: Sequence[int] = ()) -> Decoder:
        """Return a new stream's decoder. ``prompt`` is given when the answer continues its text."""
        if self.table is not None:
            return ByteDecoder(self.table, skip_special_tokens=skip_special_tokens)
        decode_window = self._decode_window
        assert decode_window is not None, "a tokenizer without a table has a window decoder"
        return WindowDecoder(
            lambda token_ids: decode_window(token_ids, skip_special_tokens),
            self._special if skip_special_tokens else frozenset(),
            context=prompt[-_CONTEXT_TOKENS:],
        )

    def decode(self, token_ids: Sequence[int], decoder: Decoder) -> str:
        """Return the text of a whole answer with its (unused) decoder."""
        if isinstance(decoder, ByteDecoder):
            return decoder.all(token_ids)
        return "".join(map(decoder.feed, token_ids)) + decoder.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes one token stands for on its own (for logprobs)."""
        if self.table is not None:
            return self.table.piece(token_id)
        token = self._tokens_by_id.get(token_id, "")
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        return token.replace("\u2581", " ").encode()


def load_text_model(folder: Path, vocab_size: int, executor: Executor) -> TextModel:
    """Load tokenizer and chat template from a checkpoint folder. Slow: run it in a thread.

    Raises ConfigError naming the file that is missing or broken.
    """
    path = folder / "tokenizer.json"
    file = read_tokenizer_file(path, vocab_size)
    config = _read_config(folder / "tokenizer_config.json")
    template = load_chat_template(folder, config)
    source = path.read_text(encoding="utf-8")
    slow = _load_slow(path, source)
    fast = _load_fast(source, slow)
    bos = config.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos

    model = TextModel(
        encode=fast or _slow_encode(slow),
        encoder_name="fastokens" if fast else "tokenizers",
        inline_characters=_FAST_INLINE_CHARACTERS if fast else _SLOW_INLINE_CHARACTERS,
        file=file,
        # Without this reference the second copy of the vocabulary is freed.
        decode_window=None if file.table is not None else _slow_decode(slow),
        template=template,
        bos_token_id=file.tokens.get(bos) if isinstance(bos, str) else None,
        executor=executor,
    )
    del slow, source
    _give_memory_back()
    return model


def _give_memory_back() -> None:
    """Let the allocator return what loading needed: 100 MB for a vocabulary of 150 000."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return config


def _load_slow(path: Path, source: str) -> Any:
    try:
        tokenizer = Tokenizer.from_str(source)
    except Exception as error:  # tokenizers raises bare Exception for every fault
        raise ConfigError(f"{path}: tokenizers cannot load it: {error}") from error
    # A checkpoint may carry its training's truncation and padding; a prompt is neither.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _slow_encode(tokenizer: Any) -> Encode:
    def encode(text: str, add_special_tokens: bool) -> list[int]:
        # encode() holds the GIL for the whole prompt, encode_batch_fast() does not.
        batch = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        token_ids: list[int] = batch[0].ids
        return token_ids

    return encode


def _slow_decode(tokenizer: Any) -> Callable[[list[int], bool], str]:
    def decode(token_ids: list[int], skip_special_tokens: bool) -> str:
        text: str = tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    return decode


def _load_fast(source: str, slow: Any) -> Encode | None:
    """Return fastokens' encode, or None when it is absent, cannot load this, or disagrees."""
    try:
        from fastokens._native import Tokenizer as FastTokenizer

        tokenizer = FastTokenizer.from_json_str(source)
        tokenizer.no_truncation()
        tokenizer.no_padding()

        def encode(text: str, add_special_tokens: bool) -> list[int]:
            token_ids: list[int] = tokenizer.encode(text, add_special_tokens).ids
            return token_ids

        reference = _slow_encode(slow)
        for text in _AWKWARD:
            for special in (True, False):
                if encode(text, special) != reference(text, special):
                    return None
    except Exception:  # noqa: BLE001  an optional, foreign accelerator: any fault means "use the other"
        return None
    return encode
