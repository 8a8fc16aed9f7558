"""Ends a worker that was asked to over the request plane: drain, and KILL when that does not help."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable

import structlog

from trtllm_workers.planes.messages import StopAsk

log = structlog.get_logger(__name__)

# After the drain the parts are closed; a process that is not gone then never will be.
_CLOSE_GRACE_S = 10.0


class Stopping:
    """How this process ends. ``drain_timeout_s`` is what was configured, or what the asker gave.

    ``tell_launcher`` returns True when the launcher that started this process was told: it then ends
    all its processes in order, this one among them. Otherwise ``stop`` is set and a thread of our own
    sees to it that the process is gone when drain and close take too long, as nobody else would.
    """

    def __init__(
        self,
        stop: asyncio.Event,
        drain_timeout_s: float,
        tell_launcher: Callable[[], bool] | None = None,
        kill: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGKILL),
    ) -> None:
        self._stop = stop
        self.drain_timeout_s = drain_timeout_s
        self._tell_launcher = tell_launcher
        self._kill = kill
        self._asked = False

    def ask(self, message: StopAsk) -> None:
        """End; asked again, nothing more happens."""
        if self._asked:
            return
        self._asked = True
        if self._tell_launcher is not None and self._tell_launcher():
            log.info("the launcher of this run was told to stop it")
            return
        self.drain_timeout_s = message.drain_timeout_s
        last = threading.Timer(message.drain_timeout_s + _CLOSE_GRACE_S, self._kill)
        last.daemon = True
        last.start()
        self._stop.set()
