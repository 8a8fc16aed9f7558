"""Looks at one node before anything is started on it: does it see what the parts need, is it alike?

    python -P -m trtllm_workers.deploy.slurm.preflight RUN_FOLDER

srun starts it once on each node. It writes what it found into the run's folder, so that neither a login
banner nor a module's chatter on the output can be taken for an answer.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from socket import AF_INET, AF_INET6, SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, socket

import msgspec

from trtllm_workers import __version__
from trtllm_workers.config.env import environment
from trtllm_workers.deploy.slurm import records
from trtllm_workers.deploy.slurm.addresses import choose
from trtllm_workers.deploy.trtllm_facts import quick_facts
from trtllm_workers.deploy.trtllm_host import refusal
from trtllm_workers.errors import LaunchError

QUESTIONS = "preflight.json"


class Questions(msgspec.Struct, frozen=True, kw_only=True):
    """What the driver wants to know of each node.

    ``files`` must be readable, by what they are; ``token`` is what the driver wrote into ``shared``.
    ``http`` is (host, port) that the head node's ingress will listen on. ``needs_trtllm`` and
    ``gpus`` are for engine trtllm.
    """

    files: dict[str, str]
    shared: str
    token: str
    head: str
    http: tuple[str, int]
    interface: str | None = None
    head_address: str | None = None
    needs_trtllm: bool = False
    gpus: int = 0


def main(words: Sequence[str]) -> int:
    """Check this node and write what was found."""
    folder = Path(words[0])
    questions = records.read(folder / QUESTIONS, Questions)
    here = environment()
    node = here.get("SLURMD_NODENAME") or os.uname().nodename
    if questions is None:
        sys.stderr.write(
            f"trtllm-launch: {node} does not see {folder / QUESTIONS}: the run's folder must lie on a file "
            "system that all nodes share\n"
        )
        return 3
    records.write(records.node_path(folder, node), look(questions, node, here))
    return 0


def look(questions: Questions, node: str, here: Mapping[str, str]) -> records.NodeRecord:
    """Return what was found on this node."""
    problems = [*_files(questions), *_shared(questions)]
    address = ""
    try:
        given = questions.head_address if node == questions.head else questions.interface
        address = choose(given, here.get("SLURMD_NODENAME") or None).address
    except LaunchError as wrong:
        problems.append(str(wrong))
    if node == questions.head:
        problems += _port(*questions.http)
    if questions.needs_trtllm:
        problems += _trtllm(questions, here)
    return records.NodeRecord(
        node=node,
        host=os.uname().nodename,
        address=address,
        version=__version__,
        python=platform.python_version(),
        now_s=time.time(),
        problems=tuple(problems),
    )


def _files(questions: Questions) -> list[str]:
    found = []
    for path, what in questions.files.items():
        try:
            kind = "" if Path(path).exists() else "does not exist there"
        except OSError as wrong:
            kind = f"cannot be read: {wrong.strerror}"
        if not kind and not os.access(path, os.R_OK):
            kind = "cannot be read by you"
        if kind:
            found.append(f"{what} {path} {kind}")
    return found


def _shared(questions: Questions) -> list[str]:
    try:
        told = Path(questions.shared).read_text(encoding="utf-8")
    except OSError as wrong:
        return [f"cannot read {questions.shared}: {wrong.strerror}"]
    return [] if told == questions.token else [f"sees another {questions.shared}: it is not shared"]


def _port(host: str, port: int) -> list[str]:
    if port == 0:
        return []
    family = AF_INET6 if ":" in host else AF_INET
    with closing(socket(family, SOCK_STREAM)) as probe:
        probe.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as wrong:
            return [
                f"port {port} of {host} cannot be had: {wrong.strerror}; choose another with --http-port, or "
                "0 for a free one"
            ]
    return []


def _trtllm(questions: Questions, here: Mapping[str, str]) -> list[str]:
    facts = quick_facts(here)
    found = []
    if facts.version is None:
        found.append(refusal(facts) or "tensorrt_llm is not installed")
    if len(facts.gpus) < questions.gpus:
        found.append(
            f"{len(facts.gpus)} GPUs are visible, and {questions.gpus} are needed; ask SLURM for them: "
            f"--gpus-per-node={questions.gpus}"
        )
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
