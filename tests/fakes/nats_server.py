"""A real nats-server on a free port of this host, in a folder of its own. Ends what it started."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAM = Path(sysconfig.get_path("scripts")) / "nats-server"
START_TIMEOUT_S = 20.0


class NatsServer:
    """One server; ``stop`` and ``start`` keep its port and its store."""

    def __init__(self, folder: Path, *options: str, config: str = "") -> None:
        self.folder = folder
        self.port = -1
        self._options = options
        self._config = config
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob("*.ports"):
            old.unlink()
        words = [
            *(str(PROGRAM), "-a", "127.0.0.1", "-p", str(self.port), "-js"),
            *("-sd", str(self.folder), "--ports_file_dir", str(self.folder), *self._options),
        ]
        if self._config:
            (self.folder / "nats.conf").write_text(self._config)
            words += ["-c", str(self.folder / "nats.conf")]
        with (self.folder / "log").open("ab") as log:
            self._popen = subprocess.Popen(words, stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert self._popen.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            for path in self.folder.glob("*.ports"):
                with contextlib.suppress(ValueError, IndexError, KeyError):
                    self.port = int(json.loads(path.read_text())["nats"][0].rpartition(":")[2])
                    return
            time.sleep(0.005)

    def stop(self) -> None:
        """End it as a crash would."""
        if self._popen is not None:
            self._popen.send_signal(signal.SIGKILL)
            self._popen.wait(10)
            self._popen = None


@contextlib.contextmanager
def nats_server(folder: Path, *options: str, config: str = "") -> Iterator[NatsServer]:
    made = NatsServer(folder, *options, config=config)
    made.start()
    try:
        yield made
    finally:
        made.stop()
