"""A stand-in for an ingress or a worker: reports steps, answers HTTP, misbehaves when told to.

python fake_part.py ROLE STATUS_FILE [BEHAVIOUR ...]; standard library only, so it starts in no time.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

ROLE, STATUS_FILE, *BEHAVIOUR = sys.argv[1:]
# Under mpiexec only rank 0 reports, and a behaviour may be meant for one rank: "rank1:exit:2".
WORLD_RANK = os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK"))
RANK = WORLD_RANK or "0"
BEHAVIOUR = [
    word.removeprefix(f"rank{RANK}:")
    for word in BEHAVIOUR
    if not word.startswith("rank") or word.startswith(f"rank{RANK}:")
]
# A behaviour may be meant for one life of a part that is started again: "life1:exit:2" is the second.
with open(f"{STATUS_FILE}.{ROLE}-{RANK}.lives", "a+") as lives:
    lives.write(".")
    LIFE = lives.tell() - 1
BEHAVIOUR = [
    word.removeprefix(f"life{LIFE}:")
    for word in BEHAVIOUR
    if not word.startswith("life") or word.startswith(f"life{LIFE}:")
]


def report(step: str, **more: object) -> None:
    if RANK != "0":
        return
    draft = f"{STATUS_FILE}.tmp"
    with open(draft, "w") as file:
        json.dump({"step": step, "since": time.time(), **more}, file)
    os.replace(draft, STATUS_FILE)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def drain(*_: object) -> None:
    say("draining")
    os._exit(0)


def serve() -> None:
    """Answer every request with 200 (or the status that is asked for) and one small body."""
    status = next((word.removeprefix("http:") for word in BEHAVIOUR if "http:" in word), "200")
    listener = socket.create_server(("127.0.0.1", 0))
    report("listening", detail=f"http://127.0.0.1:{listener.getsockname()[1]}")
    body = b'{"error": {"message": "the fake says no"}}'
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)


def grandchild(*, own_session: bool) -> None:
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
    child = subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=own_session)
    say(f"grandchild {child.pid}")


def main() -> None:
    if "ignore-term" in BEHAVIOUR:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, drain)
    report("starting")
    for word in BEHAVIOUR:
        if word.startswith("print:"):
            sys.stdout.buffer.write(bytes.fromhex(word.removeprefix("print:")))
            sys.stdout.buffer.flush()
        elif word == "stuck":
            report("model", done=0.6)
            say("mapping shard 3 of 5")
            signal.pause()
        elif word.startswith("exit:"):
            sys.exit(int(word.removeprefix("exit:")))
        elif word in ("grandchild", "daemon"):
            grandchild(own_session=word == "daemon")
    again = f"life {LIFE} " if LIFE else ""
    who = again if WORLD_RANK is None else f"{again}rank {RANK} "
    say(f"{who}pid {os.getpid()}")
    if ROLE == "ingress":
        threading.Thread(target=serve, daemon=True).start()
    else:
        report("model", done=1.0)
        report("registered")
    while True:
        signal.pause()


main()
