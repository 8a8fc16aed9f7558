"""What the torch engine honours of a request, and what it takes from a prefill. Changes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trtllm_workers.engines.torch.sequence import Rows
from trtllm_workers.errors import EngineError, RequestError
from trtllm_workers.transfer.media_store import Entry, MediaStore
from trtllm_workers.types import (
    EngineInfo,
    GenerateRequest,
    MediaKind,
    SamplingParams,
    TokenChunk,
)

CAPABILITIES = tuple(name for name in SamplingParams.__struct_fields__ if name != "guided")


def check_first(request: GenerateRequest, first: TokenChunk, info: EngineInfo) -> None:
    """Raise EngineError for a prefill's first chunk that no stream here could go on from."""
    if first.finish_reason is not None:
        return
    tokens, most = first.token_ids, request.sampling.max_tokens
    if not 0 < len(tokens) < most or not all(0 <= token < info.vocab_size for token in tokens):
        raise EngineError(
            f"request {request.request_id}: cannot go on after tokens {list(tokens[:8])} of a prefill; "
            f"an unfinished one brings 1 to {most - 1} of them, ids 0 to {info.vocab_size - 1}; "
            "do prefill and decode serve the same model?"
        )


def check_grids(request: GenerateRequest) -> None:
    """Raise RequestError for an image whose grid does not have as many places as it has tokens."""
    for number, item in enumerate(request.media):
        if item.grid is not None and (
            min(item.grid) < 1 or math.prod(item.grid) != item.num_tokens
        ):
            raise RequestError(
                f"image {number} has {item.num_tokens} tokens, but a grid of {list(item.grid)}",
                param="media",
            )


def rows_of(request: GenerateRequest, entries: Sequence[Entry], store: MediaStore) -> Rows:
    """Return where the rows of a request's images lie in the store.

    Raises EngineError for an entry that is no embeddings of as many tokens.
    """
    rows_per_block = store.block_bytes // store.row_bytes
    rows: list[tuple[int, int, int]] = []
    for number, (item, entry) in enumerate(zip(request.media, entries, strict=True)):
        held = entry.item
        if (
            held.kind is not MediaKind.EMBEDDINGS
            or held.num_bytes != item.num_tokens * store.row_bytes
        ):
            raise EngineError(
                f"request {request.request_id}: image {number} is held as {held.num_bytes} bytes of "
                f"{held.kind}, but {item.num_tokens} rows of {store.row_bytes} bytes are needed"
            )
        token, left = item.offset, item.num_tokens
        for block in entry.block_ids:
            first, count = block * rows_per_block, min(left, rows_per_block)
            if rows and sum(rows[-1][1:]) == first and sum(rows[-1][::2]) == token:
                rows[-1] = (*rows[-1][:2], rows[-1][2] + count)
            else:
                rows.append((token, first, count))
            token += count
            left -= count
    return tuple(rows)
