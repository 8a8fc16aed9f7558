"""Whether TensorRT-LLM can run here: judgement over facts. Pure; the facts come from ``trtllm_facts``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.config.settings import Settings
from trtllm_workers.deploy.findings import Finding, note, ok, problem
from trtllm_workers.deploy.mpi import World, world_of
from trtllm_workers.deploy.names import roles_of
from trtllm_workers.engines.trtllm.api import INSTALL
from trtllm_workers.errors import ConfigError
from trtllm_workers.lint.role_keys import BACKEND
from trtllm_workers.types import Role

KNOWN = "1.2.1"
LEAST_DRIVER = 580
_SUBJECT = "TensorRT-LLM"
_PYTHONS = ((3, 10), (3, 12))
# CUDA 13 has no code for anything older than Turing.
_LEAST_COMPUTE_CAP = 7.5
# Docker gives 64 MiB; NCCL and the ranks of one worker exchange through it.
_LEAST_SHM_BYTES = 1 << 30
_GIB = 1 << 30
_MOST_UNMET = 4
_IN_DOCKER = "docker run --gpus all --ipc=host --ulimit memlock=-1 …"
_FLAVOURS = {"openmpi": "Open MPI", "mpich": "MPICH"}


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU as nvidia-smi lists it; 0 for what it does not tell."""

    driver: str
    compute_cap: float = 0.0
    memory_mib: int = 0


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found out, without importing the package.

    ``version`` None: it is not installed; "": it is, and does not say which version. ``gpus`` are the
    visible ones, ``cuda_visible`` the variable that names them (None: not set). ``smi_fault`` says how
    nvidia-smi failed. ``unmet`` are requirements of the package that this environment breaks, as words.
    ``own_ucx`` names our packages that bring another UCX. ``memlock_bytes`` None: no limit.
    """

    version: str | None = None
    python: tuple[int, int] = (3, 12)
    gpus: tuple[str, ...] = ()
    cuda_visible: str | None = None
    devices: tuple[Device, ...] = ()
    smi_fault: str = ""
    has_cuda_compat: bool = False
    unmet: tuple[str, ...] = ()
    own_ucx: tuple[str, ...] = ()
    shm_bytes: int | None = None
    memlock_bytes: int | None = None
    mpirun: str = ""
    mpi_flavour: str = ""
    in_slurm_job: bool = False


@dataclass(frozen=True, slots=True)
class _Need:
    """The workers of one role: how many, and the world of each. ``told``: the GPUs it was given."""

    role: Role
    num_workers: int
    world: World
    told: tuple[str, ...] | None


def require_trtllm(settings: Settings, configs: Mapping[Role, EngineConfig], facts: Facts) -> None:
    """Raise ConfigError with a line for everything that keeps TensorRT-LLM from running here.

    The most basic cause comes first.
    """
    lines = [
        one.text + (f"; {one.fix}" if one.fix else "")
        for one in judge(settings, configs, facts)
        if one.level == "problem"
    ]
    if lines:
        raise ConfigError("\n".join(lines), param="engine")


def refusal(facts: Facts) -> str:
    """Return why this TensorRT-LLM is not taken, or "" when it is: missing, or a refused version."""
    if facts.version is None:
        return "TensorRT-LLM is not installed"
    number = _release(facts.version)
    if number and number < (1, 2, 0):
        return (
            f"TensorRT-LLM {facts.version} is too old: its API and its configuration keys differ from "
            f"{KNOWN}'s"
        )
    if number == (1, 2, 0):
        return (
            f"TensorRT-LLM {facts.version} is refused: it can corrupt the KV cache, which {KNOWN} mends "
            "(NVIDIA/TensorRT-LLM#12770)"
        )
    return ""


def choose_engine(facts: Facts) -> tuple[str, str]:
    """Return the engine that ``auto`` takes, and why."""
    if why := refusal(facts):
        return "torch", why
    if not facts.gpus:
        return "torch", "TensorRT-LLM is installed, but no GPU is visible"
    return "trtllm", f"TensorRT-LLM {facts.version or 'of an unknown version'} and a GPU are here"


def judge(settings: Settings, configs: Mapping[Role, EngineConfig], facts: Facts) -> list[Finding]:
    """Return what there is to say about TensorRT-LLM here, the most basic first."""
    needs = _needs(settings, configs)
    elsewhere = _on_other_nodes(settings, needs, facts)
    findings = [_package(facts), *_python(facts)]
    findings += [_gpus(needs, facts, elsewhere=elsewhere)]
    if facts.version is not None:
        findings += [*_driver(facts, elsewhere=elsewhere), *_environment(facts)]
    several = settings.disaggregated or any(need.world.size > 1 for need in needs)
    findings += [*_memory_limits(facts, several=several), _mpi(facts, needs)]
    if settings.disaggregated:
        findings += _transceiver(configs)
    return findings


def _needs(settings: Settings, configs: Mapping[Role, EngineConfig]) -> list[_Need]:
    needs = []
    for role in roles_of(settings):
        if role is Role.AGGREGATED:
            needs.append(_Need(role, settings.num_workers, world_of(configs.get(role)), None))
            continue
        told = getattr(settings, f"{role}_cuda_visible_devices")
        needs.append(
            _Need(
                role,
                getattr(settings, f"num_{role}_workers"),
                world_of(configs.get(role)),
                tuple(told.split(",")) if told else None,
            )
        )
    return needs


def _on_other_nodes(settings: Settings, needs: list[_Need], facts: Facts) -> bool:
    """Return whether ranks run where this host's GPUs tell nothing: SLURM's nodes, or mpi_cmd's."""
    if settings.mpi_cmd or settings.mpi_launch == "srun":
        return True
    node = settings.gpus_per_node or len(facts.gpus)
    return facts.in_slurm_job and node > 0 and any(need.world.size > node for need in needs)


def _package(facts: Facts) -> Finding:
    if why := refusal(facts):
        return problem(_SUBJECT, why, INSTALL)
    if not facts.version:
        return note(
            _SUBJECT,
            f"installed, but without metadata; it is taken for {KNOWN}, unchecked",
            INSTALL,
        )
    if facts.version != KNOWN:
        return note(
            _SUBJECT,
            f"{facts.version} is not {KNOWN}, which this toolkit knows: engine configs are checked "
            f"against the keys of {KNOWN}",
        )
    return ok(_SUBJECT, facts.version)


def _python(facts: Facts) -> list[Finding]:
    if facts.python in _PYTHONS:
        return []
    have = ".".join(map(str, facts.python))
    text = (
        f"NVIDIA publishes {_SUBJECT} {KNOWN} for Python 3.10 and 3.12, and this is Python {have}"
    )
    # Only where it is still to be installed does that stand in the way.
    say = problem if facts.version is None else note
    return [say("python of TensorRT-LLM", text, "take Python 3.12, or NVIDIA's container")]


def _gpus(needs: list[_Need], facts: Facts, *, elsewhere: bool) -> Finding:
    visible = _count(len(facts.gpus), "GPU")
    if elsewhere:
        return ok("gpus", f"{visible} visible here; the ranks' own are those of their nodes")
    if not facts.gpus:
        return problem("gpus", f"no GPU is visible, and {_SUBJECT} needs one", _why_none(facts))
    told = {gpu for need in needs for gpu in need.told or ()}
    free = [gpu for gpu in facts.gpus if gpu not in told]
    untold = [need for need in needs if need.told is None]
    wanted = sum(need.num_workers * need.world.size for need in untold)
    if wanted > len(free):
        left = "visible" if not told else "left by what the other role was given"
        verb = "is" if len(free) == 1 else "are"
        return problem(
            "gpus",
            f"{_in_words(untold)} {_count(wanted, 'GPU')}, and {len(free)} {verb} {left}; "
            f"{_SUBJECT} takes a GPU for each rank",
            "make more GPUs visible (CUDA_VISIBLE_DEVICES), or take fewer workers or ranks",
        )
    used = f"{wanted} needed" if untold else "each role was given its own"
    return ok("gpus", f"{visible} visible, {used}")


def _why_none(facts: Facts) -> str:
    if facts.cuda_visible is not None:
        return f"CUDA_VISIBLE_DEVICES is {facts.cuda_visible!r}: unset it, or name GPUs in it"
    return f"in a container: {_IN_DOCKER}"


def _in_words(needs: list[_Need]) -> str:
    """Say who needs GPUs, with the verb: ``tensor_parallel_size 4 needs``, ``2 workers need``."""
    if len(needs) == 1 and needs[0].num_workers == 1:
        return f"{needs[0].world.in_words} needs"
    parts = []
    for need in needs:
        kind = "" if need.role is Role.AGGREGATED else f"{need.role} "
        each = f" of {need.world.in_words}" if need.world.size > 1 else ""
        parts.append(f"{_count(need.num_workers, f'{kind}worker')}{each}")
    return f"{' and '.join(parts)} need"


def _driver(facts: Facts, *, elsewhere: bool) -> list[Finding]:
    if facts.smi_fault:
        fault = f"the driver's version is unknown: nvidia-smi: {facts.smi_fault}"
        return [note("driver", fault, "nvidia-smi")]
    if not facts.devices:
        return []
    driver = facts.devices[0].driver
    major = int(driver.partition(".")[0]) if driver.partition(".")[0].isdigit() else 0
    caps = [one.compute_cap for one in facts.devices if one.compute_cap]
    findings = []
    if 0 < major < LEAST_DRIVER:
        text = f"the NVIDIA driver is {driver}; {_SUBJECT} {KNOWN} is built for CUDA 13: {LEAST_DRIVER} or newer"
        if facts.has_cuda_compat:
            text += "; CUDA's compatibility libraries are here, which serve data-center GPUs only"
        say = note if facts.has_cuda_compat or elsewhere else problem
        findings.append(say("driver", text, f"install driver {LEAST_DRIVER} or newer on the host"))
    if caps and min(caps) < _LEAST_COMPUTE_CAP:
        say = note if elsewhere else problem
        findings.append(
            say(
                "driver",
                f"a GPU has compute capability {min(caps):.1f}; CUDA 13 begins at {_LEAST_COMPUTE_CAP}",
                "leave it out of CUDA_VISIBLE_DEVICES",
            )
        )
    memory = f", {min(one.memory_mib for one in facts.devices) / 1024:.0f} GiB each or more"
    cap = f", compute capability {min(caps):.1f}" if caps else ""
    return findings or [ok("driver", f"{driver}{cap}{memory}")]


def _environment(facts: Facts) -> list[Finding]:
    findings = []
    if facts.unmet:
        shown = ", ".join(facts.unmet[:_MOST_UNMET])
        more = len(facts.unmet) - _MOST_UNMET
        shown += f" and {more} more" if more > 0 else ""
        findings.append(
            note("packages of TensorRT-LLM", f"its metadata asks for others: {shown}", "pip check")
        )
    if facts.own_ucx:
        names = " and ".join(facts.own_ucx)
        findings.append(
            note(
                "UCX of TensorRT-LLM",
                f"{_SUBJECT} brings its own UCX; beside it {names} may be loaded in its place",
                f"pip uninstall {' '.join(facts.own_ucx)}",
            )
        )
    return findings


def _memory_limits(facts: Facts, *, several: bool) -> list[Finding]:
    """Judge what NCCL and the KV transfers need; a lone worker of one rank needs neither."""
    findings = []
    shm, memlock = facts.shm_bytes, facts.memlock_bytes
    if several and shm is not None and shm < _LEAST_SHM_BYTES:
        text = f"{shm / _GIB:.2f} GiB in all; NCCL exchanges between ranks through it"
        findings.append(note("shared memory", text, _IN_DOCKER))
    if several and memlock is not None:
        text = f"{memlock >> 20} MiB may be locked; NCCL and UCX pin their buffers for the network"
        findings.append(note("memlock", text, f"ulimit -l unlimited, or {_IN_DOCKER}"))
    return findings


def _mpi(facts: Facts, needs: list[_Need]) -> Finding:
    if not facts.mpirun:
        text = "no mpirun on PATH"
    elif not facts.mpi_flavour:
        text = f"{facts.mpirun} is neither Open MPI's nor MPICH's"
    else:
        return ok("mpirun", f"{_FLAVOURS[facts.mpi_flavour]} ({facts.mpirun})")
    if any(need.world.size > 1 for need in needs):
        return note("mpirun", f"{text}: {_SUBJECT} starts its ranks itself, by MPI spawn")
    return ok("mpirun", f"{text}; a worker of one rank needs none")


def _transceiver(configs: Mapping[Role, EngineConfig]) -> list[Finding]:
    """Say by which library KV is to move: a file may name another than the flags."""
    parts = []
    for role, config in configs.items():
        backend = config.settings.get(BACKEND)
        told = f"{backend.value} ({backend.source})" if backend and backend.value else "none"
        parts.append(f"{told} for {role}")
    if not parts:
        return []
    text = f"{_SUBJECT} moves KV itself; its backend: {', '.join(parts)}"
    return [ok("KV transport", text)]


def _release(version: str) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return tuple(int(part or 0) for part in found.groups()) if found else ()


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
