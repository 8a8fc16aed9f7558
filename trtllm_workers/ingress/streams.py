"""Which stream number is whose: frames from workers find their choice here. Knows no HTTP.

No queue and no task per token: ``on_tokens`` runs in the connection's read callback and calls
the choice, which writes to its client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from trtllm_workers.errors import PeerLost
from trtllm_workers.ingress.choice import Choice
from trtllm_workers.ingress.served import Placement, Worker
from trtllm_workers.planes.base import Peer
from trtllm_workers.planes.frames import columns
from trtllm_workers.planes.messages import Abort, Submit, Tokens
from trtllm_workers.router.pool import Charge
from trtllm_workers.types import Address, FinishReason, GenerateRequest

_LAST_NUMBER = 0xFFFFFFFF
# Ends of a stream that say nothing about its prompt having been computed.
_FAILED = (FinishReason.ABORT, FinishReason.ERROR)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a choice's tokens are made. ``first`` got the request; with ``decode`` it hands over."""

    number: int
    first: Worker
    decode: Worker | None
    charges: tuple[Charge, ...]

    @property
    def workers(self) -> tuple[Worker, ...]:
        return (self.first,) if self.decode is None else (self.first, self.decode)


class Streams:
    """The streams in flight of one ingress. ``reply_to`` is the ingress's own plane address.

    ``charge`` tells the router that a request was sent; what it returns is told how that goes on.
    """

    def __init__(
        self, reply_to: Address, charge: Callable[[Placement], tuple[Charge, ...]]
    ) -> None:
        self._reply_to = reply_to
        self._charge = charge
        self._choices: dict[int, Choice] = {}
        self._places: dict[Choice, _Place] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._choices)

    def submit(self, choice: Choice, to: Placement, request: GenerateRequest) -> None:
        """Send a request to its first worker; its tokens go to ``choice``. Raises PeerLost."""
        peer = to.worker.peer
        if peer is None:
            raise PeerLost(f"worker {to.worker.worker_id} is not connected")
        number = self._number()
        decode = to.decode.record.address if to.decode is not None else None
        prefill = to.prefill.record.address if to.prefill is not None else None
        peer.send(Submit(number, request, self._reply_to, decode, prefill))
        self._choices[number] = choice
        place = self._places[choice] = _Place(number, to.worker, to.decode, self._charge(to))
        for worker in place.workers:
            worker.in_flight += 1

    def _number(self) -> int:
        number = self._next
        while number in self._choices:
            number = number + 1 if number < _LAST_NUMBER else 1
        self._next = number + 1 if number < _LAST_NUMBER else 1
        return number

    def worker_of(self, choice: Choice) -> Worker | None:
        """Return the worker that makes this choice's tokens, if any does."""
        place = self._places.get(choice)
        return place.workers[-1] if place is not None else None

    def on_worker(self, worker: Worker) -> list[Choice]:
        """Return the choices that need this worker.

        One whose tokens come from a decode worker needs its prefill worker no longer.
        """
        return [
            choice
            for choice, place in self._places.items()
            if worker is place.workers[-1] or (worker is place.first and not choice.first_s)
        ]

    def release(self, choice: Choice) -> None:
        """Forget a choice that its worker has ended: late frames for it are dropped."""
        place = self._places.pop(choice, None)
        if place is not None:
            del self._choices[place.number]
            for worker in place.workers:
                worker.in_flight -= 1
            for charge in place.charges:
                charge.ended()

    def drop(self, choice: Choice) -> None:
        """Forget a choice that a worker failed; the other one of a chain is told to stop."""
        place = self._places.get(choice)
        if place is not None and place.decode is not None:
            self.abort((choice,))
        else:
            self.release(choice)

    def abort(self, choices: Iterable[Choice]) -> int:
        """Forget the choices and tell their workers to stop. Returns how many were running."""
        by_worker: dict[Worker, list[int]] = {}
        count = 0
        for choice in choices:
            place = self._places.get(choice)
            if place is not None:
                count += 1
                for worker in place.workers:
                    by_worker.setdefault(worker, []).append(place.number)
                self.release(choice)
        for worker, numbers in by_worker.items():
            if worker.peer is not None:
                self._tell_abort(worker.peer, numbers)
        return count

    def _tell_abort(self, peer: Peer, numbers: list[int]) -> None:
        try:
            peer.send(Abort(numbers, self._reply_to))
        except PeerLost:
            return  # its worker aborts on its own what a lost ingress had asked for

    def on_tokens(self, peer: Peer, message: Tokens) -> None:
        """Hand the tokens of one engine step to their choices.

        A stream that nobody here knows any more is aborted at its worker: an abort may have met it
        between a prefill and a decode worker. Its first chunk is never a bare token.
        """
        unknown: list[int] = []
        find = self._choices.get
        if message.streams:
            for number, token_id in zip(*columns(message), strict=True):
                choice = find(number)
                if choice is not None:
                    try:
                        choice.on_token(token_id)
                    except Exception as error:  # noqa: BLE001  one stream must not end the others
                        self._failed(choice, error)
        for number, chunk in message.rich:
            choice = find(number)
            if choice is not None:
                if not choice.first_s and chunk.finish_reason not in _FAILED:
                    for charge in self._places[choice].charges:
                        charge.computed()
                try:
                    choice.on_chunk(chunk)
                except Exception as error:  # noqa: BLE001  one stream must not end the others
                    self._failed(choice, error)
            elif chunk.finish_reason is None:
                unknown.append(number)
        if unknown:
            self._tell_abort(peer, unknown)

    def _failed(self, choice: Choice, error: Exception) -> None:
        log.exception("stream failed in the ingress", request_id=choice.request.request_id)
        choice.fail(error)
