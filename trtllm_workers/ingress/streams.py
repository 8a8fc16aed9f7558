"""Which stream number is whose: frames from workers find their choice here. Knows no HTTP.

No queue and no task per token: ``on_tokens`` runs in the connection's read callback and calls
the choice, which writes to its client.
"""

from __future__ import annotations

from collections.abc import Iterable

import structlog

from trtllm_workers.errors import PeerLost
from trtllm_workers.ingress.choice import Choice
from trtllm_workers.ingress.fleet import Worker
from trtllm_workers.planes.frames import columns
from trtllm_workers.planes.messages import Abort, Submit, Tokens
from trtllm_workers.types import Address, GenerateRequest

_LAST_NUMBER = 0xFFFFFFFF

log = structlog.get_logger(__name__)


class Streams:
    """The streams in flight of one ingress. ``reply_to`` is the ingress's own plane address."""

    def __init__(self, reply_to: Address) -> None:
        self._reply_to = reply_to
        self._choices: dict[int, Choice] = {}
        self._places: dict[Choice, tuple[int, Worker]] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._choices)

    def submit(self, choice: Choice, worker: Worker, request: GenerateRequest) -> None:
        """Send a request to a worker; its tokens go to ``choice``. Raises PeerLost."""
        peer = worker.peer
        if peer is None:
            raise PeerLost(f"worker {worker.worker_id} is not connected")
        number = self._number()
        peer.send(Submit(number, request, self._reply_to))
        self._choices[number] = choice
        self._places[choice] = (number, worker)
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
        return place[1] if place is not None else None

    def on_worker(self, worker: Worker) -> list[Choice]:
        """Return the choices whose tokens this worker makes."""
        return [choice for choice, (_, where) in self._places.items() if where is worker]

    def release(self, choice: Choice) -> None:
        """Forget a choice: late frames for it are dropped."""
        place = self._places.pop(choice, None)
        if place is not None:
            number, worker = place
            del self._choices[number]
            worker.in_flight -= 1

    def abort(self, choices: Iterable[Choice]) -> int:
        """Forget the choices and tell their workers to stop. Returns how many were running."""
        by_worker: dict[Worker, list[int]] = {}
        for choice in choices:
            place = self._places.get(choice)
            if place is not None:
                by_worker.setdefault(place[1], []).append(place[0])
                self.release(choice)
        for worker, numbers in by_worker.items():
            if worker.peer is None:
                continue
            try:
                worker.peer.send(Abort(numbers, self._reply_to))
            except PeerLost:
                continue  # its worker aborts on its own what a lost ingress had asked for
        return sum(map(len, by_worker.values()))

    def on_tokens(self, message: Tokens) -> None:
        """Hand the tokens of one engine step to their choices."""
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
                try:
                    choice.on_chunk(chunk)
                except Exception as error:  # noqa: BLE001  one stream must not end the others
                    self._failed(choice, error)

    def _failed(self, choice: Choice, error: Exception) -> None:
        log.exception("stream failed in the ingress", request_id=choice.request.request_id)
        choice.fail(error)
