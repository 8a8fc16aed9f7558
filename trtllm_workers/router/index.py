"""Which workers hold which KV block: one table for all workers of a pool.

Workers are numbered by slot. A block's holders are the bits of one integer: the prefix of a prompt is
matched against a thousand workers with one AND per block, and a block that one worker holds costs no
integer of its own. Knows no worker's name and no sequence number.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from hashlib import blake2b
from struct import Struct

from trtllm_workers.blocks import HASH_BYTES, Marks

_NOTHING: frozenset[bytes] = frozenset()


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

    def of_slot(self, slot: int) -> Set[bytes]:
        """Return the blocks that a slot holds."""
        return self._held.get(slot, _NOTHING)

    def missing(self, slot: int, blocks: Sequence[bytes]) -> Sequence[bytes]:
        """Return those of ``blocks`` that a slot does not hold, in order."""
        held = self.of_slot(slot)
        return [block for block in blocks if block not in held]

    def store(self, slot: int, blocks: Collection[bytes]) -> None:
        """Note that a slot holds these blocks, perhaps as before."""
        held = self._held.get(slot)
        if held is None:
            held = self._held[slot] = set()
            self._bits[slot] = 1 << slot
        bit, holders = self._bits[slot], self.holders
        held.update(blocks)
        if holders.keys().isdisjoint(blocks):  # mostly; and then there is no need to look at each
            holders.update(dict.fromkeys(blocks, bit))
            return
        known = holders.get
        for block in blocks:
            others = known(block)
            holders[block] = bit if others is None else others | bit

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

    ``packed`` are its tokens as bytes, ``step`` the bytes of one block; ``marks`` are what the hashes of
    blocks with images cover besides tokens.
    """

    __slots__ = ("_marks", "_rest", "_root", "known")

    def __init__(self, packed: bytes, step: int, root: bytes, marks: Marks | None = None) -> None:
        self.known: list[bytes] = []
        self._root = root
        self._marks = marks
        whole = memoryview(packed)[: len(packed) // step * step]
        self._rest: Iterator[tuple[bytes]] = Struct(f"{step}s").iter_unpack(whole)

    def __iter__(self) -> Iterator[bytes]:
        """Yield all hashes; those that were asked for before are not made again."""
        known = self.known
        yield from known
        parent = known[-1] if known else self._root
        if self._marks is not None:
            yield from self._marked(parent, self._marks)
            return
        # As blocks.py has it, inline: this is where a router spends its time.
        for (tokens,) in self._rest:
            parent = blake2b(parent + tokens, digest_size=HASH_BYTES).digest()
            known.append(parent)
            yield parent

    def _marked(self, parent: bytes, marks: Marks) -> Iterator[bytes]:
        """Make the hashes of a prompt with images."""
        known = self.known
        for (tokens,) in self._rest:
            mark = marks.get(len(known), b"")
            parent = blake2b(parent + tokens + mark, digest_size=HASH_BYTES).digest()
            known.append(parent)
            yield parent

    def all(self) -> Sequence[bytes]:
        """Return all hashes."""
        for _ in self:
            pass
        return self.known


def match(
    chain: Chain, held: BlockIndex, expected: BlockIndex, among: int
) -> list[tuple[int, int]]:
    """Return (blocks, slots) groups: the slots, as bits, that hold so many leading blocks of a prompt.

    ``among`` are the slots to look at; those that hold no first block are in no group. A block counts
    when either index has it. Hashes are made only as far as somebody holds the blocks.
    """
    groups: list[tuple[int, int]] = []
    first = held.holders.get
    second = expected.holders.get if expected.holders else None
    depth = 0
    hashes = iter(chain)
    alone = among & (among - 1) == 0
    if not alone:
        for block in hashes:
            still = among & first(block, 0)
            if still != among:
                if second is not None:
                    still |= among & second(block, 0)
                if still != among:
                    if depth:
                        groups.append((depth, among ^ still))
                    if not still:
                        return groups
                    among = still
                    alone = among & (among - 1) == 0
            depth += 1
            if alone:
                break
    if alone:
        # One worker's own set is small enough for a processor's cache; the table of all blocks is not,
        # and looking there takes four times as long.
        number = among.bit_length() - 1
        its_own, its_expected = held.of_slot(number), expected.of_slot(number)
        for block in hashes:
            if block not in its_own and block not in its_expected:
                break
            depth += 1
    if depth:
        groups.append((depth, among))
    return groups
