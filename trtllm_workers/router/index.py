"""Which workers hold which KV block: one table for all workers of a pool.

Workers are numbered by slot. A block's holders are the bits of one integer: the prefix of a prompt is
matched against a thousand workers with one AND per block, and a block that one worker holds costs no
integer of its own. Knows no worker's name and no sequence number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from struct import Struct

from trtllm_workers.blocks import HASH_BYTES


class BlockIndex:
    """Blocks by hash, with the slots that hold them."""

    def __init__(self) -> None:
        self.holders: dict[bytes, int] = {}
        self._held: dict[int, set[bytes]] = {}
        self._bits: dict[int, int] = {}  # one integer object per slot, shared by all its blocks

    def __len__(self) -> int:
        """How many different blocks are held."""
        return len(self.holders)

    def num_held(self, slot: int) -> int:
        """Return how many blocks a slot holds."""
        return len(self._held.get(slot, ()))

    def holds(self, slot: int, block: bytes) -> bool:
        """Return whether a slot holds a block."""
        return block in self._held.get(slot, ())

    def missing(self, slot: int, blocks: Sequence[bytes]) -> Sequence[bytes]:
        """Return those of ``blocks`` that a slot does not hold, in order."""
        held = self._held.get(slot)
        return [block for block in blocks if block not in held] if held else blocks

    def store(self, slot: int, blocks: Iterable[bytes]) -> None:
        """Note that a slot holds these blocks, perhaps as before."""
        held = self._held.get(slot)
        if held is None:
            held = self._held[slot] = set()
            self._bits[slot] = 1 << slot
        bit, holders = self._bits[slot], self.holders
        known = holders.get
        for block in blocks:
            others = known(block)
            holders[block] = bit if others is None else others | bit
            held.add(block)

    def remove(self, slot: int, blocks: Iterable[bytes]) -> None:
        """Note that a slot holds these blocks no longer; unknown ones are ignored."""
        held = self._held.get(slot)
        if held is None:
            return
        bit = self._bits[slot]
        for block in blocks:
            if block in held:
                held.remove(block)
                self._let_go(block, bit)

    def clear(self, slot: int) -> None:
        """Note that a slot holds nothing."""
        held = self._held.pop(slot, None)
        if held is not None:
            bit = self._bits.pop(slot)
            for block in held:
                self._let_go(block, bit)

    def _let_go(self, block: bytes, bit: int) -> None:
        left = self.holders[block] & ~bit
        if left:
            self.holders[block] = left
        else:
            del self.holders[block]


class Chain:
    """The block hashes of one prompt, made as they are asked for; see ``blocks.py``.

    ``packed`` are its tokens as bytes, ``step`` the bytes of one block. ``rest`` yields the tokens of
    those blocks whose hashes are not ``known`` yet.
    """

    __slots__ = ("known", "rest", "root")

    def __init__(self, packed: bytes, step: int, root: bytes) -> None:
        self.known: list[bytes] = []
        self.root = root
        whole = memoryview(packed)[: len(packed) // step * step]
        self.rest: Iterator[tuple[bytes]] = Struct(f"{step}s").iter_unpack(whole)

    def all(self) -> Sequence[bytes]:
        """Return all hashes."""
        known = self.known
        parent = known[-1] if known else self.root
        for (tokens,) in self.rest:
            parent = blake2b(parent + tokens, digest_size=HASH_BYTES).digest()
            known.append(parent)
        return known


def match(
    chain: Chain, tables: tuple[dict[bytes, int], dict[bytes, int]], among: int
) -> list[tuple[int, int]]:
    """Return (blocks, slots) groups: the slots, as bits, that hold so many leading blocks of a prompt.

    ``among`` are the slots to look at; those that hold no first block are in no group. A block counts
    when either of ``tables`` knows it. Hashes are made only as far as somebody holds the blocks.
    """
    groups: list[tuple[int, int]] = []
    known, first = chain.known, tables[0].get
    second = tables[1].get if tables[1] else None
    depth = 0
    for block in known:
        held = first(block, 0)
        if second is not None:
            held |= second(block, 0)
        still = among & held
        if still != among:
            if depth:
                groups.append((depth, among ^ still))
            if not still:
                return groups
            among = still
        depth += 1
    # The same for hashes that are made on the way. As blocks.py has it; both inline, because this is
    # where a router spends its time.
    parent = known[-1] if known else chain.root
    for (tokens,) in chain.rest:
        parent = blake2b(parent + tokens, digest_size=HASH_BYTES).digest()
        known.append(parent)
        held = first(parent, 0)
        if second is not None:
            held |= second(parent, 0)
        still = among & held
        if still != among:
            if depth:
                groups.append((depth, among ^ still))
            if not still:
                return groups
            among = still
        depth += 1
    if depth:
        groups.append((depth, among))
    return groups
