"""An executor that makes tokens up: one per stream and step, a batch per step. For measuring its readers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from .engine import Work, _put_all
from .result import Response


class FreeExecutor:
    """Gives every stream one token per step, as fast as its readers take them."""

    vocab_size = 1 << 30

    def __init__(self, *_args: Any, **_more: Any) -> None:
        self._works: dict[int, Work] = {}
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._stopped = False
        self._taken = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, work: Work) -> None:
        """Begin a request."""
        with self._lock:
            self._works[work.number] = work
        self._news.set()

    def abort(self, number: int) -> None:
        """End a request."""
        with self._lock:
            work = self._works.pop(number, None)
        if work is not None and work.output.loop is not None:
            response = Response(finish_reason="cancelled")
            work.output.loop.call_soon_threadsafe(work.output.put, response)

    def call(self, function: Callable[..., None], *args: Any) -> None:
        """Run something now."""
        function(*args)

    def shutdown(self) -> None:
        """End the thread."""
        self._stopped = True
        self._news.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stopped:
            if not self._works:
                self._news.wait()
                self._news.clear()
                continue
            with self._lock:
                works = list(self._works.values())
            batch = []
            for work in works:
                work.tokens.append(7)
                ended = len(work.tokens) >= work.sampling.max_tokens
                if ended:
                    with self._lock:
                        self._works.pop(work.number, None)
                batch.append((work.output, Response([7], "length" if ended else None)))
            loop = works[0].output.loop
            if loop is None:
                continue
            self._taken.clear()
            try:
                loop.call_soon_threadsafe(self._give, batch)
            except RuntimeError:
                return
            self._taken.wait(5)

    def _give(self, batch: list[Any]) -> None:
        _put_all(batch)
        # The next step is made once these have been read.
        batch[0][0].loop.call_soon(self._taken.set)
