"""Looks at this machine and this configuration, and says what is missing and how to get it.

Changes nothing. Heavy or fragile parts (torch, GPU tools) are asked in child processes with a
deadline, so that a broken driver shows up as a line and not as a hang.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from trtllm_workers.config.images import MULTIMODAL
from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.config.settings import Settings
from trtllm_workers.deploy.ask import ask as _ask
from trtllm_workers.deploy.doctor_host import left_overs, limit_findings
from trtllm_workers.deploy.doctor_services import service_findings
from trtllm_workers.deploy.findings import Finding, in_section, note, ok, problem
from trtllm_workers.deploy.inventory import mpiexec_path, vision_lacks, vision_packages
from trtllm_workers.deploy.plan import install_vision
from trtllm_workers.deploy.ports import require_free_port
from trtllm_workers.deploy.prepare import Prepared, prepare, prepare_settings
from trtllm_workers.deploy.run import Run
from trtllm_workers.deploy.trtllm_facts import find_facts
from trtllm_workers.deploy.trtllm_host import judge
from trtllm_workers.errors import ConfigError
from trtllm_workers.types import Role

_GIB = 1 << 30
_REQUIRED = (
    "click",
    "fastapi",
    "httptools",
    "jinja2",
    "msgspec",
    "prometheus-client",
    "pyyaml",
    "structlog",
    "tokenizers",
    "uvicorn",
)
_LEAST_DISK_BYTES = _GIB // 2
_TORCH_QUESTION = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({"version": torch.__version__, "threads": torch.get_num_threads(),
    "device": torch.cuda.get_device_name(0) if cuda else "cpu", "cuda": torch.version.cuda}))
"""


@dataclass(frozen=True, slots=True)
class _Part:
    """An extra of ours: what to import, the packages whose versions tell, and what it is for."""

    subject: str
    module: str
    packages: tuple[str, ...]
    extra: str
    purpose: str


_UCX = _Part("UCX", "ucxx", ("ucxx-cu12", "libucx-cu12"), "ucx", "--kv-transport ucx")
# The wheels for the two CUDA versions have a module each; the meta package has a third.
_NIXL = _Part("NIXL", "nixl_cu12", ("nixl-cu12",), "nixl", "--kv-transport nixl")
_MPI = _Part("MPI", "mpi4py.MPI", ("mpi4py", "mpich"), "mpi", "tensor_parallel_size above 1")


def examine(
    explicit: Mapping[str, Any],
    environ: Mapping[str, str],
    runs: Sequence[Run],
    roots: Sequence[Path] = (),
) -> list[Finding]:
    """Return the findings for the configuration that ``up`` would take from these flags.

    ``roots`` are where runs are kept: what dead ones left is looked for there.
    """
    findings = [_system(), _python(), *_packages()]
    settings: Settings | None = None
    configs: Mapping[Role, EngineConfig] = {}
    needed: set[str] = set()
    try:
        prepared = prepare(explicit, environ)
    except (ConfigError, FileNotFoundError) as wrong:
        findings.append(problem("settings", str(wrong).replace("\n", "; ")))
        with suppress(ConfigError, FileNotFoundError):  # only an engine config was wrong
            settings = prepare_settings(explicit, environ)
    else:
        settings, configs = prepared.settings, prepared.engine_configs
        needed = _needed(prepared)
        findings.append(
            ok(
                "settings",
                f"model {settings.served_model_name} ({settings.model_path}), "
                f"engine {settings.engine}",
            )
        )
        findings += [note("settings", warning) for warning in settings.warnings]
    engine = settings.engine if settings else "torch"
    if settings is not None and engine == "trtllm":
        findings += judge(settings, configs, find_facts(environ, thorough=True))
    findings += [_torch(needed=engine == "torch"), _gpu(), _tokenizer(), _event_loop()]
    findings += [_memory(settings), _disk(settings)]
    findings += limit_findings(known={one.subject for one in findings})
    if settings is not None:
        findings.append(_port(settings, runs))
    findings += [_stale_runs(runs), left_overs(roots)]
    findings += [_part(part, needed=part.extra in needed) for part in (_UCX, _NIXL, _MPI)]
    findings.append(_images(settings))
    findings += service_findings(settings, environ)
    return [in_section(one) for one in findings]


def _needed(prepared: Prepared) -> set[str]:
    """Return which extras this configuration asks for; TensorRT-LLM brings its own UCX, NIXL and MPI."""
    needed: set[str] = set()
    if prepared.settings.engine == "trtllm":
        return needed
    if prepared.settings.disaggregated:
        needed.add(prepared.settings.kv_transport)
    for config in prepared.engine_configs.values():
        ranks = config.settings.get("tensor_parallel_size")
        if ranks is not None and ranks.value > 1:
            needed.add("mpi")
    return needed


def _system() -> Finding:
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        return problem("system", f"{sys.platform}: Linux 5.3 or later is needed to watch processes")
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as wrong:
        return problem("system", f"this kernel or sandbox has no pidfd: {wrong.strerror}")
    return ok("system", f"Linux {os.uname().release}, {len(os.sched_getaffinity(0))} CPUs")


def _python() -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        fix = "make setup PYTHON=python3.11"
        return problem("python", f"{version}; 3.11 or 3.12 is needed", fix)
    return ok("python", f"{version} ({sys.executable})")


def _packages() -> list[Finding]:
    versions = {name: _version(name) for name in _REQUIRED}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        return [
            problem(
                "packages", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}"
            )
        ]
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [ok("packages", shown)]


def _torch(*, needed: bool) -> Finding:
    if not _has_module("torch"):
        say = problem if needed else note
        return say("torch", "not installed; engine torch needs it", "make setup")
    done = _ask([sys.executable, "-c", _TORCH_QUESTION])
    if isinstance(done, str):
        say = problem if needed else note
        return say("torch", f"does not import: {done}", "pip install --force-reinstall torch")
    facts = json.loads(done[0].splitlines()[-1])
    where = facts["device"] if facts["device"] != "cpu" else f"CPU, {facts['threads']} threads"
    return ok("torch", f"{facts['version']} on {where}")


def _gpu() -> Finding:
    program = shutil.which("nvidia-smi")
    if program is None:
        return note("gpu", "none (no nvidia-smi); engine torch computes on the CPU")
    query = "--query-gpu=name,memory.total,memory.used,driver_version"
    done = _ask([program, query, "--format=csv,noheader,nounits"], timeout_s=15.0)
    if isinstance(done, str):
        return note("gpu", f"nvidia-smi fails: {done}", "check the driver: nvidia-smi")
    rows = [line.split(", ") for line in done[0].splitlines() if line.count(", ") >= 3]
    if not rows:
        return note("gpu", "nvidia-smi lists no device")
    shown = "; ".join(f"{name}, {used} of {total} MiB used" for name, total, used, *_ in rows)
    return ok("gpu", f"{shown}; driver {rows[0][3]}")


def _tokenizer() -> Finding:
    if _has_module("fastokens"):
        return ok("tokenizer", f"fastokens {_version('fastokens')} (fast path)")
    return note(
        "tokenizer",
        "Hugging Face tokenizers only: long prompts take about ten times longer to encode",
        "pip install fastokens",
    )


def _event_loop() -> Finding:
    if _has_module("uvloop"):
        return ok("uvloop", str(_version("uvloop")))
    return note(
        "uvloop", "not installed; the ingress needs more CPU per token", "pip install uvloop"
    )


def _memory(settings: Settings | None) -> Finding:
    available = _meminfo("MemAvailable")
    total = _meminfo("MemTotal")
    text = f"{available / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    if settings is not None and settings.engine == "torch":
        weights = sum(path.stat().st_size for path in settings.model_path.glob("*.safetensors"))
        # An encode worker takes the vision tower's part alone, which is small.
        workers = settings.num_workers
        if settings.disaggregated:
            workers = settings.num_prefill_workers + settings.num_decode_workers
        wanted = weights * workers
        text += f"; weights take {wanted / _GIB:.2f} GiB"
        if wanted > available and not Path("/dev/nvidia0").exists():
            return problem("memory", text, "a smaller model, fewer workers, or more memory")
    return ok("memory", text)


def _disk(settings: Settings | None) -> Finding:
    folder = (settings.log_dir or settings.run_dir) if settings else Path.cwd()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{free / _GIB:.1f} GiB free for logs in {folder}"
    if free < _LEAST_DISK_BYTES:
        return note("disk", text, "make room, or choose another place with --log-dir")
    return ok("disk", text)


def _port(settings: Settings, runs: Sequence[Run]) -> Finding:
    try:
        require_free_port(settings.http_host, settings.http_port, runs)
    except ConfigError as wrong:
        return problem("port", str(wrong))
    if settings.http_port == 0:
        return ok("port", "a free one is taken")
    return ok("port", f"{settings.http_port} on {settings.http_host} is free")


def _stale_runs(runs: Sequence[Run]) -> Finding:
    stale = [run.run_id for run in runs if run.launcher is None]
    live = [run.run_id for run in runs if run.launcher is not None]
    if stale:
        fix = "\n".join(f"trtllm-launch stop {run_id}" for run_id in stale)
        return note("runs", f"left over without a launcher: {', '.join(stale)}", fix)
    return ok("runs", f"running: {', '.join(live)}" if live else "none, and nothing left over")


def _part(part: _Part, *, needed: bool) -> Finding:
    say = problem if needed else note
    fix = f"pip install 'trtllm-launch[{part.extra}]'"
    lacks = [] if _has_module(part.module.partition(".")[0]) else [part.module.partition(".")[0]]
    if part is _MPI and not mpiexec_path():
        lacks.append("mpiexec")
    if lacks:
        return say(part.subject, f"missing: {', '.join(lacks)}; for {part.purpose}", fix)
    done = _ask([sys.executable, "-c", f"import {part.module}"])
    if isinstance(done, str):
        return say(part.subject, f"{part.module} does not import: {done}", fix)
    versions = ", ".join(f"{name} {_version(name) or '?'}" for name in part.packages)
    return ok(part.subject, f"{versions}; for {part.purpose}")


def _images(settings: Settings | None) -> Finding:
    engine = settings.engine if settings else "torch"
    lacks = vision_lacks(engine)
    wanted = settings is not None and settings.modality == MULTIMODAL
    if lacks:
        return (problem if wanted else note)(
            "images",
            f"missing: {', '.join(lacks)}; for models that take images",
            install_vision(engine, lacks),
        )
    versions = ", ".join(f"{name} {_version(name)}" for name in vision_packages(engine))
    if settings is None or not wanted:
        return ok("images", f"{versions}; the model takes text only")
    folder = settings.allowed_local_media_path
    files = f"local files under {folder}" if folder else "no local files"
    hosts = ", ".join(settings.media_url_host) or "any public address"
    return ok("images", f"{versions}; {files}, URLs of {hosts}")


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _version(distribution: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return None


def _meminfo(field: str) -> int:
    """Return a field of /proc/meminfo in bytes; 0 when it is not there."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return 0
