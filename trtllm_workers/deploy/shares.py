"""What each worker gets of this host: GPUs, or a share of the CPU's threads. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trtllm_workers.errors import ConfigError
from trtllm_workers.types import Role

CUDA = "CUDA_VISIBLE_DEVICES"
THREADS = "OMP_NUM_THREADS"
GPU_FRACTION = "kv_cache_config.free_gpu_memory_fraction"


@dataclass(frozen=True, slots=True)
class Crew:
    """The workers of one role, each of ``num_ranks`` processes that compute.

    ``told`` are the GPUs the operator named for them (``source`` says where), None: none was named.
    ``gpu_fraction`` is the share of a GPU's free memory that one engine takes by default, None: it
    takes none, or the operator has chosen it. ``in_words`` says where the number of ranks comes from.
    ``exclusive``: its GPUs are no other worker's, unless the operator named them. ``method`` is what
    starts the ranks (``mpi.Method``), "" for an engine that has one way only.
    """

    role: Role
    num_workers: int
    num_ranks: int = 1
    told: tuple[str, ...] | None = None
    source: str = ""
    gpu_fraction: float | None = None
    in_words: str = ""
    exclusive: bool = False
    method: str = ""

    @property
    def num_devices(self) -> int:
        """How many GPUs they need for one GPU per rank."""
        return self.num_workers * self.num_ranks

    @property
    def runs_as_ranks(self) -> bool:
        """Whether the worker's command itself is started once for each rank."""
        return self.num_ranks > 1 and self.method in ("", "mpirun", "told")


@dataclass(frozen=True, slots=True)
class Share:
    """One worker's share: variables for its process, and the part of GPU memory that is left to it.

    ``gpu_fraction`` None: as its engine config says.
    """

    env: Mapping[str, str] = field(default_factory=dict)
    gpu_fraction: float | None = None


def share_out(
    crews: Sequence[Crew], gpus: Sequence[str], num_cpus: int, *, threads_are_set: bool
) -> tuple[dict[Role, list[Share]], tuple[str, ...]]:
    """Return the shares of every crew's workers and notes for the operator.

    Raises ConfigError when a worker of several ranks cannot have a GPU for each, when workers that
    share no GPU would have to, or when a role that was told its GPUs would meet another role on them
    that was told none.
    """
    if gpus or any(crew.told for crew in crews):
        return _share_gpus(crews, gpus)
    num_ranks = sum(crew.num_devices for crew in crews)
    if threads_are_set or num_ranks <= 1:
        return {crew.role: [Share()] * crew.num_workers for crew in crews}, ()
    share = Share({THREADS: str(max(1, num_cpus // num_ranks))})
    return {crew.role: [share] * crew.num_workers for crew in crews}, ()


def _share_gpus(
    crews: Sequence[Crew], gpus: Sequence[str]
) -> tuple[dict[Role, list[Share]], tuple[str, ...]]:
    if len(crews) == 1 and crews[0].told is None and crews[0].num_devices == 1:
        return {crews[0].role: [Share()]}, ()  # alone on this host, it sees what the launcher sees
    notes: list[str] = []
    dealt: dict[Role, list[tuple[str, ...]]] = {}
    free = [gpu for gpu in gpus if not any(gpu in (crew.told or ()) for crew in crews)]
    untold = [crew for crew in crews if crew.told is None]
    for crew in crews:
        if crew.told is not None:
            dealt[crew.role] = _deal(crew, crew.told, f"{crew.source} names", notes)
    for crew in untold:
        if crew.exclusive and gpus and crew.num_devices > len(free):
            raise _too_crowded(crew, crews, free)
        own = free[: crew.num_devices]
        if len(own) < crew.num_devices:
            own = _too_few(crew, crews, own, gpus)
        free = free[crew.num_devices :]
        left = " left" if len(own) < len(gpus) else ""
        dealt[crew.role] = _deal(crew, own, f"this host has{left}", notes)
    return _with_memory(crews, dealt, notes), tuple(notes)


def _too_crowded(crew: Crew, crews: Sequence[Crew], free: Sequence[str]) -> ConfigError:
    role = str(crew.role)
    others = [_count(other) for other in crews if other is not crew]
    beside = f" beside {' and '.join(others)}" if others else ""
    each = f" of {crew.in_words}" if crew.num_ranks > 1 else ""
    verb = "needs" if crew.num_workers == 1 else "need"
    needed = f"{crew.num_devices} GPU{'s' if crew.num_devices > 1 else ''}"
    left = f"{_listed(free)} {'is' if len(free) == 1 else 'are'}" if free else "none is"
    remedy = (
        "" if crew.role is Role.AGGREGATED else f"; to share one, name it: {role.upper()}_{CUDA}"
    )
    return ConfigError(
        f"{_count(crew)}{each} {verb} {needed}{beside}, and {left} left on this host; "
        f"TensorRT-LLM takes a GPU for itself{remedy}",
        param="tensor_parallel_size" if crew.num_ranks > 1 else "num_workers",
    )


def _too_few(crew: Crew, crews: Sequence[Crew], own: list[str], gpus: Sequence[str]) -> list[str]:
    """Return the GPUs for a crew that was told none and finds too few free. Raises ConfigError."""
    others = [other for other in crews if other.told]
    if others and not own:
        other = others[0]
        if not gpus:
            return []
        raise ConfigError(
            f"{other.source} gives {_listed(other.told or ())} to {other.role}, and this host has no "
            f"other GPU for {crew.role}; name GPUs for {crew.role} too, "
            f"with {str(crew.role).upper()}_{CUDA} (the same ones if they are to be shared)",
            param=f"{crew.role}_cuda_visible_devices",
        )
    # Nobody told who gets what: whoever comes last shares with those before.
    return own or list(gpus)


def _deal(
    crew: Crew, devices: Sequence[str], source: str, notes: list[str]
) -> list[tuple[str, ...]]:
    """Return each worker's GPUs. Raises ConfigError when several ranks would share one."""
    if not devices:
        return [()] * crew.num_workers
    each = crew.num_ranks
    if len(devices) < each:
        kind = "" if crew.role is Role.AGGREGATED else f"{crew.role} "
        raise ConfigError(
            f"{crew.in_words or f'tensor_parallel_size {each}'} needs {each} GPUs for each {kind}worker, "
            f"but {source} only {_listed(devices)}",
            param="tensor_parallel_size",
        )
    if len(devices) > crew.num_devices and crew.told is not None:
        unused = _listed(devices[crew.num_devices :])
        stay = "stays" if len(devices) == crew.num_devices + 1 else "stay"
        notes.append(f"{crew.source}: {unused} {stay} unused; a worker takes one GPU per rank")
    whole = len(devices) // each
    if whole < crew.num_workers:
        devices_text = f"{whole * each} GPUs" if whole * each > 1 else f"GPU {devices[0]}"
        notes.append(f"{_count(crew)} share {devices_text}")
    return [
        tuple(devices[(index % whole) * each : (index % whole + 1) * each])
        for index in range(crew.num_workers)
    ]


def _with_memory(
    crews: Sequence[Crew], dealt: Mapping[Role, list[tuple[str, ...]]], notes: list[str]
) -> dict[Role, list[Share]]:
    """Divide the memory of each GPU among those that share it, where nobody has done so."""
    users = Counter(gpu for workers in dealt.values() for mine in workers for gpu in mine)
    roles = {gpu: [str(role) for role in dealt if gpu in sum(dealt[role], ())] for gpu in users}
    for gpu, names in roles.items():
        if len(names) > 1:
            notes.append(f"{', '.join(names[:-1])} and {names[-1]} share GPU {gpu}")
    shares: dict[Role, list[Share]] = {}
    for crew in crews:
        shares[crew.role] = []
        for mine in dealt[crew.role]:
            crowd = max((users[gpu] for gpu in mine), default=1)
            fraction = None
            if crew.gpu_fraction is not None and crowd > 1:
                fraction = round(crew.gpu_fraction / crowd, 3)
            env = {CUDA: ",".join(mine)} if mine else {}
            shares[crew.role].append(Share(env, fraction))
    if max(users.values(), default=0) > 1:
        notes.append(_about_memory([share for workers in shares.values() for share in workers]))
    return shares


def _about_memory(shares: Sequence[Share]) -> str:
    fractions = sorted({share.gpu_fraction for share in shares if share.gpu_fraction is not None})
    if not fractions:
        return f"workers on one GPU must leave memory to each other: mind {GPU_FRACTION}"
    taken = " or ".join(f"{fraction:g}" for fraction in fractions)
    return (
        f"a worker on a shared GPU takes {taken} of the memory it finds free; "
        f"another share: --set {GPU_FRACTION}=…"
    )


def _listed(devices: Sequence[str]) -> str:
    return f"GPU {devices[0]}" if len(devices) == 1 else f"GPUs {','.join(devices)}"


def _count(crew: Crew) -> str:
    kind = "" if crew.role is Role.AGGREGATED else f" {crew.role}"
    if crew.num_workers == 1:
        return f"1{kind} worker"
    return f"{crew.num_workers}{kind} workers"
