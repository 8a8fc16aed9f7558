"""Token ids to text, one token at a time, never half a character. Knows no stream and no HTTP.

Byte-level BPE vocabularies (GPT-2, Llama 3, Qwen, …) become a table: id → bytes, and id → the same
bytes escaped for a JSON string where they are whole characters. Every other vocabulary goes
through the tokenizer's own decoder over a short window of tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

_encode = msgspec.json.encode


def escaped(text: str) -> bytes:
    """Return ``text`` as the inside of a JSON string, without the quotes."""
    return _encode(text)[1:-1]


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: the printable character that stands for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = (byte for byte in range(256) if byte not in set(printable))
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + offset): byte for offset, byte in enumerate(shifted)})
    return alphabet


_ALPHABET = _byte_alphabet()


def _piece(token: str) -> bytes:
    """Return the bytes a byte-level token stands for; added tokens may be plain text."""
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()


class TextTable:
    """A byte-level vocabulary by id.

    ``pieces[id]`` are the token's raw bytes (empty for ids without a token); ``fragments[id]`` the
    same escaped for JSON, or None when the token is special, empty, or not whole characters and so
    needs a decoder.
    """

    __slots__ = ("fragments", "pieces", "special")

    def __init__(self, tokens: Mapping[str, int], special: Iterable[int], size: int) -> None:
        size = max(size, max(tokens.values(), default=-1) + 1)
        self.special = frozenset(special)
        self.pieces: list[bytes] = [b""] * size
        self.fragments: list[bytes | None] = [None] * size
        for token, token_id in tokens.items():
            raw = _piece(token)
            self.pieces[token_id] = raw
            if raw and token_id not in self.special:
                try:
                    fragment = escaped(raw.decode())
                except UnicodeDecodeError:
                    continue
                # Most fragments need no escape: share the object, half the memory.
                self.fragments[token_id] = raw if fragment == raw else fragment

    def piece(self, token_id: int) -> bytes:
        """Return the raw bytes of one token; empty for an id outside the vocabulary."""
        return self.pieces[token_id] if token_id < len(self.pieces) else b""


class Decoder(Protocol):
    """The text of one stream.

    * ``feed`` returns the text that became certain with this token, maybe none.
    * ``pending`` is true while bytes wait for the rest of their character.
    * ``flush`` ends the stream and returns what is left; bytes that never became a character are
      U+FFFD. All ``feed`` results and ``flush`` together are the decoded sequence.
    """

    @property
    def pending(self) -> bool: ...

    def feed(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class ByteDecoder:
    """A Decoder over a TextTable."""

    __slots__ = ("_pieces", "_skipped", "_utf8")

    def __init__(self, table: TextTable, *, skip_special_tokens: bool) -> None:
        self._pieces = table.pieces
        self._skipped = table.special if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def pending(self) -> bool:
        return bool(self._utf8.getstate()[0])

    def feed(self, token_id: int) -> str:
        if token_id in self._skipped or token_id >= len(self._pieces):
            return ""
        return self._utf8.decode(self._pieces[token_id])

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text

    def all(self, token_ids: Sequence[int]) -> str:
        """Return the text of a whole sequence at once; the cheap way when nobody streams."""
        pieces, skipped = self._pieces, self._skipped
        size = len(pieces)
        kept = (pieces[token] for token in token_ids if token not in skipped and token < size)
        return b"".join(kept).decode(errors="replace")


# Bytes of a character come one token each, four at most; more that form none never will.
_LONGEST_CHARACTER = 16


class WindowDecoder:
    """A Decoder that asks a whole-sequence ``decode`` about a short window of tokens.

    The text of the window's settled part is subtracted from the text of the whole window, so rules
    that look at neighbours (a leading space that only the first token loses) come out as in one
    decode of everything. ``skipped`` ids never become text. ``context`` is the end of the prompt,
    when the answer continues its text.
    """

    __slots__ = ("_decode", "_settled", "_settled_text", "_skipped", "_window")

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        skipped: frozenset[int],
        context: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._skipped = skipped
        self._window = list(context)
        self._settled = len(self._window)
        self._settled_text = decode(self._window) if context else ""

    @property
    def pending(self) -> bool:
        return len(self._window) > self._settled

    def feed(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if len(text) <= len(self._settled_text):
            return ""
        if text.endswith("\ufffd") and len(self._window) - self._settled < _LONGEST_CHARACTER:
            return ""
        return self._settle(text)

    def flush(self) -> str:
        return self._settle(self._decode(self._window)) if self.pending else ""

    def _settle(self, text: str) -> str:
        fresh = text[len(self._settled_text) :]
        # The tokens just settled stay as the neighbours of what follows; older ones go.
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        self._settled_text = self._decode(self._window)
        return fresh
