"""The contract of transports: how KV bytes move between two pools. Holds no socket.

tests/contract/test_kv_transport.py checks each line on every transport.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from trtllm_workers.errors import LayoutMismatch
from trtllm_workers.types import KvLayout, TransportCard


@dataclass(frozen=True, slots=True)
class KvPool:
    """All blocks of one engine, as transports see them.

    Block ``i`` is ``layout.block_bytes`` bytes from ``i * layout.block_bytes`` on in ``memory``, a
    writable flat view of bytes that lives as long as the engine.
    """

    layout: KvLayout
    num_blocks: int
    memory: memoryview = field(repr=False)

    def block(self, block_id: int) -> memoryview:
        """Return the bytes of one block. Raises IndexError outside the pool."""
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} is outside the pool of {self.num_blocks}")
        first = block_id * self.layout.block_bytes
        return self.memory[first : first + self.layout.block_bytes]


OnNotify = Callable[[str, bytes], None]


class KvLink(Protocol):
    """A transport's way to one peer's pool.

    * ``read`` copies the peer's blocks ``remote`` into ours ``local``, pairwise and in any scatter; when
      it returns the bytes are there. ``write`` is the other direction; when it returns, the bytes
      are in the peer's memory. Several may run at once.
    * Both raise TransferFailed, naming the peer and the cause: wrong block id on either side
      (nothing is moved), peer gone, ``timeout_s`` over. **When they raise or are cancelled, the bytes
      have stopped moving**: local blocks may be given to somebody else. Cancelling ``read`` or ``write``
      therefore may take until ``timeout_s``.
    * ``notify`` gives the peer's ``on_notify`` our peer_id and the message, once, after all bytes of
      writes that returned before.
    * ``wire`` says what is observed to carry the bytes, for example ``shm`` or ``tcp``; never guessed:
      ``unknown`` where the library does not tell.
    * After ``close`` every call raises TransferFailed; safe twice.
    """

    @property
    def peer_id(self) -> str: ...
    @property
    def wire(self) -> str: ...

    async def read(self, remote: Sequence[int], local: Sequence[int], timeout_s: float) -> None: ...
    async def write(
        self, local: Sequence[int], remote: Sequence[int], timeout_s: float
    ) -> None: ...
    async def notify(self, message: bytes, timeout_s: float) -> None: ...
    async def close(self) -> None: ...


class KvTransport(Protocol):
    """Moves blocks between this process's pool and those of its peers.

    * ``start`` registers the pool; TransportUnavailable says what is missing and what to install.
      ``card`` is what a peer needs to connect, and is secret: whoever has it may read the pool.
    * ``connect`` gives a link to the owner of ``card`` within ``timeout_s``. It raises LayoutMismatch,
      which shows both layouts, before any byte has moved; TransferFailed when the peer is not there
      or uses another transport.
    * Blocks that nobody reads or writes cost no CPU: an idle transport does not spin.
    * A peer that dies or stands still disturbs no other link.
    * ``close`` ends all links; safe after a failed ``start`` and safe twice; afterwards no thread, task,
      socket or shared memory of the transport is left.
    """

    @property
    def name(self) -> str: ...

    async def start(self, pool: KvPool) -> None: ...
    def card(self) -> TransportCard: ...
    async def connect(self, card: TransportCard, timeout_s: float) -> KvLink: ...
    async def close(self) -> None: ...


def check_layouts(ours: KvLayout, theirs: KvLayout, peer_id: str) -> None:
    """Raise LayoutMismatch, naming every field that differs with both values."""
    differences = [
        f"{name} is {getattr(ours, name)} here and {getattr(theirs, name)} there"
        for name in KvLayout.__struct_fields__
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if differences:
        raise LayoutMismatch(
            f"KV blocks of {peer_id} do not fit this worker's: {'; '.join(differences)}; "
            "prefill and decode need the same model, KV dtype and tokens_per_block"
        )


def check_block_ids(
    ours: KvPool, local: Sequence[int], remote: Sequence[int], num_remote: int
) -> str | None:
    """Return what is wrong with the ids of a read or write, or None.

    ``num_remote`` is the number of blocks in the peer's pool.
    """
    if len(local) != len(remote):
        return f"{len(remote)} remote blocks for {len(local)} local ones"
    for block_id in local:
        if not 0 <= block_id < ours.num_blocks:
            return f"local block {block_id} is outside the pool of {ours.num_blocks}"
    for block_id in remote:
        if not 0 <= block_id < num_remote:
            return f"remote block {block_id} is outside its pool of {num_remote}"
    return None
