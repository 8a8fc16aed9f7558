"""Which transport TensorRT-LLM's KV transceiver really uses: its log is the only one that says so.

The transceiver is C++ and logs to the process's standard output, from every rank. The launcher keeps
that in a file, and there the names of its classes are looked for. Asks nobody and believes no setting.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

# Class names that appear in log lines when a transceiver starts.
_MARKERS = {
    b"NixlTransferAgent": "NIXL",
    b"MooncakeTransferAgent": "MOONCAKE",
    b"UcxConnectionManager": "UCX",
    b"MpiConnectionManager": "MPI",
}
_LONGEST = max(map(len, _MARKERS))
_CHUNK_BYTES = 1 << 20
_LOOK_INTERVAL_S = 0.05


class LogMarker:
    """Looks through a growing log, from ``begin`` on: what stands before is of an earlier process."""

    def __init__(self, path: Path, begin: int) -> None:
        self._path = path
        self._at = begin
        self._rest = b""
        self.found = ""

    def look(self) -> str:
        """Read what is new; return the transport's name, or "" while no marker has appeared."""
        try:
            with self._path.open("rb") as log:
                log.seek(self._at)
                while not self.found and (chunk := log.read(_CHUNK_BYTES)):
                    self._at += len(chunk)
                    self._take(chunk)
        except OSError:
            return self.found  # the log was moved away; nothing is known, so nothing is said
        return self.found

    def _take(self, chunk: bytes) -> None:
        text = self._rest + chunk
        places = {text.find(marker): name for marker, name in _MARKERS.items() if marker in text}
        if places:
            self.found = places[min(places)]
        self._rest = text[-_LONGEST:]

    async def wait(self, timeout_s: float) -> str:
        """Look until a marker has appeared, at most so long: lines reach the file a little late."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                # A file that grows tells nobody; this lasts a moment, once per start.
                while not self.look():  # noqa: ASYNC110
                    await asyncio.sleep(_LOOK_INTERVAL_S)
        return self.found


def end_of(path: Path) -> int:
    """Return how long a log is now; 0 for one that does not exist."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
