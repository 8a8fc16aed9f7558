"""What rules know besides the engine configs: GPUs, lengths, router, model. All of it optional."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class LintContext:
    """The surroundings of a deployment; a rule whose facts are missing says nothing.

    ``isl`` and ``osl`` are the longest input and output in tokens. ``router`` is the router mode.
    ``num_gpus`` by role is how many GPUs each worker of that role gets. ``gpu_memory_bytes`` is one
    GPU's whole memory. ``model_path`` holds config.json; ``model_name`` is told in messages.
    ``kv_transport`` is what the launcher will write as transceiver backend (None: nobody will).
    ``environ`` holds the variables that the workers would get. ``sets_role_keys``: the launcher itself
    fills in what a role needs where the file is silent.
    """

    gpus_per_node: int | None = None
    num_gpus: Mapping[str, int] = field(default_factory=dict)
    gpu_memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    isl: int | None = None
    osl: int | None = None
    router: str | None = None
    model_path: Path | None = None
    model_name: str = ""
    kv_transport: str | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    sets_role_keys: bool = False
