"""The side of images that ingresses ask: references in, items out, kept until they are not needed.

What an item is made of, and how, is ``media_maker.py``'s; here is who asked, for how long, and what they are
told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import structlog

from trtllm_workers.errors import (
    EngineError,
    LaunchError,
    MediaRejected,
    Overloaded,
    PeerLost,
    Unavailable,
)
from trtllm_workers.planes.base import Peer
from trtllm_workers.planes.media_messages import EncodeAsk, Encoded, EncodeDone, EncodeFailed
from trtllm_workers.planes.messages import Message
from trtllm_workers.transfer.media_store import Entry, MediaStore
from trtllm_workers.types import Address, MediaReference
from trtllm_workers.worker.media_maker import ItemMaker, Made
from trtllm_workers.worker.media_meters import ENCODE, MediaMeters

log = structlog.get_logger(__name__)

# Asks that are under way or wait; beyond that, more would only wait in vain.
MAX_ASKS = 256
# An ingress says when it needs the items no more. One that does not, for so long after its own deadline,
# has forgotten them.
HOLD_S = 600.0
_LONGEST_S = 600.0


@dataclass(slots=True, eq=False)
class _Ask:
    """What one ingress wants. ``entries`` are pinned; ``timer`` runs once they are told."""

    peer: Peer
    number: int
    timeout_s: float
    task: asyncio.Task[None] | None = None
    entries: list[Entry] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None
    stopped: LaunchError | None = None

    @property
    def told(self) -> bool:
        return self.timer is not None


class EncodeDesk:
    """Images that ingresses ask this worker for. Ends what it started in ``close``.

    The items of an ask stay until EncodeDone, the loss of its connection, or ``hold_s`` after its deadline.
    One ask that fails touches no other.
    """

    def __init__(
        self,
        worker_id: str,
        maker: ItemMaker,
        store: MediaStore,
        address: Address,
        meters: MediaMeters,
        *,
        max_items: int,
        max_asks: int = MAX_ASKS,
        hold_s: float = HOLD_S,
    ) -> None:
        self._worker_id = worker_id
        self._maker = maker
        self._store = store
        self._address = address
        self._meters = meters
        self._max_items = max_items
        self._max_asks = max_asks
        self._hold_s = hold_s
        self._asks: dict[tuple[str, str, int], _Ask] = {}
        self._draining = ""

    @property
    def num_open(self) -> int:
        """Asks that are under way, or whose items somebody needs."""
        return len(self._asks)

    @property
    def num_working(self) -> int:
        """Asks that have not been answered."""
        return sum(not ask.told for ask in self._asks.values())

    # --- messages ------------------------------------------------------------------------------

    def on_message(self, peer: Peer, message: Message) -> bool:
        """Take a message of an ingress about items; False when it is none."""
        if isinstance(message, EncodeAsk):
            self._ask(peer, message)
        elif isinstance(message, EncodeDone):
            ask = self._asks.get(_key(peer, message.ask))
            if ask is not None:
                self._let_go(ask)
        else:
            return False
        return True

    def _ask(self, peer: Peer, message: EncodeAsk) -> None:
        try:
            self._check(peer, message)
        except LaunchError as error:
            self._tell_failure(peer, message.ask, error)
            return
        ask = _Ask(peer, message.ask, min(max(message.timeout_s, 0.0), _LONGEST_S))
        self._asks[_key(peer, message.ask)] = ask
        ask.task = asyncio.create_task(
            self._story(ask, message.references), name=f"encode {message.ask}"
        )
        ask.task.add_done_callback(lambda task: self._ended(ask, task))

    def _check(self, peer: Peer, message: EncodeAsk) -> None:
        if self._draining:
            raise Unavailable(f"worker {self._worker_id} is draining: {self._draining}")
        if _key(peer, message.ask) in self._asks:
            raise LaunchError(f"ask {message.ask} is under way already")
        if len(message.references) > self._max_items:
            raise self._too_many(message.references[self._max_items])
        if self.num_working >= self._max_asks:
            raise Overloaded(
                f"{self._max_asks} requests with images wait at worker {self._worker_id} already; try again "
                "later (the operator can add encode workers)"
            )

    def _too_many(self, reference: MediaReference) -> MediaRejected:
        return MediaRejected(
            f"a request may have {self._max_items} images at most, those in files of embeddings counted one "
            "by one (the operator can raise --max-images)",
            param=reference.param,
        )

    # --- one ask -------------------------------------------------------------------------------

    async def _story(self, ask: _Ask, references: Sequence[MediaReference]) -> None:
        try:
            try:
                async with asyncio.timeout(ask.timeout_s):
                    made = await self._make(ask, references)
            except TimeoutError:
                raise Overloaded(
                    f"the images of this request were not ready within {ask.timeout_s:g} s; worker "
                    f"{self._worker_id} has {self.num_working} requests with images to see to; try again later"
                ) from None
            self._answer(ask, made)
        except LaunchError as error:
            self._tell_failure(ask.peer, ask.number, error)
        except Exception:  # the border: one ask must not end the others
            log.exception("images of a request failed in the worker", ask=ask.number)
            # Not what it was: that may name a file, and the client would read it.
            inside = EngineError(f"internal error in worker {self._worker_id}; see its log")
            self._tell_failure(ask.peer, ask.number, inside)

    def _ended(self, ask: _Ask, task: asyncio.Task[None]) -> None:
        # Here and not in the story: a task that is cancelled before its first step never tells one.
        if task.cancelled() and ask.stopped is not None:
            self._tell_failure(ask.peer, ask.number, ask.stopped)
        if not ask.told:
            self._forget(ask)

    async def _make(self, ask: _Ask, references: Sequence[MediaReference]) -> list[list[Made]]:
        async def one(reference: MediaReference) -> list[Made]:
            made = await self._maker.make(reference)
            ask.entries += [item.entry for item in made]
            if len(ask.entries) > self._max_items:
                raise self._too_many(reference)
            return made

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(reference)) for reference in references]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    def _answer(self, ask: _Ask, made: list[list[Made]]) -> None:
        items = [
            [
                # Its entry may have come from another worker, or from another place in a prompt.
                msgspec.structs.replace(one.entry.item, holder=self._address, offset=0)
                for one in several
            ]
            for several in made
        ]
        num_cached = sum(one.cached for several in made for one in several)
        ask.peer.send(Encoded(ask.number, items, num_cached))
        ask.timer = asyncio.get_running_loop().call_later(
            ask.timeout_s + self._hold_s, self._expire, ask
        )

    def _tell_failure(self, peer: Peer, number: int, error: LaunchError) -> None:
        code = error.code or EngineError.code or ""
        self._meters.failed(ENCODE, code)
        try:
            peer.send(EncodeFailed(number, code, str(error), error.param))
        except PeerLost:
            return  # peer_lost tells the rest

    # --- the end of an ask ---------------------------------------------------------------------

    def _expire(self, ask: _Ask) -> None:
        log.warning(
            "an ingress has never said that it needs these images no more; they may go",
            peer=str(ask.peer.address),
            ask=ask.number,
            items=len(ask.entries),
        )
        self._let_go(ask)

    def _let_go(self, ask: _Ask) -> None:
        """Stop the work, or let the items go."""
        if ask.told:
            self._forget(ask)
        elif ask.task is not None:
            ask.task.cancel()

    def _forget(self, ask: _Ask) -> None:
        key = _key(ask.peer, ask.number)
        if self._asks.get(key) is ask:
            del self._asks[key]
        if ask.timer is not None:
            ask.timer.cancel()
        entries, ask.entries = ask.entries, []
        for entry in entries:
            self._store.unpin(entry)

    def peer_lost(self, peer: Peer) -> None:
        """Let go what was meant for an ingress that is gone."""
        for ask in [ask for ask in self._asks.values() if ask.peer is peer]:
            self._let_go(ask)

    def drain(self, reason: str) -> None:
        """Take no new ask; those under way are finished."""
        self._draining = reason

    def abort_all(self) -> None:
        """Give up every ask: the worker is going down."""
        for ask in list(self._asks.values()):
            ask.stopped = Unavailable(f"worker {self._worker_id} is going down")
            self._let_go(ask)

    async def close(self) -> None:
        """End every ask, let all items go, and end what makes them."""
        tasks = [ask.task for ask in self._asks.values() if ask.task is not None]
        self.abort_all()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # what is called when they end has been called then
        await self._maker.close()


def _key(peer: Peer, number: int) -> tuple[str, str, int]:
    return peer.address.peer_id, peer.address.incarnation, number
