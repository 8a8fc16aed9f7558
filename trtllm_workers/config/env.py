"""The only reader of the process environment. Knows names of variables, not what values mean."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from trtllm_workers.config.spelling import edit_distance
from trtllm_workers.errors import ConfigError

# Launcher variables of the wider family that this version does not act on, and why. Whoever sets one
# expects an effect, so it is said rather than ignored.
_NOT_HONOURED = {
    "ENCODE_ENDPOINT": "encode workers are found by themselves",
}

# Variables of other software that lie within two edits of one of ours.
_KNOWN_ELSEWHERE = frozenset(
    {"HTTPS_HOST", "HTTPS_PORT", "HTTPS_PROXY", "HTTP_PROXY", "LOG_DIRS", "LOG_FILE", "SSH_HOST"}
)

# What importing ucxx 0.52 puts into the environment where nothing is set.
_WRITTEN_BY_UCXX = {
    "UCX_MAX_RNDV_RAILS": "1",
    "UCX_MEMTYPE_CACHE": "n",
    "UCX_RNDV_FRAG_MEM_TYPE": "cuda",
    "UCX_RNDV_THRESH": "8192",
}

# What the launcher tells a worker: where its output is kept, and, where a program that starts ranks
# stands between them, the variables that all ranks shall have, how many ranks there are, and arguments
# that would not survive that program.
PROCESS_LOG = "TRTLLM_LAUNCH_LOG"
RANK_ENV = "TRTLLM_LAUNCH_RANK_ENV"
WORLD_SIZE = "TRTLLM_LAUNCH_WORLD_SIZE"
ARGUMENTS = "TRTLLM_LAUNCH_ARGUMENTS"
ARGUMENTS_FLAG = "--arguments-from-environment"

# Shorter names have too many innocent neighbours two edits away.
_LONG_NAME = 9


def environment() -> dict[str, str]:
    """Return a copy of this process's environment."""
    return dict(os.environ)


def child_environment(extra: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """Return the environment for a child process: ours, with ``extra`` on top; None removes."""
    merged = environment()
    for name, value in (extra or {}).items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = value
    return merged


def apply_rank_environment() -> dict[str, str]:
    """Set what the launcher decided for all ranks of this worker; return the whole environment.

    To be called before any library is loaded: most read their variables once.
    """
    try:
        decided = json.loads(os.environ.get(RANK_ENV, "{}"))
    except ValueError:
        raise ConfigError(f"environment {RANK_ENV}: must be the JSON that 'up' wrote") from None
    os.environ.update(decided)
    return environment()


def arguments(words: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Return a command's arguments: ``words``, or those that the launcher put into a variable."""
    if list(words) != [ARGUMENTS_FLAG]:
        return list(words)
    try:
        return [str(word) for word in json.loads(environ[ARGUMENTS])]
    except (KeyError, ValueError):
        raise ConfigError(
            f"{ARGUMENTS_FLAG} needs the environment variable {ARGUMENTS}, a JSON list of arguments"
        ) from None


def read_text(names: Collection[str], environ: Mapping[str, str]) -> tuple[str, str] | None:
    """Return (name, text) of the first variable of ``names`` that is set and not blank, or None."""
    for name in names:
        text = environ.get(name, "")
        if text.strip():
            return name, text
    return None


def state_dir(environ: Mapping[str, str]) -> Path:
    """Return the default folder for records of runs, as the XDG base directories have it."""
    state = environ.get("XDG_STATE_HOME", "")
    if state.startswith("/"):  # the XDG specification says to ignore relative paths
        return Path(state) / "trtllm-launch"
    home = environ.get("HOME", "")
    if home.startswith("/"):
        return Path(home) / ".local" / "state" / "trtllm-launch"
    return Path(tempfile.gettempdir()) / f"trtllm-launch-{os.getuid()}"


def hub_cache_dir(environ: Mapping[str, str]) -> Path | None:
    """Return the folder where Hugging Face tools keep downloads, or None without a home."""
    if cache := environ.get("HF_HUB_CACHE", ""):
        return Path(cache)
    if hf_home := environ.get("HF_HOME", ""):
        return Path(hf_home) / "hub"
    home = environ.get("HOME", "")
    return Path(home) / ".cache" / "huggingface" / "hub" if home else None


def calm_openmp() -> None:
    """Let OpenMP threads wait awake only for a moment; call before torch is imported.

    By default a thread that is ahead spins at the end of each operation. When another program
    takes one of the cores, it may spin through the whole time slice of the one it waits for. Seen
    with two cores and a busy neighbour: 624 ms for a token's products in one run, 27 in another; with
    a limit of 2,000 spins 42, of 10,000 34, of 20,000 80. A bound on the worst case, not a speed-up.
    GOMP_SPINCOUNT or OMP_WAIT_POLICY given by the user stay.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def calm_grpc() -> None:
    """Keep gRPC from writing lines of its own to stderr; call before grpc is imported.

    It writes some at every attempt to connect with TLS that fails; what went wrong comes as an error
    as well. GRPC_VERBOSITY given by the user stays.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def prepare_ucx_of_nixl() -> None:
    """Let NIXL's UCX log to stderr, and choose its wires itself; call before each use of NIXL's UCX.

    A UCX_LOG_FILE given by the user stays. What an import of ucxx has written for its own UCX is
    taken back: with it NIXL's moves blocks between processes of one host over TCP (ucxx 0.52).
    """
    os.environ.setdefault("UCX_LOG_FILE", "stderr")
    for name, value in _WRITTEN_BY_UCXX.items():
        if os.environ.get(name) == value:
            del os.environ[name]


def wants_colour(environ: Mapping[str, str], is_terminal: bool) -> bool:
    """Return whether to colour output: never with NO_COLOR, always with FORCE_COLOR."""
    if environ.get("NO_COLOR"):
        return False
    if environ.get("FORCE_COLOR"):
        return True
    return is_terminal and environ.get("TERM", "") != "dumb"


def mpi_rank(environ: Mapping[str, str]) -> int:
    """Return the rank that mpiexec or mpirun gave this process; 0 for one that they did not start."""
    return _first_number(environ, ("PMI_RANK", "OMPI_COMM_WORLD_RANK"), 0)


def mpi_size(environ: Mapping[str, str]) -> int:
    """Return how many ranks mpiexec or mpirun started with this process; 1 without them."""
    return _first_number(environ, ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"), 1)


def rank_in_step(environ: Mapping[str, str]) -> int | None:
    """Return which of several ranks started together this process is; None for one that is alone.

    Knows srun's numbers too, and needs no MPI; for names and reports, not for deciding who leads.
    """
    sizes = (WORLD_SIZE, "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
    ranks = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID")
    if _first_number(environ, sizes, 1) == 1:
        return None
    return next((int(environ[one]) for one in ranks if environ.get(one, "").isdigit()), None)


def _first_number(environ: Mapping[str, str], names: Sequence[str], default: int) -> int:
    return next((int(environ[one]) for one in names if environ.get(one, "").isdigit()), default)


def suspicious_variables(ours: Collection[str], environ: Mapping[str, str]) -> list[str]:
    """Return one warning per variable that looks meant for us but has no effect.

    Those are near-misses of ``ours`` (one or two edits, or the last word left out) and launcher
    variables that this version does not honour.
    """
    warnings = []
    for name in sorted(environ):
        if name in ours or name in _KNOWN_ELSEWHERE or not environ[name].strip():
            continue
        if name in _NOT_HONOURED:
            why = _NOT_HONOURED[name]
            warnings.append(f"environment {name} is set, but has no effect: {why}")
        elif near := _meant(name, ours):
            warnings.append(f"environment {name} is set, but has no effect; did you mean {near}?")
    return warnings


def _meant(name: str, ours: Collection[str]) -> str | None:
    found: tuple[int, str] | None = None
    for own in sorted(ours):
        shortened = own.rpartition("_")[0]
        if name == shortened and "_" in name:
            return own
        limit = 2 if len(own) >= _LONG_NAME else 1
        if abs(len(own) - len(name)) > limit:
            continue
        distance = edit_distance(name, own)
        if distance <= limit and (found is None or distance < found[0]):
            found = (distance, own)
    return found[1] if found else None
