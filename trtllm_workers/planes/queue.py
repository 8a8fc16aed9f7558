"""The contract of work queues: each item is done once by somebody, whoever dies meanwhile.

tests/contract/test_work_queue.py checks each line.
"""

from __future__ import annotations

import hmac
from typing import Protocol

# Without word of its taker for so long an item is given to somebody else.
ACK_WAIT_S = 5.0


def queue_token(secret: bytes) -> str:
    """Return what a run's own queue server asks for: made from the cluster secret, which it cannot tell."""
    return hmac.new(secret, b"prefill queue", "sha256").hexdigest()


class Item(Protocol):
    """One item, taken. It is this taker's until it says otherwise or is silent for the ack wait.

    * ``ack``: done, and gone from the queue. ``nak``: not done; somebody gets it after ``delay_s``.
      ``working``: not done yet; the ack wait begins anew.
    * None of them raises or waits for the server. Without a server what they say is lost, so the item
      comes again: whoever takes it must be able to find out that it was done.
    * ``num_deliveries`` counts how often it was given to somebody, this time included.
    """

    @property
    def body(self) -> bytes: ...
    @property
    def num_deliveries(self) -> int: ...

    async def ack(self) -> None: ...
    async def nak(self, delay_s: float = 0.0) -> None: ...
    async def working(self) -> None: ...


class WorkQueue(Protocol):
    """Work that any process may put and any may take.

    * ``put`` returns a handle once the item is kept. It raises QueueFull when ``depth`` has reached the
      queue's limit, which is exact whoever puts at the same time, and QueueAway when the server does not
      answer, at once where that is known: the item may have been kept then.
    * ``take`` gives the oldest item that nobody works on, or None after ``timeout_s``; also None
      while the server is away. No two takers work on one item, unless one was silent for the ack wait.
    * ``remove`` takes an item out, whether somebody works on it or not; an unknown one is ignored. It
      never raises: an item that cannot be removed now goes by its age.
    * ``depth`` counts items not yet acknowledged: those that wait and those worked on. QueueAway.
    * ``stop_taking``: what was on its way to us is given back, so that nobody waits for it; items in
      hand may still be acknowledged. ``take`` returns None from then on.
    * An item older than the queue's greatest age goes by itself.
    * A server that goes away and comes back is found again without a call; what it kept is there.
    * ``close`` ends all of it, safe twice.
    """

    @property
    def connected(self) -> bool: ...

    async def put(self, body: bytes) -> int: ...
    async def remove(self, handle: int) -> None: ...
    async def depth(self) -> int: ...
    async def take(self, timeout_s: float) -> Item | None: ...
    async def stop_taking(self) -> None: ...
    async def close(self) -> None: ...
