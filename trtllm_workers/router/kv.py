"""Mode kv: the cost of a request at each worker over what they hold and have to do. Needs numpy."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from trtllm_workers.router.choice import Choice, Row
from trtllm_workers.router.cost import Columns, Costs, Floats, Mask, cheapest, costs, draw
from trtllm_workers.router.loads import Loads
from trtllm_workers.router.policies import RouterMode
from trtllm_workers.router.weights import Weights
from trtllm_workers.types import WorkerRecord

_NUM_ROWS = 5


class KvPolicy:
    """Looks at a pool's loads as arrays, and at the prefixes that workers hold."""

    def __init__(self, loads: Loads, weights: Weights, rng: random.Random) -> None:
        self._loads = loads
        self._weights = weights
        self._rng = rng
        self._see()

    def _see(self) -> None:
        """Look at the loads' memory, which is another one after they have grown."""
        loads = self._loads
        self._requests = np.frombuffer(loads.requests)
        self._waiting = np.frombuffer(loads.waiting)
        self._others_waiting = np.frombuffer(loads.others_waiting)
        self._available = np.frombuffer(loads.available)
        self._last_turns = np.frombuffer(loads.last_turns)
        self._size = loads.size

    def mask(self, numbers: Sequence[int]) -> Mask:
        """Return what tells these workers from all others."""
        able: Floats = np.zeros(self._loads.size)
        able[np.array(numbers, dtype=np.intp)] = 1.0
        return Mask(len(numbers), able, np.where(able, 0.0, np.inf))

    def choose(
        self,
        groups: list[tuple[int, int]],
        mask: Mask,
        records: Sequence[WorkerRecord | None],
        block_size: int,
        prompt_tokens: int,
    ) -> tuple[int, Choice]:
        """Return the cheapest worker's slot, and the choice of it. ``groups`` as of ``index.match``."""
        if self._size != self._loads.size:
            self._see()
        overlap = self._overlap(groups, block_size, prompt_tokens)
        waiting = self._waiting + self._others_waiting * prompt_tokens
        columns = Columns(self._requests, waiting, self._available, mask)
        found = costs(columns, overlap, prompt_tokens, block_size, self._weights)
        if self._weights.temperature:
            number = draw(found.total, self._weights.temperature, self._rng)
        else:
            number = cheapest(found.total, self._last_turns)
        rows = self._rows(number, columns, found, prompt_tokens, records)
        record = records[number]
        assert record is not None, "a slot that is not barred has its worker"
        return number, Choice(
            record.address,
            record.worker_id,
            RouterMode.KV,
            rows[0].overlap_tokens,
            prompt_tokens,
            rows[0].cost,
            self._why(rows[0], overlap, found),
            rows,
        )

    def _overlap(
        self, groups: list[tuple[int, int]], block_size: int, prompt_tokens: int
    ) -> Floats:
        """Return the tokens of the prompt that each slot holds; at least one is always computed."""
        tokens: Floats = np.zeros(self._size)
        for depth, group in groups:
            held = min(depth * block_size, prompt_tokens - 1)
            if group & (group - 1) == 0:
                tokens[group.bit_length() - 1] = held
            else:
                packed = group.to_bytes((self._size + 7) // 8, "little")
                bits = np.frombuffer(packed, np.uint8)
                members = np.unpackbits(bits, count=self._size, bitorder="little")
                tokens[members.view(np.bool_)] = held
        return tokens

    def _rows(
        self,
        chosen: int,
        columns: Columns,
        found: Costs,
        prompt_tokens: int,
        records: Sequence[WorkerRecord | None],
    ) -> tuple[Row, ...]:
        """Return the chosen worker and the cheapest others."""
        left = found.total.copy()
        rows: list[Row] = []
        number = chosen
        while len(rows) < _NUM_ROWS and left[number] != np.inf:
            left[number] = np.inf
            overlap = int(found.overlap_tokens[number])
            record = records[number]
            assert record is not None, "a slot that is not barred has its worker"
            rows.append(
                Row(
                    record.worker_id,
                    overlap,
                    prompt_tokens - overlap,
                    int(columns.waiting_tokens[number]),
                    int(columns.requests[number]),
                    int(columns.available_blocks[number]),
                    float(found.total[number]),
                    found.capped is not None and bool(found.capped[number]),
                    float(found.overlap[number]),
                    float(found.load[number]),
                    0.0 if found.free is None else float(found.free[number]),
                )
            )
            number = int(left.argmin())
        return tuple(rows)

    def _why(self, chosen: Row, overlap: Floats, found: Costs) -> str:
        why = "drawn by cost" if self._weights.temperature else "lowest cost"
        holder = int(overlap.argmax())
        if overlap[holder] <= chosen.overlap_tokens:
            return why
        capped = found.capped is not None and found.capped[holder]
        reason = "over the affinity cap" if capped else "with too much to do"
        return f"{why}; {overlap[holder]:.0f} tokens are cached at a worker {reason}"
