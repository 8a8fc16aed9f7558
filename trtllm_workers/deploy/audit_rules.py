"""Settings of ranks that are known to cause trouble, each with the remedy. Pure.

What each rule guards against was met by people who run TensorRT-LLM on clusters; the fix is a command or
what to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Literal

import msgspec

from trtllm_workers.observe.facts import Facts

_LEAST_SHM = 1 << 30
_LEAST_FILES = 4096
_LEAST_MEMLOCK = 1 << 30
_WITH_CUDA = ("cuda", "gdr_copy", "all")
_INTERFACE_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "OMPI_MCA_btl_tcp_if_include")
_ONE_CHOICE = ("NIXL_BACKEND", "TRTLLM_NIXL_KVCACHE_BACKEND")


class Flag(msgspec.Struct, frozen=True, kw_only=True):
    """One known trouble: ``problem`` breaks or slows serving, ``note`` may. ``fix`` is what to do."""

    level: Literal["problem", "note"]
    name: str
    text: str
    fix: str
    who: tuple[str, ...]


Rule = Callable[[Mapping[str, Facts]], Iterator[Flag]]


def flags_of(named: Mapping[str, Facts]) -> list[Flag]:
    """Return what is known to cause trouble among the processes, problems first."""
    found = [flag for rule in _RULES for flag in rule(named)]
    return sorted(found, key=lambda one: one.level != "problem")


def _ucx_tls(named: Mapping[str, Facts]) -> Iterator[Flag]:
    for value, who in _by_value(named, "UCX_TLS").items():
        words = value.lstrip("^").split(",")
        excludes = value.startswith("^")
        has_cuda = any(word.startswith(_WITH_CUDA) for word in words)
        if has_cuda != excludes:
            continue
        gpus = any(_uses_gpu(named[one]) for one in who)
        yield Flag(
            level="problem" if gpus else "note",
            name=f"UCX_TLS={value}",
            text="UCX does not see GPU memory with it: KV blocks on a GPU are taken for host memory; "
            "clusters put it into jobs",
            fix="unset UCX_TLS, or append cuda_copy,cuda_ipc to it",
            who=who,
        )


def _two_choices(named: Mapping[str, Facts]) -> Iterator[Flag]:
    who = tuple(
        one
        for one, facts in named.items()
        if all(name in facts.environment for name in _ONE_CHOICE)
    )
    if who:
        yield Flag(
            level="problem",
            name=" and ".join(_ONE_CHOICE),
            text="both are set; together they break NIXL on some networks (rail endpoint errors)",
            fix=f"unset {_ONE_CHOICE[0]}",
            who=who,
        )


def _several_ucx(named: Mapping[str, Facts]) -> Iterator[Flag]:
    who = []
    for one, facts in named.items():
        versions = {lib.version or lib.path for lib in facts.libraries if lib.name == "libucp"}
        if len(versions) > 1:
            who.append(one)
    if who:
        paths = sorted(
            {lib.path for one in who for lib in named[one].libraries if lib.name == "libucp"}
        )
        yield Flag(
            level="note",
            name="libucp",
            text=f"several UCX are loaded into one process: {', '.join(paths)}",
            fix="let one of them win: take the others out of LD_LIBRARY_PATH",
            who=tuple(who),
        )


def _memlock(named: Mapping[str, Facts]) -> Iterator[Flag]:
    low = {
        one: facts.limits["memlock"].soft
        for one, facts in named.items()
        if facts.rdma_devices and 0 <= _soft(facts, "memlock", -1) < _LEAST_MEMLOCK
    }
    if low:
        yield Flag(
            level="problem",
            name="memlock",
            text=f"only {min(low.values()) >> 10} KiB may be locked, and RDMA must register the KV pool",
            fix="ulimit -l unlimited; docker run --ulimit memlock=-1; "
            "under SLURM PropagateResourceLimitsExcept=MEMLOCK",
            who=tuple(low),
        )


def _open_files(named: Mapping[str, Facts]) -> Iterator[Flag]:
    low = [one for one, facts in named.items() if 0 <= _soft(facts, "nofile", -1) < _LEAST_FILES]
    if low:
        least = min(_soft(named[one], "nofile", -1) for one in low)
        yield Flag(
            level="note",
            name="nofile",
            text=f"only {least} files may be open: connections and mapped files count",
            fix="ulimit -n 65536",
            who=tuple(low),
        )


def _shared_memory(named: Mapping[str, Facts]) -> Iterator[Flag]:
    low = [one for one, facts in named.items() if 0 < facts.shm_bytes < _LEAST_SHM]
    if low:
        least = min(named[one].shm_bytes for one in low)
        yield Flag(
            level="note",
            name="/dev/shm",
            text=f"only {least >> 20} MiB: MPI, NCCL and the expert load balancer share memory there",
            fix="docker run --shm-size=16g, or --ipc=host",
            who=tuple(low),
        )


def _threads(named: Mapping[str, Facts]) -> Iterator[Flag]:
    by_host: dict[str, list[str]] = {}
    for one, facts in named.items():
        if any(lib.name.startswith("libtorch") for lib in facts.libraries):
            by_host.setdefault(facts.host, []).append(one)
    for host, who in by_host.items():
        wanted = 0
        for one in who:
            told = named[one].environment.get("OMP_NUM_THREADS", "")
            wanted += int(told) if told.isdigit() else named[one].num_cpus
        cpus = max(named[one].num_cpus for one in who)
        # One thread each is the least there is.
        if len(who) > 1 and wanted > max(cpus, len(who)):
            yield Flag(
                level="note",
                name="OMP_NUM_THREADS",
                text=f"{len(who)} processes on {host} take {wanted} threads on {cpus} CPUs",
                fix=f"OMP_NUM_THREADS={max(1, cpus // len(who))}, or unset it: 'up' then shares the CPUs out",
                who=tuple(who),
            )


def _hidden_gpus(named: Mapping[str, Facts]) -> Iterator[Flag]:
    who = tuple(
        one
        for one, facts in named.items()
        if facts.gpus
        and facts.role != "ingress"
        and facts.environment.get("CUDA_VISIBLE_DEVICES", "x").strip() in ("", "-1", "NoDevFiles")
    )
    if who:
        yield Flag(
            level="problem",
            name="CUDA_VISIBLE_DEVICES",
            text="it hides every GPU of the host from this process",
            fix="unset it, or name devices: CUDA_VISIBLE_DEVICES=0",
            who=who,
        )


def _interfaces(named: Mapping[str, Facts]) -> Iterator[Flag]:
    for variable in _INTERFACE_VARIABLES:
        for value, who in _by_value(named, variable).items():
            asked = [word.partition(":")[0] for word in value.lstrip("=^").split(",")]
            if value.startswith("^") or any("/" in word or not word for word in asked):
                continue
            exact = variable.startswith("OMPI") or value.startswith("=")
            lacking = tuple(
                one
                for one in who
                if not any(
                    _matches(word, nic.name, exact) for word in asked for nic in named[one].nics
                )
                and "lo" not in asked
            )
            if lacking:
                yield Flag(
                    level="problem",
                    name=f"{variable}={value}",
                    text="the host has no such network interface: "
                    + ", ".join(sorted({nic.name for nic in named[lacking[0]].nics})),
                    fix="name one of these, or unset it",
                    who=lacking,
                )


def _ucx_devices(named: Mapping[str, Facts]) -> Iterator[Flag]:
    for value, who in _by_value(named, "UCX_NET_DEVICES").items():
        if value.startswith("^") or value == "all":
            continue
        asked = {word.strip() for word in value.split(",")}
        lacking = tuple(one for one in who if not asked & _devices(named[one]))
        if lacking:
            yield Flag(
                level="problem",
                name=f"UCX_NET_DEVICES={value}",
                text=f"the host has none of them: {', '.join(sorted(_devices(named[lacking[0]])))}",
                fix="name one of these, or unset it",
                who=lacking,
            )


def _loopback(named: Mapping[str, Facts]) -> Iterator[Flag]:
    if len({facts.host for facts in named.values()}) < 2:
        return
    who = tuple(
        one
        for one, facts in named.items()
        if facts.advertised.startswith("127.") or facts.advertised == "::1"
    )
    if who:
        yield Flag(
            level="problem",
            name="advertised address",
            text="loopback: processes of other hosts cannot connect to it",
            fix="--plane-host 0.0.0.0, and --advertise-host INTERFACE where the host has several",
            who=who,
        )


def _driver_stubs(named: Mapping[str, Facts]) -> Iterator[Flag]:
    for value, who in _by_value(named, "LD_LIBRARY_PATH").items():
        stubs = [part for part in value.split(":") if PurePath(part).name == "stubs"]
        if stubs:
            yield Flag(
                level="problem",
                name="LD_LIBRARY_PATH",
                text=f"{stubs[0]} holds stand-ins for the driver's libraries, for linking only",
                fix=f"take {stubs[0]} out of it",
                who=who,
            )


_RULES: tuple[Rule, ...] = (
    _ucx_tls,
    _two_choices,
    _memlock,
    _hidden_gpus,
    _interfaces,
    _ucx_devices,
    _loopback,
    _driver_stubs,
    _several_ucx,
    _open_files,
    _shared_memory,
    _threads,
)


def _by_value(named: Mapping[str, Facts], variable: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for who, facts in named.items():
        value = facts.environment.get(variable, "").strip()
        if value and facts.role != "ingress":  # which moves no blocks
            found[value] = (*found.get(value, ()), who)
    return found


def _uses_gpu(facts: Facts) -> bool:
    hidden = facts.environment.get("CUDA_VISIBLE_DEVICES", "x").strip() in ("", "-1")
    return bool(facts.gpus) and not hidden


def _soft(facts: Facts, name: str, default: int) -> int:
    limit = facts.limits.get(name)
    return default if limit is None else limit.soft


def _devices(facts: Facts) -> set[str]:
    return {one.partition(" ")[0] for one in facts.rdma_devices} | {nic.name for nic in facts.nics}


def _matches(asked: str, name: str, exact: bool) -> bool:
    return name == asked if exact else name.startswith(asked)
