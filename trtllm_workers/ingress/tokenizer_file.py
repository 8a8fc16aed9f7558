"""Reads ``tokenizer.json``: vocabulary, added tokens, kind of decoder. Encodes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from trtllm_workers.errors import ConfigError
from trtllm_workers.ingress.detokenize import TextTable


class _Added(msgspec.Struct, frozen=True):
    id: int
    content: str
    special: bool = False


class _Model(msgspec.Struct, frozen=True):
    vocab: Any = None  # a map for BPE and WordPiece, pairs for Unigram
    type: str = ""


class _File(msgspec.Struct, frozen=True):
    model: _Model
    added_tokens: list[_Added] = []
    decoder: Any = None


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """What the file says. ``table`` is None unless the vocabulary is byte-level BPE.

    ``tokens`` maps each token to its id, added ones included.
    """

    tokens: dict[str, int]
    special: frozenset[int]
    table: TextTable | None


def read_tokenizer_file(path: Path, vocab_size: int) -> TokenizerFile:
    """Read a tokenizer.json; ``vocab_size`` is the model's, which may be padded beyond it.

    Raises ConfigError naming the file.
    """
    try:
        content = msgspec.json.decode(path.read_bytes(), type=_File)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; the ingress needs the model's tokenizer.json"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a tokenizer file: {error}") from error
    vocab = content.model.vocab
    if isinstance(vocab, dict):
        tokens = {str(token): int(token_id) for token, token_id in vocab.items()}
    elif isinstance(vocab, list):
        tokens = {str(entry[0]): index for index, entry in enumerate(vocab)}
    else:
        raise ConfigError(f"{path}: not a tokenizer file: it has no vocabulary")
    tokens.update({added.content: added.id for added in content.added_tokens})
    special = frozenset(added.id for added in content.added_tokens if added.special)
    byte_level = content.model.type == "BPE" and _is_byte_level(content.decoder)
    table = TextTable(tokens, special, vocab_size) if byte_level else None
    return TokenizerFile(tokens=tokens, special=special, table=table)


def _is_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        steps = decoder.get("decoders") or []
        return len(steps) == 1 and _is_byte_level(steps[0])
    return decoder.get("type") == "ByteLevel"
