"""``results.json``: what a sweep measured, written and read. docs/benchmarking.md describes each field."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from trtllm_workers import __version__
from trtllm_workers.bench.deployment import Real, Stated
from trtllm_workers.bench.records import Record, failures
from trtllm_workers.bench.stats import Distribution, distribution
from trtllm_workers.bench.workload import Load, Workload
from trtllm_workers.errors import ConfigError

SCHEMA_VERSION = 1
MAX_FAILED_SHARE = 0.01
_MICROSECONDS = 6  # digits that a time keeps in a file


class Samples(msgspec.Struct, kw_only=True):
    """One figure per good request, in the order they were asked."""

    ttft_s: list[float] = []
    itl_s: list[float] = []
    latency_s: list[float] = []


class Level(msgspec.Struct, kw_only=True):
    """What one level measured; figures are of good requests alone.

    ``duration_s`` runs from the first request sent to the last answer ended; throughputs are over
    it. ``stalled_share`` is the part of the time between first and last tokens that went into gaps
    beyond twice the median gap. ``phases_s`` are the server's own means of the parts of a first token.
    """

    load: Load
    num_good: int
    num_failed: int
    failures: dict[str, int]
    duration_s: float
    output_tokens: int
    tokens_per_s: float
    requests_per_s: float
    tokens_per_s_per_user: Distribution
    ttft_s: Distribution
    itl_s: Distribution
    icl_s: Distribution
    latency_s: Distribution
    cached_share: float
    stalled_share: float
    cpu_share: float | None = None
    phases_s: dict[str, float] = {}
    samples: Samples = msgspec.field(default_factory=Samples)

    @property
    def valid(self) -> bool:
        """False when more than 1 % of the requests were wrong or failed, or none was good."""
        return self.num_good > 0 and self.num_failed <= MAX_FAILED_SHARE * (
            self.num_good + self.num_failed
        )


class Environment(msgspec.Struct, kw_only=True):
    """Where the client ran."""

    host: str
    num_cpus: int
    processor: str
    system: str
    python: str


class Results(msgspec.Struct, kw_only=True):
    """A whole sweep."""

    schema_version: int
    version: str
    created_at: str
    client: str
    url: str
    deployment_kind: str
    workload: Workload
    stated: Stated
    deployment: Real
    environment: Environment
    notes: list[str] = []
    levels: list[Level] = []


def level_of(
    load: Load,
    records: Sequence[Record],
    *,
    cpu_s: float | None = None,
    phases_s: Mapping[str, float] | None = None,
) -> Level:
    """Return what the records of a level say."""
    good = [one for one in records if not one.problem]
    ends = [one.end_s for one in records]
    began_s = min((one.start_s for one in records), default=0.0)
    duration_s = max(max(ends, default=0.0) - began_s, 1e-9)
    itl_s = [itl for one in good if (itl := one.itl_s) is not None]
    gaps = [gap for one in good for gap in one.gaps_s()]
    prompt_tokens = sum(one.prompt_tokens for one in good)
    output_tokens = sum(one.output_tokens for one in good)
    ttft_s = [one.ttft_s for one in good]
    latency_s = [one.latency_s for one in good]
    icl_s = distribution(gaps)
    return Level(
        load=load,
        num_good=len(good),
        num_failed=len(records) - len(good),
        failures=failures(records),
        duration_s=round(duration_s, _MICROSECONDS),
        output_tokens=output_tokens,
        tokens_per_s=output_tokens / duration_s,
        requests_per_s=len(good) / duration_s,
        tokens_per_s_per_user=distribution([1 / itl for itl in itl_s if itl > 0]),
        ttft_s=distribution(ttft_s),
        itl_s=distribution(itl_s),
        icl_s=icl_s,
        latency_s=distribution(latency_s),
        cached_share=sum(one.cached_tokens for one in good) / max(1, prompt_tokens),
        stalled_share=_stalled(gaps, icl_s.p50),
        cpu_share=None if cpu_s is None else cpu_s / duration_s,
        phases_s=dict(phases_s or {}),
        samples=Samples(
            ttft_s=_rounded(ttft_s), itl_s=_rounded(itl_s), latency_s=_rounded(latency_s)
        ),
    )


def _stalled(gaps: Sequence[float], usual: float | None) -> float:
    total = sum(gaps)
    if usual is None or total <= 0:
        return 0.0
    return sum(gap - usual for gap in gaps if gap > 2 * usual) / total


def environment_of_client() -> Environment:
    """Return what this host is."""
    return Environment(
        host=platform.node(),
        num_cpus=os.cpu_count() or 1,
        processor=_processor(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
    )


def new_results(
    *, client: str, url: str, kind: str, workload: Workload, stated: Stated, real: Real
) -> Results:
    """Return results without levels yet."""
    return Results(
        schema_version=SCHEMA_VERSION,
        version=__version__,
        created_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        client=client,
        url=url,
        deployment_kind=kind,
        workload=workload,
        stated=stated,
        deployment=real,
        environment=environment_of_client(),
    )


def write_results(path: Path, results: Results) -> None:
    """Replace the file; a reader never sees half of it."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    draft.replace(path)


def read_results(path: Path) -> Results:
    """Return what a file holds. Raises ConfigError when it is none of ours."""
    if path.is_dir():
        path = path / "results.json"
    try:
        content = path.read_bytes()
        version = msgspec.json.decode(content)["schema_version"]
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"{path} has schema version {version}, this command reads {SCHEMA_VERSION}; "
                "measure again, or use the command that wrote it"
            )
        return msgspec.json.decode(content, type=Results)
    except OSError as wrong:
        raise ConfigError(f"{path} cannot be read: {wrong.strerror or wrong}") from wrong
    except (msgspec.DecodeError, KeyError, TypeError) as wrong:
        raise ConfigError(f"{path} is no results.json of 'trtllm-launch bench': {wrong}") from wrong


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Write one JSON object per request."""
    with path.open("wb") as out:
        for one in records:
            for name in ("intended_s", "start_s", "end_s"):
                setattr(one, name, round(getattr(one, name), _MICROSECONDS))
            one.chunks_s = _rounded(one.chunks_s)
            out.write(msgspec.json.encode(one) + b"\n")


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, _MICROSECONDS) for value in values]


def _processor() -> str:
    try:
        told = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in told.splitlines() if "model name" in line]
    return names[0] if names else platform.processor()
