"""Compares what the ranks of runs see around them: what is the same, what differs, what is known to hurt.

Pure. Who is compared with whom: variables and limits among all workers and ranks, libraries among those
that loaded them, network interfaces among hosts. An ingress computes nothing, so only what it must share
with workers counts for it: versions, and the variables that both have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from trtllm_workers.config.tables import table
from trtllm_workers.deploy.audit_rules import Flag, flags_of
from trtllm_workers.observe.facts import Facts

NOT_SET = "(not set)"
_INGRESS = "ingress"
# A worker differs from others in these by design: its devices, its number, its address, its names.
_OF_A_RANK = re.compile(
    r"CUDA_VISIBLE_DEVICES$|NVIDIA_VISIBLE_DEVICES$|TRTLLM_EPLB_SHM_NAME$|SLURM_|PMIX?_|HYDI?_|MPI_LOCAL"
    r"|OMPI_(?!MCA_)|OMPI_MCA_(orte_|prte_|ess|pmix)|.*(_RANK|_PORT|_PROCID|_NODEID|_LOCALID)$"
    r"|TLLM_SPAWN_PROXY_|MPICH_(?:.*RANK)"
)
# The plan shares threads and devices out by role; the ranks of one worker have the same.
_OF_A_WORKER = re.compile(r"OMP_NUM_THREADS$|GOMP_|KMP_|MKL_|CUDA_|TRTLLM_")


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is not the same everywhere: value → who has it. ``expected``: so by design."""

    section: str
    name: str
    values: dict[str, list[str]]
    expected: bool = False


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """The result. ``same`` is section → name → value; ``flags`` are settings known to cause trouble."""

    runs: list[str]
    who: list[str]
    hosts: list[str]
    same: dict[str, dict[str, str]]
    differences: list[Difference]
    flags: list[Flag]

    @property
    def differs(self) -> bool:
        """Whether anything differs that should not."""
        return any(not one.expected for one in self.differences)


def audit(named: Mapping[str, Facts], runs: Sequence[str] = ()) -> Audit:
    """Compare the facts of processes; the keys name them, in the order in which they are shown."""
    same: dict[str, dict[str, str]] = {}
    differences: list[Difference] = []
    workers = {who: one for who, one in named.items() if one.role != _INGRESS} or dict(named)
    others = set(named) - set(workers)

    def compare(
        section: str,
        values: Mapping[str, Mapping[str, str]],
        expected: Callable[[str, Mapping[str, str]], bool] = lambda _name, _values: False,
    ) -> None:
        for name in sorted({name for mine in values.values() for name in mine}):
            seen = {
                who: mine.get(name, NOT_SET)
                for who, mine in values.items()
                # An ingress need not have what workers have.
                if name in mine or who not in others
            }
            if len(set(seen.values())) == 1:
                same.setdefault(section, {})[name] = next(iter(seen.values()))
                continue
            grouped: dict[str, list[str]] = {}
            for who, value in seen.items():
                grouped.setdefault(value, []).append(who)
            differences.append(
                Difference(
                    section=section, name=name, values=grouped, expected=expected(name, seen)
                )
            )

    compare("environment", _environments(named, workers), _expected_of(workers))
    # A rank that is only looked at from outside tells no versions and limits.
    told = {who: one for who, one in named.items() if one.python}
    compare("versions", {who: _versions(one) for who, one in told.items()})
    for library in sorted({one.name for facts in named.values() for one in facts.libraries}):
        compare("libraries", _library(named, workers, library))
    compare("limits", {who: _limits(one) for who, one in workers.items() if one.limits})
    by_host: dict[str, Facts] = {one.host: one for one in named.values()}
    compare(
        "hosts",
        {host: _host(one) for host, one in by_host.items()},
        # Containers make interfaces of their own; which one is used is compared below.
        lambda name, _seen: name == "interfaces",
    )
    compare("network", {who: {"advertised on": one.nic} for who, one in workers.items() if one.nic})
    compare(
        "network",
        {who: {"address": one.advertised} for who, one in workers.items() if one.advertised},
        lambda _name, _seen: True,
    )
    return Audit(
        runs=list(runs),
        who=list(named),
        hosts=list(by_host),
        same=same,
        differences=differences,
        flags=flags_of(named),
    )


def as_text(found: Audit) -> str:
    """Return an audit for people: what differs first, then what is known to hurt, then the rest."""
    hosts = f"host{'' if len(found.hosts) == 1 else 's'} {', '.join(found.hosts)}"
    lines = [f"{len(found.who)} processes on {hosts}: {', '.join(found.who)}", ""]
    wrong = [one for one in found.differences if not one.expected]
    lines.append("DIFFERS" if wrong else "nothing differs that should be the same")
    for one in wrong:
        lines += [f"  {one.section}: {one.name}", *_values(one, len(found.who))]
    if found.flags:
        lines += ["", "KNOWN TO CAUSE TROUBLE"]
        for flag in found.flags:
            lines += [
                f"  {flag.level}: {flag.name}: {flag.text}",
                f"           {', '.join(flag.who)}",
            ]
            lines.append(f"           → {flag.fix}")
    by_design = [one for one in found.differences if one.expected]
    if by_design:
        lines += ["", "differs by design"]
        for one in by_design:
            lines += [f"  {one.section}: {one.name}", *_values(one, len(found.who))]
    lines += ["", "the same for all that have it"]
    rows = [
        (f"  {section}", name, value)
        for section, values in found.same.items()
        for name, value in values.items()
    ]
    lines.append(table(("", "", ""), rows).split("\n", 1)[1] if rows else "  nothing")
    return "\n".join(lines)


def _values(one: Difference, num_all: int) -> list[str]:
    width = min(48, max(len(value) for value in one.values))
    rows = sorted(one.values.items(), key=lambda item: (-len(item[1]), item[0]))
    shown = []
    for number, (value, who) in enumerate(rows):
        # The first has the most; what stands alone against many is likely the odd one out.
        mark = "≠" if number and not one.expected else " "
        names = f"all {num_all}" if len(who) == num_all else ", ".join(who)
        shown.append(f"    {mark} {value.ljust(width)}  {names}")
    return shown


def _environments(
    named: Mapping[str, Facts], workers: Mapping[str, Facts]
) -> dict[str, dict[str, str]]:
    """Return everybody's variables; of what is no worker without those that the plan gives to workers."""
    return {
        who: {
            name: value
            for name, value in one.environment.items()
            if who in workers or not _of_a_crew(name)
        }
        for who, one in named.items()
    }


def _of_a_crew(name: str) -> bool:
    return bool(_OF_A_RANK.match(name) or _OF_A_WORKER.match(name))


def is_of_a_rank(name: str, *, also_devices: bool = True) -> bool:
    """Return whether a variable differs from rank to rank by design, or from run to run."""
    if name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        return also_devices
    return _OF_A_RANK.match(name) is not None


def _expected_of(workers: Mapping[str, Facts]) -> Callable[[str, Mapping[str, str]], bool]:
    def expected(name: str, seen: Mapping[str, str]) -> bool:
        if _OF_A_RANK.match(name):
            return True
        if not _OF_A_WORKER.match(name):
            return False
        by_worker: dict[str, set[str]] = {}
        for who, value in seen.items():
            if who in workers:
                by_worker.setdefault(workers[who].process, set()).add(value)
        return all(len(values) == 1 for values in by_worker.values())

    return expected


def _versions(one: Facts) -> dict[str, str]:
    return {"python": one.python, **one.packages}


def _library(
    named: Mapping[str, Facts], workers: Mapping[str, Facts], name: str
) -> dict[str, dict[str, str]]:
    """Return which file of a library each process has; a worker that lacks what its like has says so."""
    found = {}
    roles_with = {
        one.role for one in workers.values() if any(lib.name == name for lib in one.libraries)
    }
    for who, one in named.items():
        paths = [lib.path for lib in one.libraries if lib.name == name]
        if paths:
            found[who] = {name: " and ".join(paths)}
        elif who in workers and one.role in roles_with and _has_all_loaded(one):
            found[who] = {name: "(not loaded)"}
    return found


def _has_all_loaded(one: Facts) -> bool:
    # A rank beside the leader writes at its start only, before its engine loads.
    return one.moment == "ready"


def _limits(one: Facts) -> dict[str, str]:
    return {
        name: "unlimited" if limit.soft < 0 else str(limit.soft)
        for name, limit in one.limits.items()
    }


def _host(one: Facts) -> dict[str, str]:
    return {
        "kernel": one.kernel,
        "CPUs": str(one.num_cpus),
        "GPUs": str(len(one.gpus)),
        "RDMA ports": ", ".join(one.rdma_devices) or "none",
        "interfaces": ", ".join(nic.name for nic in one.nics if nic.addresses) or "none",
        "/dev/shm": f"{one.shm_bytes / 2**30:.1f} GiB",
    }


def names_of(stories: Iterable[tuple[str, Sequence[Facts]]]) -> dict[str, Facts]:
    """Return facts by the names of their processes; of several runs, with the run in front."""
    several = [(run_id, facts) for run_id, facts in stories]
    named: dict[str, Facts] = {}
    for run_id, facts in several:
        for one in facts:
            name = f"{run_id}/{one.who}" if len(several) > 1 else one.who
            # The same name on two hosts: parts that were started by hand.
            named[f"{name}@{one.host}" if name in named else name] = one
    return named
