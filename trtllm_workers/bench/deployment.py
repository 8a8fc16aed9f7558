"""What a deployment is, as its own routes tell it, and whether that is what the user believes it is."""

from __future__ import annotations

import asyncio
import re
from collections import Counter, defaultdict
from typing import Any, Literal

import msgspec

from trtllm_workers.bench.client import Client
from trtllm_workers.errors import ConfigError, StartError

Mode = Literal["aggregated", "disaggregated"]

_WORKERS_TELL_EVERY_S = 1.2  # once a second, and their way
_SERIES = re.compile(r"^trtllm_launch_(\w+?)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_PHASE = re.compile(r'phase="(\w+)"')


class Stated(msgspec.Struct, frozen=True, kw_only=True):
    """What the user said the deployment is; None where nothing was said.

    ``tp`` is the ranks of each worker, ``dp`` the number of workers; of prefill and decode workers
    apart in a disaggregated one.
    """

    mode: Mode | None = None
    tp: int | None = None
    dp: int | None = None
    prefill_tp: int | None = None
    prefill_dp: int | None = None
    decode_tp: int | None = None
    decode_dp: int | None = None


class Real(msgspec.Struct, frozen=True, kw_only=True):
    """What the server told. ``mode`` None: it is no ingress of this project and told only its model.

    ``num_workers`` and ``tensor_parallel_size`` are by role; sizes that differ within a role, or that
    an engine does not tell, are left out.
    """

    model: str
    mode: Mode | None = None
    max_model_len: int | None = None
    engine: str = ""
    device: str = ""
    router_mode: str = ""
    kv_transport: str = ""
    num_workers: dict[str, int] = {}
    tensor_parallel_size: dict[str, int] = {}

    @property
    def in_words(self) -> str:
        """Return one line for people."""
        if self.mode is None:
            return f"{self.model} (a server that does not tell how it is built)"
        parts = []
        for role, number in self.num_workers.items():
            ranks = self.tensor_parallel_size.get(role, 0)
            each = f" of {ranks} ranks" if ranks > 1 else ""
            parts.append(f"{number} {role} worker{'s' * (number > 1)}{each}")
        return (
            f"{self.model}, {self.mode}: {', '.join(parts)}, engine {self.engine} on {self.device}"
        )


async def ask_deployment(client: Client, model: str | None) -> Real:
    """Return what serves ``model``, or the only model there is.

    Raises StartError when nobody answers, ConfigError when the model is not served or not the only one.
    """
    url = client.target.url
    try:
        status, body = await client.fetch("GET", "/v1/models")
        listed = msgspec.json.decode(body)["data"] if status == 200 else None
        lengths = {str(one["id"]): one.get("max_model_len") for one in listed or ()}
    except OSError as wrong:
        raise StartError(
            f"nobody answers at {url}: {wrong.strerror or wrong}; is the deployment up "
            "(trtllm-launch ps), and is --url right?"
        ) from wrong
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        listed, lengths = None, {}
    if listed is None:
        raise ConfigError(f"{url}/v1/models does not list models; is --url right?", param="url")
    known = ", ".join(lengths) or "none (yet)"
    if model is None and len(lengths) != 1:
        raise ConfigError(f"{url} serves {known}; say which with --model", param="model")
    name = next(iter(lengths)) if model is None else model
    if name not in lengths:
        raise ConfigError(f"{url} does not serve '{name}' but {known}; see --model", param="model")
    told = {}
    for path in ("/health", "/router"):
        status, body = await client.fetch("GET", path)
        try:
            told[path] = msgspec.json.decode(body) if status == 200 else None
        except msgspec.DecodeError:
            told[path] = None  # another server's /health may be empty
    return read_deployment(name, lengths[name], told["/health"], told["/router"])


def read_deployment(model: str, max_model_len: int | None, health: Any, router: Any) -> Real:
    """Return what the answers of ``/health`` and ``/router`` say about ``model``. Pure."""
    try:
        served = health["models"].get(model) or next(
            one for one in health["models"].values() if model in one.get("adapters", {})
        )
        workers = [one for one in served["workers"] if one["state"] == "ready"]
        by_role = Counter(str(one["role"]) for one in workers)
        sizes: dict[str, set[int]] = {}
        for one in workers:
            sizes.setdefault(str(one["role"]), set()).add(int(one.get("tensor_parallel_size", 0)))
        return Real(
            model=model,
            mode="aggregated" if set(by_role) == {"aggregated"} else "disaggregated",
            max_model_len=max_model_len,
            engine=_all(str(one["engine"]) for one in workers),
            device=_all(str(one["device"]) for one in workers),
            router_mode=str(router["mode"]) if isinstance(router, dict) else "",
            kv_transport=_all(
                str(one["kv_transport"]) for one in workers if one["role"] == "decode"
            ),
            num_workers=dict(sorted(by_role.items(), reverse=True)),
            tensor_parallel_size={
                role: next(iter(found))
                for role, found in sorted(sizes.items(), reverse=True)
                if len(found) == 1 and found != {0}
            },
        )
    except (KeyError, TypeError, AttributeError, ValueError, StopIteration):
        return Real(model=model, max_model_len=max_model_len)


def contradictions(stated: Stated, real: Real) -> list[str]:
    """Return where the user and the server disagree, with both values; empty for a foreign server."""
    if real.mode is None:
        return []
    found = []
    if stated.mode is not None and stated.mode != real.mode:
        found.append(f"--mode says {stated.mode}, the server is {real.mode}")
    for flag, role, told, said in (
        ("--dp", "aggregated", real.num_workers, stated.dp),
        ("--tp", "aggregated", real.tensor_parallel_size, stated.tp),
        ("--prefill-dp", "prefill", real.num_workers, stated.prefill_dp),
        ("--prefill-tp", "prefill", real.tensor_parallel_size, stated.prefill_tp),
        ("--decode-dp", "decode", real.num_workers, stated.decode_dp),
        ("--decode-tp", "decode", real.tensor_parallel_size, stated.decode_tp),
    ):
        if said is None:
            continue
        if role not in real.num_workers:
            found.append(f"{flag} says {said}, the server has no {role} workers")
        elif role in told and told[role] != said:
            what = "workers" if flag.endswith("dp") else "ranks in each worker"
            found.append(f"{flag} says {said} {what} ({role}), the server has {told[role]}")
    return found


async def read_phases(client: Client, *, settled: bool = False) -> dict[str, tuple[float, float]]:
    """Return (seconds, requests) so far of each phase of a first token; empty where it is not told.

    ``ingress`` is the whole time to the first token as the ingress measured it. ``settled`` waits
    until workers have told what they did last.
    """
    if settled:
        await asyncio.sleep(_WORKERS_TELL_EVERY_S)
    try:
        status, body = await client.fetch("GET", "/metrics")
    except OSError:
        return {}
    return phases_of(body.decode(errors="replace")) if status == 200 else {}


def phases_of(metrics: str) -> dict[str, tuple[float, float]]:
    """Return the same of the text of ``/metrics``. Pure."""
    sums: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, float] = defaultdict(float)
    for name, labels, value in _SERIES.findall(metrics):
        base, _, part = name.rpartition("_")
        if base == "time_to_first_token_seconds":
            phase = "ingress"
        elif base == "first_token_phase_seconds" and (found := _PHASE.search(labels)):
            phase = found.group(1)
        else:
            continue
        if part == "sum":
            sums[phase] += float(value)
        elif part == "count":
            counts[phase] += float(value)
    return {phase: (sums[phase], counts[phase]) for phase in counts}


def phase_means(
    before: dict[str, tuple[float, float]], after: dict[str, tuple[float, float]]
) -> dict[str, float]:
    """Return the mean seconds of each phase between two readings."""
    means = {}
    for phase, (total_s, requests) in after.items():
        earlier_s, earlier = before.get(phase, (0.0, 0.0))
        if requests > earlier:
            means[phase] = (total_s - earlier_s) / (requests - earlier)
    return means


def _all(values: Any) -> str:
    return ", ".join(sorted(set(values)))
