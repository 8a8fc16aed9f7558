"""A small process per run that outlives the launcher by a moment. Knows no settings.

The launcher holds the other end of the guard's standard input and writes ``done`` when everything
has ended in order. When the pipe closes without that word, the launcher was killed: the guard then
ends whatever carries the run id (TERM, wait, KILL) and clears the run's folder and shared memory.

    python -m trtllm_workers.deploy.guard RUN_ID RUN_FOLDER GRACE_S
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from trtllm_workers.deploy import history, proc
from trtllm_workers.deploy.end import end_processes
from trtllm_workers.deploy.run import RunFolder, members_of
from trtllm_workers.deploy.shm import remove_left_overs

DONE = b"done\n"
_KILL_WAIT_S = 5.0


def watch(run_id: str, folder: RunFolder, grace_s: float) -> int:
    """Wait for the launcher's end; end what it left behind. Return how many processes that were."""
    said = b""
    while piece := os.read(0, 64):
        said += piece
    if said == DONE:
        return 0
    record = folder.read()
    recorded = record.processes if record and record.of_this_boot else ()

    def left_behind() -> list[proc.Proc]:
        known = [proc.same(one.pid, one.start_ticks) for one in recorded]
        found = {one.pid: one for one in (*known, *members_of(run_id)) if one is not None}
        found.pop(os.getpid(), None)
        return list(found.values())

    ended = end_processes(left_behind, grace_s, _KILL_WAIT_S)
    remove_left_overs(run_id)
    history.keep(folder, record, "launcher died", with_logs=True)
    kept = folder.remove(keep_logs=True)
    where = f"; their logs are in {folder.logs}" if kept else ""
    with suppress(OSError):  # the terminal may be gone with the launcher
        os.write(
            2,
            f"trtllm-launch: the launcher of run {run_id} died; "
            f"ended {len(ended.ended)} processes it left behind{where}\n".encode(),
        )
    return len(ended.ended)


def main() -> None:
    """Run as a process of its own."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    run_id, folder, grace_s = sys.argv[1:4]
    watch(run_id, RunFolder(Path(folder)), float(grace_s))


if __name__ == "__main__":
    main()
