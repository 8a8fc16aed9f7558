"""The place of a run that is a SLURM job: prepares its nodes, reads its ranks, tells lost nodes, clears up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from trtllm_workers.deploy.plan import PlannedProcess
from trtllm_workers.deploy.site import Site
from trtllm_workers.deploy.slurm import records, variables
from trtllm_workers.deploy.slurm.checks import check_nodes
from trtllm_workers.deploy.slurm.command import run_command
from trtllm_workers.deploy.slurm.on_all import Steps
from trtllm_workers.deploy.slurm.plan import SlurmPlan
from trtllm_workers.deploy.slurm.preflight import QUESTIONS, Questions
from trtllm_workers.errors import ConfigError, StartError
from trtllm_workers.observe.status import Status, rank_status, read_status

_ASK_TIMEOUT_S = 10.0
_CLEAR_TIMEOUT_S = 20.0
_LOOK_S = 0.25
_NODES_EVERY_S = 5.0
_IS_GONE = re.compile(r"^(down|fail|error|unk|powered|power)", re.IGNORECASE)
# A node that does not answer may do so again; where a part has died as well, it is taken for gone.
_IS_LOST = re.compile(rf"{_IS_GONE.pattern}|\*$", re.IGNORECASE)
_MARK = "trtllm-launch-node"


@dataclass(slots=True)
class _Seen:
    """What was read of a part's ranks."""

    ranks: dict[int, records.RankRecord]
    complete: bool = False
    since_s: float = 0.0


class JobSite(Site):
    """The nodes of one job. ``submitted``: the run made the job itself."""

    manner_of_stopping = "trtllm-launch slurm stop"
    manner_of_looking = "trtllm-launch slurm status"

    def __init__(
        self, made: SlurmPlan, environ: Mapping[str, str], *, submitted: bool = False
    ) -> None:
        self._made = made
        self._environ = environ
        self._submitted = submitted
        self._folder = made.plan.folder.path
        self._on_all = Steps(made, environ)
        self._parts = {part.name: part for part in made.parts}
        self._seen: dict[str, _Seen] = {}
        self._told: set[str] = set()
        self._say: Callable[[str], None] = lambda _text: None

    async def prepare(self, say: Callable[[str], None]) -> None:
        """Write down what the tasks need, and look at every node."""
        self._say = say
        began_s = time.monotonic()
        self._write()
        await check_nodes(self._made, self._on_all, say)
        nodes = len(self._made.allocation.nodes)
        say(
            f"{nodes} node{'s' if nodes > 1 else ''} of job {self._made.allocation.job_id} checked in "
            f"{time.monotonic() - began_s:.1f} s"
        )

    def read(self, path: Path) -> Status | None:
        """Return what a part has reported; until all its ranks have started, which are missing."""
        status, part = read_status(path), self._parts.get(path.stem)
        if part is None:
            return status
        seen = self._seen.setdefault(part.name, _Seen({}, since_s=time.time()))
        if seen.complete:
            return status
        self._look_for_ranks(part, seen)
        total = len(part.nodes) * part.ranks_per_node
        if len(seen.ranks) < total:
            if total == 1 or not (status is None or status.step == "starting"):
                return status
            return Status("starting", seen.since_s, detail=_missing(part, seen.ranks))
        seen.complete = True
        self._compare(part, seen.ranks)
        return status

    def url(self, told: str) -> str:
        """Return the ingress's address: that of the head node, where it listens on all."""
        record = records.read(
            records.node_path(self._folder, self._made.allocation.head), records.NodeRecord
        )
        parts = urlsplit(told)
        if record is None or parts.hostname not in ("0.0.0.0", "::"):
            return told
        host = f"[{record.address}]" if ":" in record.address else record.address
        return f"{parts.scheme}://{host}:{parts.port}"

    async def lost(self, process: PlannedProcess) -> str:
        """Return which of a part's nodes SLURM has given up, in words; "" when all are there."""
        # A rank that comes again is looked at again.
        self._seen.pop(process.name, None)
        for rank in range(len(process.nodes) * process.ranks_per_node):
            with contextlib.suppress(OSError):
                records.rank_path(self._folder, process.name, rank).unlink()
            with contextlib.suppress(OSError):
                rank_status(process.status, rank).unlink()
        states = await self.node_states(process.nodes)
        lost = {node: state for node, state in states.items() if _IS_LOST.search(state)}
        return ", ".join(f"node {_in_words(node, state)}" for node, state in lost.items())

    async def node_states(self, nodes: Sequence[str]) -> dict[str, str]:
        """Return each node's state in SLURM's words; without those it does not tell."""
        if not nodes:
            return {}
        said = await run_command(
            ["sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", f"{_MARK} %N %T"],
            timeout_s=_ASK_TIMEOUT_S,
        )
        found = {}
        for line in said.stdout.splitlines():
            words = line.split()
            if len(words) == 3 and words[0] == _MARK:
                found[words[1]] = words[2]
        return found

    async def ask_to_end(self, processes: Sequence[PlannedProcess]) -> set[str]:
        """Send TERM to the tasks of steps: srun itself would take it for an order to kill them."""
        job_id, run_id = self._made.allocation.job_id, self._made.plan.run_id
        names = {f"{run_id}.{one.name}": one.name for one in processes}
        steps = {step: names[name] for step, name in (await self._steps()).items() if name in names}
        if not steps:
            return set()
        said = await run_command(
            ["scancel", "--signal=TERM", *(f"{job_id}.{step}" for step in steps)],
            timeout_s=_ASK_TIMEOUT_S,
        )
        # A step that ends at once makes scancel fail although it was told.
        return set() if said.is_missing or said.is_late else set(steps.values())

    async def _steps(self) -> dict[str, str]:
        """Return the names of the job's steps by their numbers."""
        words = ["squeue", "-s", "-h", "-j", self._made.allocation.job_id, "-o", f"{_MARK}|%i|%j"]
        said = await run_command(words, timeout_s=_ASK_TIMEOUT_S)
        found = {}
        for line in said.stdout.splitlines():
            parts = line.split("|")
            if len(parts) == 3 and parts[0] == _MARK:
                found[parts[1].rpartition(".")[2]] = parts[2]
        return found

    async def watch(self, end_part: Callable[[str], None]) -> None:
        """End the parts of nodes that SLURM has given up; srun itself may wait for them for minutes."""
        given_up: set[str] = set()
        while True:
            await asyncio.sleep(_NODES_EVERY_S)
            states = await self.node_states(self._made.allocation.nodes)
            for node, state in states.items():
                if node in given_up or not _IS_GONE.search(state):
                    continue
                given_up.add(node)
                parts = [part.name for part in self._parts.values() if node in part.nodes]
                self._say(
                    f"node {node} is {state.rstrip('*')}: {' and '.join(parts) or 'nothing'} ran there"
                )
                for name in parts:
                    end_part(name)

    async def told_to_stop(self) -> None:
        """Return once ``slurm stop`` has left its file: it may run on any host that sees the folder."""
        while not (self._folder / records.STOP).exists():
            # A file of a shared file system tells nobody when it appears.
            await self._pause(_LOOK_S)

    @staticmethod
    async def _pause(seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def clear(self, say: Callable[[str], None]) -> None:
        """Let every node that is still there end and remove what the run left on it."""
        states = await self.node_states(self._made.allocation.nodes)
        nodes = [
            node
            for node in self._made.allocation.nodes
            if not _IS_LOST.search(states.get(node, "down"))
        ]
        if not nodes:
            return
        if self._made.forget:
            with contextlib.suppress(OSError, TimeoutError, StartError):
                await self._on_all.run(_only_on(self._made.forget, nodes), _CLEAR_TIMEOUT_S)
        words = _only_on(self._made.clear, nodes)
        with contextlib.suppress(OSError, TimeoutError, StartError):
            said = await self._on_all.run(words, _CLEAR_TIMEOUT_S, "clear")
            if said.status != 0 and not said.means_the_job_is_over:
                say(f"note: the nodes could not be cleared: {said.last_words()}")

    def _write(self) -> None:
        """Write what tasks and other commands read. Raises ConfigError."""
        made, folder = self._made, self._folder
        try:
            for name in ("tasks", "ranks", "nodes"):
                (folder / name).mkdir(mode=0o700, exist_ok=True)
            sent = variables.to_send(self._environ, in_container=bool(made.slurm.image))
            records.write(
                folder / records.ENVIRONMENT,
                records.Environment(values=sent, digest=variables.digest(sent)),
            )
            for name, spec in made.specs.items():
                records.write(records.spec_path(folder, name), spec)
            records.write(
                folder / records.JOB,
                records.JobRecord(
                    run_id=made.plan.run_id,
                    job_id=made.allocation.job_id,
                    head=made.allocation.head,
                    nodes=made.allocation.nodes,
                    parts=made.parts,
                    driver_host=os.uname().nodename,
                    submitted=self._submitted,
                ),
            )
            token = secrets.token_hex(8)
            (folder / "shared").write_text(token, encoding="utf-8")
            records.write(
                folder / QUESTIONS,
                Questions(
                    files=dict(made.files),
                    shared=str(folder / "shared"),
                    token=token,
                    head=made.allocation.head,
                    http=(made.plan.http_host, made.plan.http_port),
                    interface=made.slurm.interface,
                    head_address=made.slurm.head_node_ip or made.slurm.interface,
                    needs_trtllm=made.settings.engine == "trtllm",
                    gpus=made.layout.widest if made.layout.gpus_per_node else 0,
                ),
            )
        except OSError as wrong:
            raise ConfigError(
                f"cannot write into the run's folder {folder}: {wrong.strerror or wrong}; choose another "
                "with --run-dir",
                param="run_dir",
            ) from wrong

    def _look_for_ranks(self, part: records.Part, seen: _Seen) -> None:
        for rank in range(len(part.nodes) * part.ranks_per_node):
            if rank in seen.ranks:
                continue
            found = records.read(
                records.rank_path(self._folder, part.name, rank), records.RankRecord
            )
            if found is not None:
                seen.ranks[rank] = found

    def _compare(self, part: records.Part, ranks: Mapping[int, records.RankRecord]) -> None:
        """Say what nodes add to the environment; raise ConfigError when ranks see it differently."""
        for record in ranks.values():
            for word in record.changed:
                if word not in self._told:
                    self._told.add(word)
                    self._say(f"note: environment on {record.node}: {word}{_remark(word)}")
        if text := variables.disagreement(part.name, ranks):
            raise ConfigError(text, param="mpi")


def _only_on(words: Sequence[str], nodes: Sequence[str]) -> list[str]:
    """Return a step of one task on each node for fewer nodes."""
    instead = {
        "--nodelist": ",".join(nodes),
        "--nodes": str(len(nodes)),
        "--ntasks": str(len(nodes)),
    }
    found = []
    for word in words:
        name, equals, _ = word.partition("=")
        found.append(f"{name}={instead[name]}" if equals and name in instead else word)
    return found


def _in_words(node: str, state: str) -> str:
    return (
        f"{node} is {state.rstrip('*')}"
        if _IS_GONE.search(state)
        else f"{node} does not answer SLURM"
    )


def _missing(part: records.Part, ranks: Mapping[int, records.RankRecord]) -> str:
    total = len(part.nodes) * part.ranks_per_node
    by_node: dict[str, list[int]] = {}
    for rank in range(total):
        if rank not in ranks:
            by_node.setdefault(part.nodes[rank // part.ranks_per_node], []).append(rank)
    shown = [
        f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} on {node}"
        for node, missing in list(by_node.items())[:4]
    ]
    more = " …" if len(by_node) > 4 else ""
    return f"{len(ranks)} of {total} ranks started, waiting for {'; '.join(shown)}{more}"


def _remark(word: str) -> str:
    if word.startswith("UCX_TLS=") and "cuda" not in word and "all" not in word:
        return "; without cuda in it UCX takes GPU memory for host memory"
    return ""
