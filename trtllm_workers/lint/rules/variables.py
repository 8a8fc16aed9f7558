"""Environment variables that the workers would get: contradictions, and values with a silent effect.

A rule runs once over the deployment's variables and once for each config with ``env_overrides``, then
over what its workers really get, and only about variables that the config itself sets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trtllm_workers.lint.document import Document
from trtllm_workers.lint.problem import Problem, Severity
from trtllm_workers.lint.rules.rule import DISAGGREGATED, Facts, parallel, transceiver_backend

BUFFER_SIZE = "TRTLLM_KVCACHE_TRANSFER_BUFFER_SIZE"
DEFAULT_BUFFER_BYTES = 512 << 20
"""The transceiver's buffer when neither max_tokens_in_buffer nor the variable is set."""

_OVERRIDES = "env_overrides"
# In the order in which TensorRT-LLM looks at them.
_SWITCHES = {f"TRTLLM_USE_{name}_KVCACHE": name for name in ("NIXL", "UCX", "MOONCAKE", "MPI")}
_SIZE = re.compile(r"(\d+)\s*([KMG]?B)", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}
# Set for a process inside an allocation or an MPI job; MPI then refuses to start more processes.
_SPAWN_BLOCKERS = ("SLURM_JOB_ID", "SLURM_JOBID", "SLURM_NODELIST", "PMIX_RANK", "PMI_RANK")
_LAUNCHED = ("TLLM_SPAWN_PROXY_PROCESS", "tllm_mpi_size")


@dataclass(frozen=True, slots=True)
class Variables:
    """Variables as workers get them. ``document`` is set when its env_overrides are part of them."""

    values: Mapping[str, str]
    documents: Sequence[Document]
    document: Document | None = None
    own: frozenset[str] = frozenset()

    def get(self, name: str) -> str | None:
        return self.values.get(name)

    def on(self, name: str) -> bool:
        """Return whether a variable is a switch that is on."""
        return self.values.get(name) == "1"

    def concern(self, *names: str) -> bool:
        """Return whether to speak here: about the deployment's variables, or a config's own."""
        return self.document is None or not self.own.isdisjoint(names)

    def problem(
        self, severity: Severity, rule: str, name: str, message: str, advice: str
    ) -> Problem:
        """Return a finding about a variable, at env_overrides where that sets it."""
        if self.document is not None:
            key = f"{_OVERRIDES}.{name}"
            return self.document.problem(severity, rule, key, message, advice=advice)
        return Problem(severity, rule, message, key=name, advice=advice)


def variables_switches(variables: Variables, facts: Facts) -> Iterator[Problem]:
    """At most one variable chooses the transceiver."""
    on = [name for name in _SWITCHES if variables.on(name)]
    if len(on) > 1 and variables.concern(*on):
        yield variables.problem(
            Severity.WARNING,
            "variables-switches",
            on[0],
            f"{' and '.join(on)} are both 1; {on[0]} wins, and only where the backend is DEFAULT",
            "unset all of them and write cache_transceiver_config.backend",
        )


def variables_backend(variables: Variables, facts: Facts) -> Iterator[Problem]:
    """A variable that chooses a transceiver is ignored when the config names one."""
    for doc in variables.documents:
        backend = transceiver_backend(doc, facts)
        if backend in (None, "DEFAULT") or doc.role not in DISAGGREGATED:
            continue
        for name, meant in _SWITCHES.items():
            if variables.on(name) and meant != backend and variables.concern(name):
                yield variables.problem(
                    Severity.WARNING,
                    "variables-backend",
                    name,
                    f"{name}=1 asks for {meant}, but {doc.name} has backend {backend}, which wins",
                    f"unset {name}, or write cache_transceiver_config.backend: {meant}",
                )


def variables_nixl_conflict(variables: Variables, facts: Facts) -> Iterator[Problem]:
    """Two variables choose NIXL's backend and must not both be set."""
    mine, other = "TRTLLM_NIXL_KVCACHE_BACKEND", "NIXL_BACKEND"
    if variables.get(mine) and variables.get(other) and variables.concern(mine, other):
        yield variables.problem(
            Severity.ERROR,
            "variables-nixl-conflict",
            other,
            f"{other} and {mine} are both set; together they end in errors about rail endpoints on EFA",
            f"unset {other}",
        )


def variables_nixl_backend(variables: Variables, facts: Facts) -> Iterator[Problem]:
    """An unknown backend of NIXL is silently UCX."""
    name = "TRTLLM_NIXL_KVCACHE_BACKEND"
    value = variables.get(name)
    if value is not None and value not in ("UCX", "LIBFABRIC") and variables.concern(name):
        yield variables.problem(
            Severity.WARNING,
            "variables-nixl-backend",
            name,
            f"{name}={value} is no backend that TensorRT-LLM knows; it takes UCX without a word",
            "set UCX or LIBFABRIC",
        )


def variables_ucx_tls(variables: Variables, facts: Facts) -> Iterator[Problem]:
    """UCX without its CUDA transports takes GPU memory for host memory."""
    value = variables.get("UCX_TLS")
    if not value or value.startswith("^") or not variables.concern("UCX_TLS"):
        return
    parts = {part.strip() for part in value.lower().split(",")}
    if "all" in parts or any(part.startswith("cuda") for part in parts):
        return
    from_slurm = " (SLURM's MPI plugins set it so)" if parts == {"tcp"} else ""
    yield variables.problem(
        Severity.ERROR,
        "variables-ucx-tls",
        "UCX_TLS",
        f"UCX_TLS={value}{from_slurm} has no CUDA transport: UCX takes GPU memory for host memory, and "
        "its registration fails",
        f"unset UCX_TLS, or set UCX_TLS={value},cuda_copy,cuda_ipc",
    )


def variables_ucx_devices(variables: Variables, facts: Facts) -> Iterator[Problem]:
    """Across nodes UCX guesses the network card unless told."""
    name = "UCX_NET_DEVICES"
    if (
        variables.document is not None
        or variables.get(name)
        or not _several_nodes(variables, facts)
    ):
        return
    yield variables.problem(
        Severity.NOTE,
        "variables-ucx-devices",
        name,
        f"several nodes, and {name} is unset: UCX chooses the network card, and a wrong one was seen to "
        "give wrong text",
        f"set {name} to the cards of the fast network, as mlx5_0:1",
    )


def variables_mnnvl(variables: Variables, facts: Facts) -> Iterator[Problem]:
    """CUDA IPC over multi-node NVLink works only inside one NVLink domain."""
    name = "UCX_CUDA_IPC_ENABLE_MNNVL"
    value = variables.get(name)
    if value is None or not variables.concern(name):
        return
    if value.lower() not in ("y", "n", "yes", "no", "on", "off", "1", "0", "try"):
        yield variables.problem(
            Severity.WARNING,
            "variables-mnnvl",
            name,
            f"{name}={value} is neither y nor n",
            "set n when prefill and decode are in different NVLink domains, else leave it unset",
        )
    elif value.lower() in ("y", "yes", "on", "1") and _several_nodes(variables, facts):
        yield variables.problem(
            Severity.NOTE,
            "variables-mnnvl",
            name,
            f"{name}={value} on several nodes holds only if all of them are in one NVLink domain",
            "set n when prefill and decode are in different NVLink domains",
        )


def variables_buffer_size(variables: Variables, facts: Facts) -> Iterator[Problem]:
    """The transceiver's buffer size has a number and a unit."""
    value = variables.get(BUFFER_SIZE)
    if value is None or not variables.concern(BUFFER_SIZE):
        return
    if not parse_size(value):
        yield variables.problem(
            Severity.WARNING,
            "variables-buffer-size",
            BUFFER_SIZE,
            f"{BUFFER_SIZE}={value} is no size: a whole number and B, KB, MB or GB",
            f"set {BUFFER_SIZE}=512MB",
        )
    elif any(
        doc.get("cache_transceiver_config.max_tokens_in_buffer") for doc in variables.documents
    ):
        yield variables.problem(
            Severity.NOTE,
            "variables-buffer-size",
            BUFFER_SIZE,
            f"{BUFFER_SIZE}={value} beside max_tokens_in_buffer: the size in tokens is what counts",
            f"unset {BUFFER_SIZE}",
        )


def variables_override(variables: Variables, facts: Facts) -> Iterator[Problem]:
    """A config's env_overrides beat the environment, inside the engine's process only."""
    if variables.document is None:
        return
    for name in sorted(variables.own):
        outside = facts.context.environ.get(name)
        if outside is not None and outside != variables.get(name):
            yield variables.problem(
                Severity.WARNING,
                "variables-override",
                name,
                f"env_overrides says {name}={variables.get(name)}, the environment {outside}: the ranks "
                "follow the config once it is read, and what runs before follows the environment",
                "set it in one place",
            )


def variables_mpi_spawn(variables: Variables, facts: Facts) -> Iterator[Problem]:
    """Inside an allocation MPI often refuses to start the engine's own processes."""
    if variables.document is not None or any(variables.get(name) for name in _LAUNCHED):
        return
    found = [name for name in _SPAWN_BLOCKERS if variables.get(name)]
    if found:
        yield variables.problem(
            Severity.WARNING,
            "variables-mpi-spawn",
            found[0],
            f"{', '.join(found)} would reach the workers: TensorRT-LLM starts its ranks by MPI, even a "
            "single one, and MPI then says that no slots are left",
            "start workers with srun and trtllm-llmapi-launch, or unset these variables for them",
        )


def parse_size(text: str) -> int | None:
    """Return the bytes of ``512MB`` and the like; None for anything else."""
    match = _SIZE.fullmatch(text.strip())
    return int(match[1]) * _UNITS[match[2].upper()] if match else None


def worker_variables(doc: Document, environ: Mapping[str, str]) -> dict[str, str]:
    """Return what a worker of this config gets: its env_overrides over the environment."""
    return {**environ, **_overrides(doc)}


def check_variables(documents: Sequence[Document], facts: Facts) -> Iterator[Problem]:
    """Run all rules over the environment, and over each config that overrides a part of it."""
    environ = facts.context.environ
    scopes = [Variables(environ, documents)]
    for doc in documents:
        if own := _overrides(doc):
            scopes.append(Variables({**environ, **own}, (doc,), doc, frozenset(own)))
    for scope in scopes:
        for rule in VARIABLE_RULES:
            yield from rule(scope, facts)


def _overrides(doc: Document) -> dict[str, str]:
    given: Any = doc.get(_OVERRIDES)
    if not isinstance(given, Mapping):
        return {}
    return {str(name): str(value) for name, value in given.items()}


def _several_nodes(variables: Variables, facts: Facts) -> bool:
    """Return whether the smallest deployment, one worker of each config, is more than one node.

    An aggregated worker may be an alternative to the pair beside it, so it is not added to them.
    """
    per_node = facts.context.gpus_per_node
    if per_node is None:
        return False
    wanted = [
        (doc.role, facts.context.num_gpus.get(doc.role, parallel(doc).world))
        for doc in variables.documents
    ]
    pair = sum(gpus for role, gpus in wanted if role in DISAGGREGATED)
    return max((pair, *(gpus for _, gpus in wanted))) > per_node


VariableRule = Callable[[Variables, Facts], Iterator[Problem]]
VARIABLE_RULES: tuple[VariableRule, ...] = (
    variables_switches,
    variables_backend,
    variables_nixl_conflict,
    variables_nixl_backend,
    variables_ucx_tls,
    variables_ucx_devices,
    variables_mnnvl,
    variables_buffer_size,
    variables_override,
    variables_mpi_spawn,
)
