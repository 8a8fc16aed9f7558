"""Which stream computes what in a step, and what comes of it. Knows no clock and no cost.

``plan`` and ``finish`` alternate. Continuous batching: every decoding stream gets one token per
step; what is left of ``max_num_tokens`` goes to prompts, the oldest first, in chunks. A stream is
admitted when the pool can hold all its tokens so far; when a decoding stream needs a block and none
is to be had, the youngest stream is preempted, so the oldest always gets on. Streams that only hold
blocks for a handoff are never preempted; those that will decode here count as running.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

from trtllm_workers.engines.base import Deliver
from trtllm_workers.engines.sim.handoffs import Handoffs
from trtllm_workers.engines.sim.pool import BlockPool
from trtllm_workers.engines.sim.step import Chunk, Limits, Step
from trtllm_workers.engines.sim.stream import Phase, Purpose, Stream
from trtllm_workers.types import EngineStats, FinishReason, TokenChunk

OnHeld = Callable[[TokenChunk | None], None]
OnDeliverError = Callable[[Stream, Exception], None]


class Scheduler:
    """Streams waiting, prefilling, decoding and holding over one pool."""

    def __init__(
        self,
        pool: BlockPool,
        handoffs: Handoffs,
        limits: Limits,
        on_deliver_error: OnDeliverError,
    ) -> None:
        self._pool = pool
        self._handoffs = handoffs
        self._limits = limits
        self._on_deliver_error = on_deliver_error
        self._streams: dict[str, Stream] = {}
        self._waiting: OrderedDict[str, Stream] = OrderedDict()
        self._prefilling: list[Stream] = []
        self._decoding: list[Stream] = []
        self._growing: list[Stream] = []  # decoding streams whose next token needs a new block
        self._aborting: list[Stream] = []
        self._resumed: list[Stream] = []  # in their phase, but not in its list yet
        self._left = False  # a stream in those lists has left its phase
        # While others run, admission leaves a little room so that it causes no preemption at once.
        self._margin = pool.num_blocks // 100
        self._num_steps = self._prompt_tokens = self._cached_prompt_tokens = 0
        self._output_tokens = self._preemptions = self._aborts = self._finished = 0

    @property
    def streams(self) -> Mapping[str, Stream]:
        """The streams that have not ended, by request id."""
        return self._streams

    @property
    def num_steps(self) -> int:
        """Steps finished so far."""
        return self._num_steps

    def add(self, stream: Stream) -> None:
        """Put a new stream at the end of the waiting line."""
        self._streams[stream.request_id] = stream
        self._waiting[stream.request_id] = stream

    def abort(self, request_id: str) -> None:
        """End a stream before the next delivery to it; unknown ones are ignored."""
        stream = self._streams.get(request_id)
        if stream is None:
            return
        if stream.phase in (Phase.PINNED, Phase.RESERVED):
            # Its caller has been told all there is to tell, and no step touches its blocks.
            self._end(stream)
            self._aborts += 1
        else:
            self._aborting.append(stream)

    def release(self, request_id: str) -> None:
        """Unpin the blocks of a prefilled stream; of others nothing happens."""
        stream = self._handoffs.pinned.get(request_id)
        if stream is not None:
            self._end(stream)
            self._finished += 1

    def resume(self, request_id: str, first: TokenChunk | None, deliver: Deliver) -> Stream:
        """Let a reserved stream run from the next step on. Raises EngineError if it is not reserved."""
        stream = self._handoffs.take_up(request_id, first)
        stream.deliver = deliver
        if first is None:
            self._count_prompt(stream)
        else:
            self._store(stream, stream.prompt_len)  # from now on its KV is there
            self._go_on(stream)
        self._resumed.append(stream)
        return stream

    def prefill_reserved(self, request_id: str, num_filled: int) -> Stream:
        """Let a reserved stream compute its prompt after its first ``num_filled`` blocks, to be pinned.

        Raises EngineError as ``Handoffs.take_up_prefill`` does.
        """
        stream = self._handoffs.take_up_prefill(request_id, num_filled, self._limits.block_size)
        self._count_prompt(stream)
        self._store(stream, stream.num_computed)
        self._resumed.append(stream)
        return stream

    def holdings(self) -> dict[str, int]:
        """Return the number of blocks each stream holds, without those that hold none."""
        return {s.request_id: len(s.blocks) for s in self._streams.values() if s.blocks}

    def end_all(
        self, reason: FinishReason, code: str | None = None, why: str | None = None
    ) -> None:
        """End every stream and let go of all blocks; ``code`` and ``why`` go with ERROR."""
        streams = list(self._streams.values())
        self._streams.clear()
        self._waiting.clear()
        self._resumed.clear()
        self._handoffs.clear()
        # All at once rather than stream by stream: this must work after a failure, too.
        self._pool.release_all()
        for stream in streams:
            stream.phase = Phase.ENDED
            stream.blocks = []
            stream.on_ended()
        self._left = True
        self._sweep()
        for stream in streams:
            cached = stream.cached_tokens
            chunk = TokenChunk((), reason, cached, error_code=code, error_message=why)
            self.deliver(stream, chunk)

    def deliver(self, stream: Stream, chunk: TokenChunk) -> None:
        """Hand a chunk to a stream's consumer; one that raises must not stop the others."""
        try:
            stream.deliver(chunk)
        except Exception as error:  # noqa: BLE001  # reported there
            self._on_deliver_error(stream, error)

    def kv_tokens(self) -> int:
        """Return the tokens whose KV decoding streams read in a step."""
        return sum([stream.num_known for stream in self._decoding])

    def stats(self) -> EngineStats:
        """Return load and counters now."""
        pool, handoffs = self._pool, self._handoffs
        return EngineStats(
            num_running=len(self._streams) - len(self._waiting) - len(handoffs.pinned),
            num_waiting=len(self._waiting),
            total_blocks=pool.num_blocks,
            free_blocks=pool.num_free,
            cached_blocks=pool.num_cached,
            active_blocks=pool.num_active,
            num_steps=self._num_steps,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._cached_prompt_tokens,
            output_tokens=self._output_tokens,
            preemptions=self._preemptions,
            aborts=self._aborts,
            finished=self._finished,
            pinned_blocks=handoffs.num_pinned_blocks,
            reserved_blocks=handoffs.num_reserved_blocks,
            allocated_blocks=pool.num_allocated,
            freed_blocks=pool.num_freed,
        )

    def plan(self) -> Step | None:
        """Choose the next step's work and give it its blocks; None when nothing is to be done."""
        while True:
            self._drop_aborted()
            self._join_resumed()
            self._grow()
            chunks = self._plan_chunks()
            if chunks or self._decoding:
                return Step(tuple(chunks), len(self._decoding))
            # Who was told of a reservation may have asked for more at once.
            if not self._resumed and not self._aborting:
                return None

    def _plan_chunks(self) -> list[Chunk]:
        """Give what is left of the budget to prompts, and blocks to those whose turn it is."""
        budget = self._limits.max_num_tokens - len(self._decoding)
        chunks: list[Chunk] = []
        for stream in self._prefilling:
            if budget <= 0:
                break
            count = min(stream.num_known - stream.num_computed, budget)
            chunks.append(Chunk(stream, stream.num_computed, count))
            budget -= count
        while self._waiting:
            stream = next(iter(self._waiting.values()))
            if stream in self._aborting:
                break  # by somebody's deliver; it leaves the line at the next plan
            reserves = stream.purpose is Purpose.RESERVE and not stream.was_admitted
            if (budget <= 0 and not reserves) or not self._admit(stream, budget, reserves):
                break
            if reserves:
                self._handoffs.reserve(stream)
                self._tell_held(stream, None)
                continue
            self._prefilling.append(stream)
            count = min(stream.num_known - stream.num_computed, budget)
            chunks.append(Chunk(stream, stream.num_computed, count))
            budget -= count
        return chunks

    def finish(self, step: Step) -> None:
        """Take the step's work as done and deliver its tokens."""
        self._drop_aborted()
        self._num_steps += 1
        for stream in self._decoding:
            index = stream.num_known
            if index < stream.pause:
                stream.num_known = index + 1
                try:
                    stream.deliver(TokenChunk((stream.tokens[index],), None, stream.cached_tokens))
                except Exception as error:  # noqa: BLE001  # one consumer must not stop the others
                    self._on_deliver_error(stream, error)
            else:
                self._advance(stream)
        self._output_tokens += len(self._decoding)
        for chunk in step.chunks:
            stream = chunk.stream
            if stream.phase is not Phase.PREFILL:
                continue  # aborted meanwhile
            stream.num_computed += chunk.num_tokens
            if stream.num_computed < stream.num_known:
                self._store(stream, stream.num_computed)
                continue
            stream.phase = Phase.DECODE
            self._left = True
            self._decoding.append(stream)
            self._output_tokens += 1
            self._advance(stream)
        self._sweep()

    def _advance(self, stream: Stream) -> None:
        """Deliver the next token where a block fills, tokens run out or the stream ends."""
        index = stream.num_known  # KV of all tokens before it is there now
        self._store(stream, index)
        if index == len(stream.tokens):
            stream.extend()
        if index == stream.stop_index:
            self._finish(
                stream,
                TokenChunk(
                    (),
                    FinishReason.STOP,
                    stream.cached_tokens,
                    num_hidden_tokens=1,
                    stop_token_id=stream.tokens[index],
                ),
            )
            return
        token = (stream.tokens[index],)
        if index + 1 == stream.limit:
            self._finish(stream, TokenChunk(token, FinishReason.LENGTH, stream.cached_tokens))
            return
        chunk = TokenChunk(token, None, stream.cached_tokens)
        if stream.purpose is Purpose.PREFILL:
            if stream in self._aborting:
                return  # by somebody's deliver in this step; it is told at the next plan
            self._handoffs.pin(stream)
            self._tell_held(stream, chunk)
            return
        self._go_on(stream)
        self.deliver(stream, chunk)

    def _go_on(self, stream: Stream) -> None:
        """Take the next token as known; its KV is computed by the next step, and needs room."""
        index = stream.num_known
        stream.num_known = index + 1
        stream.set_pause(self._limits.block_size)
        if len(stream.blocks) * self._limits.block_size <= index:
            self._growing.append(stream)

    def _store(self, stream: Stream, num_computed: int) -> None:
        """Share the blocks that are full now."""
        full = num_computed // self._limits.block_size
        if not stream.reuse or full <= stream.num_shared:
            return
        stream.hash_full_blocks(full, self._limits.block_size)
        self._pool.store(stream.hashes[:full], stream.num_shared, stream.blocks)
        stream.num_shared = full

    def _admit(self, stream: Stream, budget: int, reserves: bool) -> bool:
        """Give the first waiting stream its blocks if batch, budget and pool have room for it."""
        num_running = self._num_running
        if num_running >= self._limits.max_running:
            return False
        block_size = self._limits.block_size
        # At least the last token is computed: its logits are what prefill is for.
        matched, cached = self._pool.match(stream.hashes, (stream.num_known - 1) // block_size)
        needed = -(-stream.num_known // block_size) - matched
        margin = self._margin if num_running else 0
        if needed + margin > self._pool.num_available - cached:
            return False
        uncached = stream.num_known - matched * block_size
        must_fit = not self._limits.chunked_prefill and not stream.was_admitted and not reserves
        if must_fit and uncached > budget:
            return False
        stream.blocks = self._pool.hold(stream.hashes[:matched]) + self._pool.take(needed)
        stream.num_shared = matched
        stream.num_computed = matched * block_size
        if not stream.was_admitted:
            stream.was_admitted = True
            stream.cached_tokens = stream.num_computed
            if not reserves:
                self._count_prompt(stream)
        del self._waiting[stream.request_id]
        stream.phase = Phase.PREFILL
        return True

    @property
    def _num_running(self) -> int:
        """Streams that decode here sooner or later and hold blocks for it."""
        running = len(self._prefilling) + len(self._decoding) + len(self._resumed)
        return running + len(self._handoffs.reserved)

    def _count_prompt(self, stream: Stream) -> None:
        self._prompt_tokens += stream.prompt_len
        self._cached_prompt_tokens += stream.cached_tokens

    def _join_resumed(self) -> None:
        resumed, self._resumed = self._resumed, []
        for stream in resumed:
            if stream.phase is Phase.DECODE:
                self._decoding.append(stream)
            elif stream.phase is Phase.PREFILL:
                self._prefilling.append(stream)

    def _grow(self) -> None:
        """Give each decoding stream at a block's border its next block, the oldest first."""
        growing, self._growing = self._growing, []
        for stream in sorted(growing, key=lambda grown: grown.arrival):
            while stream.phase is Phase.DECODE:
                if self._pool.num_available:
                    stream.blocks += self._pool.take(1)
                    break
                running = self._prefilling + self._decoding
                self._preempt(max(running, key=lambda victim: victim.arrival))

    def _preempt(self, stream: Stream) -> None:
        """Take a stream's blocks and send it back to the front of the waiting line."""
        (self._prefilling if stream.phase is Phase.PREFILL else self._decoding).remove(stream)
        self._release(stream)
        stream.phase = Phase.WAITING
        self._waiting[stream.request_id] = stream
        self._waiting.move_to_end(stream.request_id, last=False)
        self._preemptions += 1

    def _release(self, stream: Stream) -> None:
        shared = stream.num_shared
        self._pool.release(stream.hashes[:shared], stream.blocks[shared:])
        stream.blocks = []
        stream.num_shared = stream.num_computed = 0

    def _finish(self, stream: Stream, chunk: TokenChunk) -> None:
        self._end(stream)
        self._finished += 1
        self.deliver(stream, chunk)

    def _end(self, stream: Stream) -> None:
        """Forget a stream; the lists of running ones are swept at the step's end."""
        self._release(stream)
        stream.phase = Phase.ENDED
        self._left = True
        del self._streams[stream.request_id]
        self._waiting.pop(stream.request_id, None)
        self._handoffs.drop(stream.request_id)
        stream.on_ended()

    def _drop_aborted(self) -> None:
        while self._aborting:
            aborting, self._aborting = self._aborting, []
            for stream in aborting:
                if stream.phase is not Phase.ENDED:
                    self._end(stream)
                    self._aborts += 1
                    chunk = TokenChunk((), FinishReason.ABORT, stream.cached_tokens)
                    self.deliver(stream, chunk)
        self._sweep()

    def _sweep(self) -> None:
        """Drop streams that left their phase from the lists of running ones."""
        if self._left:
            self._left = False
            self._prefilling = [s for s in self._prefilling if s.phase is Phase.PREFILL]
            self._decoding = [s for s in self._decoding if s.phase is Phase.DECODE]

    def _tell_held(self, stream: Stream, first: TokenChunk | None) -> None:
        """Say once that the blocks of a handoff are held; later ends are not told."""
        stream.deliver = _tell_nobody
        try:
            stream.on_held(first)
        except Exception as error:  # noqa: BLE001  # one consumer must not stop the others
            self._on_deliver_error(stream, error)


def _tell_nobody(_chunk: TokenChunk) -> None:
    """Drop the end of a stream that only held blocks."""
