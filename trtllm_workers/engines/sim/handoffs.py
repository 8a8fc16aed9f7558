"""Streams that only hold blocks: pinned to be fetched, or reserved to be filled. Runs none of them."""

from __future__ import annotations

from trtllm_workers.engines.acceptance import check_filled
from trtllm_workers.engines.sim.kv_memory import find_wrong, prompt_digests, write_digests
from trtllm_workers.engines.sim.stream import Phase, Purpose, Stream
from trtllm_workers.errors import EngineError
from trtllm_workers.observe.logs import get_logger
from trtllm_workers.transfer.base import KvPool
from trtllm_workers.types import TokenChunk

log = get_logger(__name__)


class Handoffs:
    """``pinned`` and ``reserved`` streams by request id, over the memory of one engine's blocks.

    ``num_wrong_blocks`` counts blocks that held something else than their prompt's KV on ``resume``.
    """

    def __init__(self, memory: KvPool) -> None:
        self.pinned: dict[str, Stream] = {}
        self.reserved: dict[str, Stream] = {}
        self.num_wrong_blocks = 0
        self._memory = memory
        # Prompts computed without a handoff leave no bytes; these blocks hold those of their digest.
        self._written: dict[int, bytes] = {}

    @property
    def num_pinned_blocks(self) -> int:
        """Blocks that wait to be fetched; two prompts may share some."""
        return len({block for stream in self.pinned.values() for block in stream.blocks})

    @property
    def num_reserved_blocks(self) -> int:
        """Blocks that wait for KV."""
        return sum(len(stream.blocks) - stream.num_shared for stream in self.reserved.values())

    def pin(self, stream: Stream) -> None:
        """Let a stream whose prompt is computed hold its blocks, with their bytes in memory."""
        stream.phase = Phase.PINNED
        self.pinned[stream.request_id] = stream
        if not stream.wrong_kv:  # else what is in memory is as wrong as what was made of it
            self._write(stream, len(stream.blocks))

    def reserve(self, stream: Stream) -> None:
        """Let a stream hold blocks that others will write, and cached ones that they may read."""
        stream.phase = Phase.RESERVED
        self.reserved[stream.request_id] = stream
        for block in stream.blocks[stream.num_shared :]:
            self._written.pop(block, None)
        self._write(stream, stream.num_shared)

    def drop(self, request_id: str) -> None:
        """Forget a stream if it is one that only holds blocks."""
        self.pinned.pop(request_id, None)
        self.reserved.pop(request_id, None)

    def clear(self) -> None:
        """Forget all streams, and the memory: an engine that ended keeps no page of it."""
        self.pinned.clear()
        self.reserved.clear()
        self._memory = KvPool(self._memory.layout, 0, memoryview(bytearray()))

    def take_up(self, request_id: str, first: TokenChunk | None) -> Stream:
        """Forget a reserved stream and return it, ready to decode or, without ``first``, to prefill.

        Raises EngineError, and changes nothing, when it is not reserved or ``first`` does not fit it.
        """
        stream = self._find(request_id)
        if first is not None:
            if len(first.token_ids) != 1 or stream.prompt_len + 1 >= stream.limit:
                raise EngineError(
                    f"request {request_id} cannot be resumed: its first chunk holds "
                    f"{len(first.token_ids)} tokens, where one is expected of "
                    f"{stream.limit - stream.prompt_len} (max_tokens) and an ended request needs none"
                )
            self._check_bytes(stream, len(stream.blocks))
            stream.tokens.extend(first.token_ids)
            stream.num_known = stream.num_computed = stream.prompt_len
            stream.cached_tokens = first.cached_tokens
        del self.reserved[request_id]
        stream.phase = Phase.PREFILL if first is None else Phase.DECODE
        return stream

    def take_up_prefill(self, request_id: str, num_filled: int, block_size: int) -> Stream:
        """Forget a reserved stream and return it, ready to prefill after its first ``num_filled`` blocks.

        Raises EngineError, and changes nothing, when it is not reserved or so many cannot be filled.
        """
        stream = self._find(request_id)
        check_filled(stream.request, num_filled, block_size)
        self._check_bytes(stream, num_filled)
        del self.reserved[request_id]
        stream.purpose, stream.phase = Purpose.PREFILL, Phase.PREFILL
        stream.num_computed = max(stream.num_computed, num_filled * block_size)
        stream.cached_tokens = stream.num_computed
        return stream

    def _find(self, request_id: str) -> Stream:
        stream = self.reserved.get(request_id)
        if stream is None:
            raise EngineError(
                f"request {request_id} cannot be resumed: no blocks are reserved for it here (any "
                "more); it was aborted, resumed before, or not granted yet"
            )
        return stream

    def _check_bytes(self, stream: Stream, end: int) -> None:
        """Lead a stream astray whose first ``end`` blocks are not its prompt's, as a model would be."""
        first = stream.num_shared
        blocks, digests = stream.blocks[first:end], self._digests(stream)[first:end]
        wrong = find_wrong(self._memory, blocks, digests)
        if not wrong:
            self._written.update(zip(blocks, digests, strict=True))
            return
        self.num_wrong_blocks += len(wrong)
        stream.wrong_kv = b"".join(wrong.values())
        stream.stop_sharing()
        log.error(
            "wrong KV in reserved blocks; the answer will differ",
            request_id=stream.request_id,
            num_wrong_blocks=len(wrong),
            num_blocks=len(stream.blocks),
            first_wrong_block_id=next(iter(wrong)),
        )

    def _write(self, stream: Stream, end: int) -> None:
        """Put the bytes of a prompt's first ``end`` blocks into memory, where they are not yet."""
        if not end:
            return
        digests = self._digests(stream)[:end]
        for block, digest in zip(stream.blocks[:end], digests, strict=True):
            if self._written.get(block) != digest:
                write_digests(self._memory, (block,), (digest,))
                self._written[block] = digest

    def _digests(self, stream: Stream) -> list[bytes]:
        prompt = stream.tokens[: stream.prompt_len]
        block_size = self._memory.layout.block_size
        return list(prompt_digests(prompt, block_size, stream.root, stream.marks))
